"""The ragged kernel: on a Hopper GPU as it is, elsewhere interpreted."""

import dataclasses

import cases
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import ragged_attention
from pallas_kernels.ragged_config import Config

# The default has a program for each multiprocessor, which takes the
# interpreter minutes.
SMALL = Config(64, 2, 2, 3)
Q_LENS = [0, 1, 7, 63, 64, 65, 3]
KV_LENS = [20, 1, 70, 200, 64, 130, 0]


def _run(
  problem, *, config=SMALL, sinks=None, interpret=cases.INTERPRET, **options
):
  out, lse = ragged_attention.attend(
    *problem.args(),
    sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    config=config,
    interpret=interpret,
    **cases.PLAIN | options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  return np.asarray(out), np.asarray(lse)


def _check(problem, *, config=SMALL, sinks=None, **options):
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), sinks=sinks, **cases.PLAIN | options
  )
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = _run(problem, config=each, sinks=sinks, **options)
    cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


def _make(**options):
  options = dict(
    kv_lens=KV_LENS, q_lens=Q_LENS, dtype="bfloat16", spare_tokens=5
  ) | options
  return cases.make(**options)


def test_matches_oracle():
  _check(_make())


@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", Config(128, 2, 2, 2)),
    (80, (3, 1), 40, "bfloat16", Config(64, 2, 1, 2)),
    (96, (10, 2), 32, "float16", Config(64, 3, 2, 2)),
    (128, (8, 2), 24, "float16", Config(64, 2, 2, 3)),
    (192, (16, 1), 256, "bfloat16", Config(64, 2, 2, 4)),
    (256, (6, 1), 64, "float16", Config(64, 2, 2, 1)),
    (64, (71, 1), 16, "bfloat16", Config(64, 2, 2, 4)),
  ],
)
def test_matches_oracle_for_shapes(head_dim, heads, page_size, dtype, config):
  q_lens = [40, 0, 17, 1] if heads[0] < 16 else [9, 0, 2, 1]
  problem = _make(
    kv_lens=[40, 9, page_size + 17, 200],
    q_lens=q_lens,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  _check(problem, config=config)


@pytest.mark.parametrize(
  ("options", "sinks"),
  [
    (dict(sliding_window=1), None),
    (dict(sliding_window=70, num_sink_tokens=5), [-2, 0, 1, 5]),
    (dict(logits_soft_cap=30.0, scale=4.0), [-2, 0, 1, 40]),
    (dict(sliding_window=100, num_sink_tokens=64, logits_soft_cap=2.0), None),
    (dict(scale=-0.1), None),
  ],
  ids=str,
)
def test_matches_oracle_for_options(options, sinks):
  _check(_make(kv_lens=[330, 66], q_lens=[80, 66]), sinks=sinks, **options)


def test_every_query_sees_all_keys_if_not_causal():
  problem = _make(kv_lens=[150, 70], q_lens=[40, 70])
  out, lse = _run(problem, causal=False)
  for seq, (start, end) in enumerate([(0, 40), (40, 110)]):
    for token in range(start, end):
      one = dataclasses.replace(
        problem,
        q=problem.q[token : token + 1],
        kv_lens=problem.kv_lens[seq : seq + 1],
        page_indices=problem.page_indices[seq : seq + 1],
        cu_q_lens=np.array([0, 1]),
        num_active=1,
      )
      expected = oracle.ragged_paged_attention(
        *dataclasses.astuple(one), **cases.PLAIN
      )
      at = slice(token, token + 1)
      cases.assert_matches(out[at], lse[at], *expected, problem.q.dtype)
  assert not out[110:].any()


def test_holes_are_skipped():
  problem = _make(kv_lens=[330, 64, 300], q_lens=[70, 64, 90])
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  table[2, 2:6] = num_pages
  _check(problem)
  _check(problem, sliding_window=150, num_sink_tokens=20)


@pytest.mark.skipif(
  cases.ON_HOPPER, reason="only the interpreter looks for races"
)
def test_no_memory_is_reused_before_it_was_read(capfd):
  problem = _make(kv_lens=[150, 9, 70], q_lens=[70, 9, 1])
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  _run(problem, interpret=interpret)
  assert "RACE" not in capfd.readouterr().out
