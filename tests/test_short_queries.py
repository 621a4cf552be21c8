"""A few query tokens a sequence, by the decode kernel; interpreted on a CPU."""

import dataclasses

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax
from pallas_kernels import decode_config, short_queries
from pallas_kernels.decode_config import Config

# A fresh sequence, no query, page boundaries, no tokens, several tiles.
Q_LENS = [3, 0, 1, 4, 0, 4]
KV_LENS = [3, 20, 16, 17, 0, 150]


def _run(problem, *, max_q_len=4, sinks=None, **options):
  options = cases.on_device(options)
  return short_queries.attend(
    *problem.args(),
    max_q_len=max_q_len,
    sinks=None if sinks is None else jnp.asarray(sinks),
    config=Config(64, 2, 5),
    interpret=cases.INTERPRET,
    **cases.PLAIN | options,
  )


def _check(problem, *, sinks=None, max_q_len=4, **options):
  out, lse = _run(problem, max_q_len=max_q_len, sinks=sinks, **options)
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), sinks=sinks, **cases.PLAIN | options
  )
  cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


@pytest.mark.parametrize(
  ("heads", "max_q_len"), [((2, 2), 4), ((6, 2), 5), ((8, 1), 8)]
)
def test_matches_oracle(heads, max_q_len):
  problem = cases.make(
    kv_lens=KV_LENS,
    q_lens=Q_LENS,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    dtype="bfloat16",
    spare_tokens=3,
    num_active=6,
  )
  _check(problem, max_q_len=max_q_len)


@pytest.mark.parametrize(
  "options",
  [
    dict(sliding_window=1),
    dict(sliding_window=70, num_sink_tokens=5),
    dict(sliding_window=2, num_sink_tokens=1, logits_soft_cap=3.0),
    dict(
      sliding_window=70,
      num_sink_tokens=5,
      alibi_slopes=np.asarray([0.02, -0.01, 0.3, 1.0], np.float32),
    ),
  ],
)
def test_matches_oracle_with_options(options):
  problem = cases.make(
    kv_lens=KV_LENS,
    q_lens=Q_LENS,
    dtype="float16",
    num_active=6,
  )
  sinks = np.linspace(-2, 2, 4).astype(np.float32)
  _check(problem, sinks=sinks, **options)


@pytest.mark.parametrize("kv_dtype", decode_config.QUANTISED_DTYPES)
def test_quantised_pages_in_fixed_splits_match_oracle(kv_dtype):
  problem = cases.make(
    kv_lens=[3, 20, 16, 17, 0, 550],  # 9 tiles: 3 parts
    q_lens=Q_LENS,
    dtype="bfloat16",
    num_active=6,
  )
  problem, scales = cases.quantise(problem, kv_dtype)
  sinks = np.linspace(-2, 2, 4).astype(np.float32)
  out, lse = _run(
    problem,
    sinks=sinks,
    batch_invariant=True,
    **{name: jnp.asarray(x) for name, x in scales.items()},
  )
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), sinks=sinks, **cases.PLAIN, **scales
  )
  cases.assert_matches(out, lse, *expected, "bfloat16")


def test_sequences_past_num_active_leave_no_trace():
  problem = cases.make(
    kv_lens=[40, 9, 77], q_lens=[2, 4, 3], dtype="bfloat16", num_active=2
  )
  _check(problem)


def test_one_query_or_none():
  problem = cases.make(
    kv_lens=[40, 9, 70], q_lens=[1, 0, 1], dtype="bfloat16", spare_tokens=1
  )
  _check(problem, max_q_len=1)


def test_more_queries_than_max_q_len_are_left_out():
  problem = cases.make(kv_lens=[40, 9], q_lens=[3, 2], dtype="bfloat16")
  out, lse = _run(problem, max_q_len=2)
  expected, expected_lse = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), **cases.PLAIN
  )
  expected[2], expected_lse[2] = 0, -np.inf
  cases.assert_matches(out, lse, expected, expected_lse, "bfloat16")


def test_no_sequences_and_no_tokens_are_fine():
  problem = cases.make(kv_lens=[9], dtype="bfloat16")
  q, k, v, kv_lens, table, _, _ = problem.args()
  nobody = kv_lens[:0], table[:0], jnp.zeros(1, jnp.int32), jnp.int32(0)
  options = dict(max_q_len=2, sinks=None, **cases.PLAIN)
  for queries in (q, q[:0]):
    out, lse = short_queries.attend(queries, k, v, *nobody, **options)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert lse.shape == queries.shape[:2]


def test_says_what_it_does_not_take():
  shapes = dict(
    head_dim=64, page_size=16, num_q_heads=8, num_kv_heads=1, dtype="bfloat16"
  )
  why_not = lambda **more: str(decode_config.unsupported(**shapes | more))
  assert why_not(max_q_len=8) == "None"
  assert "max_q_len=9" in why_not(max_q_len=9)
  assert "group=16" in why_not(max_q_len=8, num_q_heads=16)
  assert "num_q_heads=3" in why_not(max_q_len=2, num_q_heads=3, num_kv_heads=2)
  problem = cases.make(kv_lens=[9], dtype="bfloat16")
  with pytest.raises(NotImplementedError, match="max_q_len=9"):
    _run(problem, max_q_len=9)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("max_q_len", [0, -1, 2.0, True])
def test_the_op_refuses_a_bad_max_q_len(max_q_len):
  problem = cases.make(kv_lens=[9], dtype="bfloat16")
  with pytest.raises(ValueError, match="max_q_len="):
    paged_jax.ragged_paged_attention(*problem.args(), max_q_len=max_q_len)


@pytest.mark.gpu
def test_the_op_takes_the_kernel():
  problem = cases.make(
    kv_lens=[40, 900, 3000], q_lens=[2, 4, 3], dtype="bfloat16"
  )
  args = problem.args()
  out = paged_jax.ragged_paged_attention(
    *args, max_q_len=4, implementation="mosaic_gpu"
  )
  expected, _ = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), scale=64**-0.5
  )
  assert cases.relative_error(out, expected) < cases.TOLERANCE["bfloat16"]
