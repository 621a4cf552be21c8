"""Attention over quantised pages, compared with the dequantised float64."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import LENS, OPTIONS

import paged_jax
from paged_jax.kv import pool as kv_pool

pytestmark = pytest.mark.slow(quick=1)

DTYPES = ("int8", "float8_e4m3fn")
# Largest error that quantisation itself causes for normal numbers.
WORST = dict(int8=0.012, float8_e4m3fn=0.045)

both = pytest.mark.parametrize("kv_dtype", DTYPES)
queries = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def _sinks(num_q_heads):
  return np.linspace(-1, 3, num_q_heads).astype(np.float32)


def _jax(scales):
  return {name: jnp.asarray(x) for name, x in scales.items()}


def _decode(problem, scales, **options):
  return paged_jax.paged_attention(
    *problem.decode_args(), **_jax(scales), return_lse=True, **options
  )


def _ragged(problem, scales, **options):
  return paged_jax.ragged_paged_attention(
    *problem.args(), **_jax(scales), return_lse=True, **options
  )


def _check(problem, scales, *, sinks=None, **options):
  """Compares with the oracle; runs decode if each sequence has one query."""
  arrays = dataclasses.astuple(problem)
  op, judge = _ragged, oracle.ragged_paged_attention
  if len(problem.q) == problem.num_active == len(problem.kv_lens):
    op, judge, arrays = _decode, oracle.paged_attention, arrays[:5]
  given = None if sinks is None else jnp.asarray(sinks)
  out, lse = op(problem, scales, sinks=given, **options)
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  if op is _ragged and cases.ON_HOPPER and problem.q.dtype != np.float32:
    # The kernel rounds dequantised keys and values to 16 bits.
    arrays, scales = dataclasses.astuple(cases.dequantise(problem, scales)), {}
  expected = judge(*arrays, **scales, sinks=sinks, **options)
  cases.assert_matches(out, lse, *expected, problem.q.dtype)


@both
@queries
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
def test_decode_matches_oracle_for_shapes(kv_dtype, dtype, heads):
  num_q_heads, num_kv_heads = heads
  for head_dim in (64, 128):
    problem = cases.make(
      kv_lens=LENS,
      num_q_heads=num_q_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      dtype=dtype,
    )
    _check(*cases.quantise(problem, kv_dtype))


@both
@pytest.mark.parametrize("page_size", [8, 64, 256])
def test_decode_matches_oracle_for_page_sizes(kv_dtype, page_size):
  edges = [page_size - 1, page_size, page_size + 1, 3 * page_size]
  problem = cases.make(kv_lens=[0, 1, *edges], page_size=page_size)
  _check(*cases.quantise(problem, kv_dtype))


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decode_matches_oracle_for_options(kv_dtype, dtype, options):
  problem = cases.make(kv_lens=LENS, num_q_heads=8, dtype=dtype)
  problem, scales = cases.quantise(problem, kv_dtype)
  _check(problem, scales, **options)
  _check(problem, scales, sinks=_sinks(8), **options)


@both
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_matches_oracle_for_options(kv_dtype, dtype, options):
  problem = cases.make(
    kv_lens=[0, 1, 40, 300, 70, 33],
    q_lens=[0, 1, 40, 130, 1, 16],
    num_q_heads=8,
    dtype=dtype,
  )
  problem, scales = cases.quantise(problem, kv_dtype)
  _check(problem, scales, sinks=_sinks(8), **options)


@both
def test_holes_and_padding_are_skipped(kv_dtype):
  problem = cases.make(kv_lens=[300, 300, 40], num_active=2)
  problem.page_indices[0, 2] = problem.k_pages.shape[0]
  problem.page_indices[1, 0] = -1
  _check(*cases.quantise(problem, kv_dtype))


@both
@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1e4, 1e30])
def test_rows_of_v_may_be_of_any_magnitude(kv_dtype, magnitude):
  problem = cases.make(kv_lens=LENS)
  rows = problem.v_pages * np.float32(magnitude)
  _check(*cases.quantise(dataclasses.replace(problem, v_pages=rows), kv_dtype))


@both
def test_float16_queries_do_not_narrow_the_scales_of_v(kv_dtype):
  problem = cases.make(kv_lens=LENS, dtype="float16")
  rows = problem.v_pages.astype(np.float32) * np.float32(1e-5)
  # One row is a thousand times larger than the others.
  page, offset = problem.page_indices[-1, 3], 5
  rows[page, :, offset] *= 1000
  problem = dataclasses.replace(problem, v_pages=rows)
  _check(*cases.quantise(problem, kv_dtype))


@both
@pytest.mark.parametrize("op", [_decode, _ragged])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unread_data_and_scales_leave_no_trace(kv_dtype, op, poison, dtype):
  build = dict(kv_lens=LENS, dtype=dtype, page_size=64)
  if op is _ragged:
    build |= dict(q_lens=[0, 1, 9, 1, 17, 3, 150], num_active=6, spare_tokens=3)
  clean, dirty = (
    op(*cases.quantise(cases.make(**build, poison=value), kv_dtype))
    for value in (0.0, poison)
  )
  cases.assert_same_bits(clean, dirty)


@both
def test_a_seen_row_that_was_not_finite_shows(kv_dtype):
  problem, scales = cases.quantise(cases.make(kv_lens=[20, 20]), kv_dtype)
  page = problem.page_indices[0, 1]
  for name in ("k_scales", "v_scales"):
    spoilt = scales[name].copy()
    spoilt[page, 1, 2] = np.nan
    out, _ = _decode(problem, scales | {name: spoilt})
    bad = ~np.isfinite(np.asarray(out)).all(-1)
    assert bad.tolist() == [[False, False, True, True], [False] * 4]


@both
def test_two_runs_are_bitwise_equal(kv_dtype):
  quantised = cases.quantise(cases.make(kv_lens=LENS), kv_dtype)
  cases.assert_same_bits(_decode(*quantised), _decode(*quantised))


@pytest.mark.slow
@both
def test_no_wide_pool_is_ever_made(kv_dtype):
  def temporary_bytes(num_pages):
    pages = jax.ShapeDtypeStruct((num_pages, 2, 16, 64), jnp.dtype(kv_dtype))
    scales = jax.ShapeDtypeStruct((num_pages, 2, 16), jnp.float32)
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    q = jax.ShapeDtypeStruct((8, 8, 64), jnp.bfloat16)

    def run(q, pages, scales, lens, table, offsets):
      options = dict(k_scales=scales, v_scales=scales, implementation="xla")
      paged = (q, pages, pages, lens, table)
      return (
        paged_jax.paged_attention(*paged, **options),
        paged_jax.ragged_paged_attention(*paged, offsets, 8, **options),
      )

    lowered = jax.jit(run).lower(q, pages, scales, i32(8), i32(8, 64), i32(9))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  # The layout on a GPU differs by some bytes; a float16 pool has 17 million.
  assert abs(temporary_bytes(4096) - temporary_bytes(64)) < 4096


def _error_by_length(kv_dtype, seed, page_size=16, base=80):
  """Returns the error of a sequence of each length modulo the page size."""
  exact = cases.make(
    kv_lens=[base + r for r in range(page_size)],
    page_size=page_size,
    num_q_heads=8,
    seed=seed,
  )
  expected, _ = oracle.paged_attention(*dataclasses.astuple(exact)[:5])
  out, _ = _decode(*cases.quantise(exact, kv_dtype))
  norm = lambda x: np.linalg.norm(x, axis=(1, 2))
  return norm(np.asarray(out, np.float64) - expected) / norm(expected)


@pytest.mark.slow
@both
def test_the_error_is_the_same_for_every_length_modulo_the_page_size(kv_dtype):
  errors = [_error_by_length(kv_dtype, seed) for seed in range(6)]
  mean = np.mean(errors, axis=0)
  assert mean.max() / np.median(mean) < 1.2
  assert mean.min() / np.median(mean) > 0.8
  assert mean.max() < WORST[kv_dtype]


@pytest.mark.slow
@both
def test_131072_tokens_are_as_accurate_as_few(kv_dtype):
  num_tokens, head_dim = 131_072, 64
  rng = np.random.default_rng(0)
  k, v = rng.standard_normal((2, num_tokens, 1, head_dim)).astype(np.float32)
  order = rng.permutation(num_tokens // 16)
  slots = (order[:, None] * 16 + np.arange(16)).reshape(-1)
  pool = kv_pool.init(num_tokens // 16, 1, 1, 16, head_dim, jnp.dtype(kv_dtype))
  pool = kv_pool.write(
    pool, 0, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots, jnp.int32)
  )
  for dtype in ("float32", "bfloat16"):
    q = jnp.asarray(rng.standard_normal((1, 2, head_dim)), dtype)
    out = paged_jax.paged_attention(
      q,
      pool.k[:, 0],
      pool.v[:, 0],
      jnp.asarray([num_tokens], jnp.int32),
      jnp.asarray(order[None], jnp.int32),
      k_scales=pool.k_scales[:, 0],
      v_scales=pool.v_scales[:, 0],
    )
    stored = _attend_to_all(q, *_dequantised(pool, slots))
    assert cases.relative_error(out[0], stored) < cases.TOLERANCE[dtype]
    exact = _attend_to_all(q, k, v)
    assert cases.relative_error(out[0], exact) < WORST[kv_dtype]


def _attend_to_all(q, k, v):
  visible, scale = np.ones(len(k), bool), q.shape[-1] ** -0.5
  out, _ = oracle.attend_one(np.asarray(q[0]), k, v, visible, scale=scale)
  return out


def _dequantised(pool, slots):
  """Returns K and V [num_tokens, 1, head_dim] of one layer, in float64."""
  rows = lambda data, scales: (
    np.asarray(data, np.float64).reshape(-1, 1, data.shape[-1])
    * np.asarray(scales, np.float64).reshape(-1, 1, 1)
  )
  k, v = rows(pool.k, pool.k_scales), rows(pool.v, pool.v_scales)
  return k[slots], v[slots]


BAD = {
  "no scales": (dict(k_scales=None), "k_scales must be an array"),
  "no scales of v": (dict(v_scales=None), "v_scales must be an array"),
  "dtype": (
    dict(v_scales=lambda x: x.astype(jnp.bfloat16)),
    "v_scales.dtype=bfloat16 must be float32",
  ),
  "shape": (dict(k_scales=lambda x: x[:, :1]), "k_scales.shape="),
  "no array": (dict(k_scales=lambda x: [1.0]), "k_scales must be an array"),
  "v unlike k": (
    dict(v_pages=lambda x: x.astype(jnp.float8_e4m3fn)),
    "v_pages.dtype=float8_e4m3fn must equal k_pages.dtype=",
  ),
  "queries": (dict(q=lambda x: x.astype(jnp.int8)), "q.dtype=int8"),
  "float pages": (
    dict.fromkeys(["k_pages", "v_pages"], lambda x: x.astype(jnp.float32)),
    "k_scales must be None",
  ),
  "other pages": (
    dict(k_pages=lambda x: x.astype(jnp.float8_e5m2)),
    "k_pages.dtype=float8_e5m2 must be bfloat16",
  ),
}


@pytest.mark.quick
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_scales_and_dtypes_are_named(changes, message):
  problem, scales = cases.quantise(cases.make(kv_lens=[5, 40]), "int8")
  names = ("q", "k_pages", "v_pages", "kv_lens", "page_indices")
  arguments = dict(zip(names, problem.decode_args(), strict=True))
  arguments |= _jax(scales)
  for name, change in changes.items():
    arguments[name] = None if change is None else change(arguments[name])
  with pytest.raises(ValueError, match=message):
    paged_jax.paged_attention(**arguments)
  offsets = jnp.arange(3, dtype=jnp.int32)
  with pytest.raises(ValueError, match=message):
    paged_jax.ragged_paged_attention(
      **arguments, cu_q_lens=offsets, num_active=2
    )
