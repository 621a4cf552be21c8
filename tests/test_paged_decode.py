"""The decode kernel: on a Hopper GPU as it is, elsewhere interpreted."""

import dataclasses

import cases
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from paged_jax import devices
from pallas_kernels import paged_decode
from pallas_kernels.paged_decode import Config

ON_HOPPER = devices.why_not_hopper() is None
INTERPRET = None if ON_HOPPER else plgpu.InterpretGPUParams()
PLAIN = dict(
  scale=0.125, sliding_window=None, num_sink_tokens=0, logits_soft_cap=None
)


def _make(kv_lens, *, dtype="bfloat16", **options):
  options = dict(num_q_heads=4, num_kv_heads=1) | options
  return cases.make(kv_lens=kv_lens, dtype=dtype, **options)


def _run(problem, *, config=None, sinks=None, **options):
  out, lse = paged_decode.paged_decode(
    *problem.decode_args(),
    sinks=None if sinks is None else jnp.asarray(sinks),
    config=config,
    interpret=INTERPRET,
    **PLAIN | options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  return np.asarray(out), np.asarray(lse)


def _check(problem, *, config=None, sinks=None, **options):
  out, lse = _run(problem, config=config, sinks=sinks, **options)
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], sinks=sinks, **PLAIN | options
  )
  cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


def _assert_same_bits(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", None),
    (64, (9, 3), 16, "float16", Config(64, 2, 1)),
    (128, (4, 1), 16, "bfloat16", Config(64, 3, 2)),
    (128, (16, 1), 64, "float16", Config(128, 2, 2)),
    (128, (4, 1), 24, "bfloat16", Config(64, 2, 1)),
    (128, (4, 1), 128, "bfloat16", Config(64, 2, 3)),
    (192, (5, 1), 40, "bfloat16", None),
    (cases.HEAD_DIMS[-1], (64, 1), 16, "bfloat16", None),
  ],
)
def test_matches_oracle_for_shapes(head_dim, heads, page_size, dtype, config):
  problem = _make(
    [0, 1, page_size - 1, page_size, page_size + 1, 200],
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
    (dict(sliding_window=70), None),
    (dict(sliding_window=70, num_sink_tokens=5), [-2, 0, 1, 5]),
    (dict(sliding_window=16, num_sink_tokens=130), None),
    (dict(logits_soft_cap=1.5), None),
    (dict(logits_soft_cap=30.0, scale=4.0), [-2, 0, 1, 40]),
    ({}, [-2, 0, 1, 5]),
    (
      dict(
        scale=0.3, sliding_window=100, num_sink_tokens=64, logits_soft_cap=2.0
      ),
      [-2, 0, 1, 5],
    ),
  ],
  ids=str,
)
def test_matches_oracle_for_options(options, sinks):
  sinks = None if sinks is None else np.asarray(sinks, np.float32)
  _check(_make([0, 64, 330]), config=Config(64, 2, 2), sinks=sinks, **options)


def _pad_with_nan_pages(problem):
  """Poisons the first and the last page, which an id out of range may hit."""
  last = len(problem.k_pages)
  pad = lambda pages: np.pad(
    pages, ((1, 1), (0, 0), (0, 0), (0, 0)), constant_values=np.nan
  )
  return dataclasses.replace(
    problem,
    k_pages=pad(problem.k_pages),
    v_pages=pad(problem.v_pages),
    page_indices=np.where(
      problem.page_indices < last, problem.page_indices + 1, last + 2
    ).astype(np.int32),
  )


def test_holes_are_skipped():
  problem = _pad_with_nan_pages(_make([40, 330, 64, 300]))
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, 1] = num_pages
  table[1, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[2, :] = num_pages
  table[3, 2:6] = num_pages
  sinks = np.zeros(4, np.float32)
  config = Config(64, 2, 2)
  _check(problem, config=config, sinks=sinks)
  _check(problem, config=config, sliding_window=150, num_sink_tokens=20)


# The interpreter multiplies with NumPy, which warns of Inf - Inf.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_unused_memory_leaves_no_trace(poison):
  clean, poisoned = (
    _run(
      _make([1, 70, 201], dtype="float16", poison=filler),
      config=Config(64, 2, 2),
    )
    for filler in (0.0, poison)
  )
  _assert_same_bits(clean, poisoned)


def test_keys_left_of_the_window_leave_no_trace():
  problem = _make([300])
  options = dict(config=Config(64, 2, 1), sliding_window=100, num_sink_tokens=3)
  clean = _run(problem, **options)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  for position in range(3, 200):
    page = problem.page_indices[0, position // 16]
    problem.k_pages[page, :, position % 16] = np.nan
    problem.v_pages[page, :, position % 16] = np.nan
  _assert_same_bits(clean, _run(problem, **options))


def test_two_runs_are_bitwise_equal():
  problem = _make([7, 333])
  config = Config(64, 2, 3)
  _assert_same_bits(_run(problem, config=config), _run(problem, config=config))


@pytest.mark.parametrize("num_splits", [1, 5, 9])
def test_any_number_of_splits_matches_oracle(num_splits):
  _check(_make([64, 333]), config=Config(64, 2, num_splits))


def test_row_does_not_depend_on_its_batchmates():
  problem = _make([200, 150, 31])
  config = Config(64, 2, 2)
  together = _run(problem, config=config)
  problem.kv_lens[:] = [0, 150, 5]
  apart = _run(problem, config=config)
  _assert_same_bits([x[1] for x in together], [x[1] for x in apart])


def test_lengths_beyond_the_table_are_cut():
  problem = _make([64, 17])
  problem.page_indices = problem.page_indices[:, :4]
  expected = _run(problem)
  problem.kv_lens[0] = 1000
  _assert_same_bits(expected, _run(problem))
  problem.kv_lens[1] = -3
  out, lse = _run(problem)
  assert not out[1].any()
  assert np.isneginf(lse[1]).all()


def test_no_sequences_and_no_pages_are_fine():
  problem = _make([3, 4])
  problem.page_indices = problem.page_indices[:, :0]
  out, lse = _run(problem)
  assert not out.any()
  assert np.isneginf(lse).all()
  problem.q, problem.kv_lens = problem.q[:0], problem.kv_lens[:0]
  problem.page_indices = problem.page_indices[:0]
  out, _ = _run(problem)
  assert out.shape == (0, 4, 64)


def test_all_lengths_share_one_trace():
  problem = _make([3, 100])
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return paged_decode.paged_decode(
      *args, sinks=None, interpret=INTERPRET, **PLAIN
    )

  for kv_lens in ([0, 0], [17, 99]):
    problem.kv_lens[:] = kv_lens
    attend(*problem.decode_args())
  assert len(traces) == 1


def test_dtypes_must_agree():
  problem = _make([3])
  problem.v_pages = problem.v_pages.astype(np.float16)
  with pytest.raises(ValueError, match="must be the same"):
    _run(problem)
