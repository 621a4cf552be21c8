import dataclasses
import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import LENS, OPTIONS

import paged_jax

# Dtypes that each implementation supports.
RUNS = [
  pytest.param("xla", "float32", id="xla-float32"),
  pytest.param("xla", "bfloat16", id="xla-bfloat16"),
  pytest.param("xla", "float16", id="xla-float16"),
  pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.gpu, id="mosaic-bf"),
  pytest.param("mosaic_gpu", "float16", marks=pytest.mark.gpu, id="mosaic-f16"),
]


def _sinks(num_q_heads):
  return np.linspace(-1, 3, num_q_heads).astype(np.float32)


def _alibi_slopes(num_q_heads):
  slopes = 2.0 ** -np.linspace(1, 8, num_q_heads)
  slopes[1] *= -1
  return slopes.astype(np.float32)


# Options that are arrays, for 8 heads.
ARRAYS = {
  "no_arrays": {},
  "sinks_and_alibi": dict(sinks=_sinks(8), alibi_slopes=_alibi_slopes(8)),
}


def _check_decode(problem, implementation, **options):
  args = problem.decode_args()
  out, lse = paged_jax.paged_attention(
    *args,
    return_lse=True,
    implementation=implementation,
    **cases.on_device(options),
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  numpy_args = dataclasses.astuple(problem)[:5]
  expected = oracle.paged_attention(*numpy_args, **options)
  cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


def _check_ragged(problem, implementation=None, **options):
  out, lse = paged_jax.ragged_paged_attention(
    *problem.args(),
    return_lse=True,
    implementation=implementation,
    **cases.on_device(options),
  )
  assert out.dtype == problem.q.dtype
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), **options
  )
  cases.assert_matches(out, lse, *expected, problem.k_pages.dtype)


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1), (16, 1)])
def test_decode_matches_oracle_for_shapes(
  implementation, dtype, head_dim, heads
):
  num_q_heads, num_kv_heads = heads
  problem = cases.make(
    kv_lens=LENS,
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  _check_decode(problem, implementation)


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_decode_matches_oracle_for_page_sizes(implementation, dtype, page_size):
  edges = [page_size - 1, page_size, page_size + 1, 3 * page_size]
  problem = cases.make(kv_lens=[0, 1, *edges], page_size=page_size, dtype=dtype)
  _check_decode(problem, implementation)


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decode_matches_oracle_for_options(
  implementation, dtype, arrays, options
):
  problem = cases.make(kv_lens=LENS, num_q_heads=8, dtype=dtype)
  _check_decode(problem, implementation, **arrays, **options)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_decode_skips_holes_wherever_they_are(implementation, dtype):
  problem = cases.make(kv_lens=[300, 300, 300, 40, 16], dtype=dtype)
  num_pages = problem.k_pages.shape[0]
  for seq, column in [(0, 2), (0, 3), (1, 0), (1, 9), (1, 18), (4, 0)]:
    problem.page_indices[seq, column] = num_pages
  problem.page_indices[2, 5] = -1
  problem.page_indices[2, 6] = num_pages + 1000
  _check_decode(problem, implementation)
  arrays = dict(sinks=_sinks(4), alibi_slopes=_alibi_slopes(4))
  _check_decode(problem, implementation, sliding_window=150, **arrays)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_matches_oracle_for_shapes(dtype, head_dim, heads):
  num_q_heads, num_kv_heads = heads
  problem = cases.make(
    kv_lens=[0, 1, 15, 16, 17, 40, 300],
    q_lens=[0, 1, 15, 7, 1, 33, 65],
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  _check_ragged(problem)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_ragged_matches_oracle_for_page_sizes(page_size):
  kv_lens = [page_size - 1, page_size, page_size + 1, 3 * page_size, 5]
  q_lens = [page_size - 1, 1, 3, 2 * page_size, 0]
  _check_ragged(cases.make(kv_lens=kv_lens, q_lens=q_lens, page_size=page_size))


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_matches_oracle_for_options(arrays, options):
  problem = cases.make(
    kv_lens=[0, 1, 40, 300, 70, 33],
    q_lens=[0, 1, 40, 130, 1, 16],
    num_q_heads=8,
  )
  _check_ragged(problem, **arrays, **options)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[1:4:2])
@pytest.mark.parametrize("slopes_dtype", ["bfloat16", "float16"])
def test_slopes_may_be_of_any_float_dtype(implementation, dtype, slopes_dtype):
  slopes = np.asarray(jnp.asarray(_alibi_slopes(4), slopes_dtype))
  problem = cases.make(kv_lens=LENS, dtype=dtype)
  _check_decode(problem, implementation, alibi_slopes=slopes)
  _check_ragged(problem, implementation, alibi_slopes=slopes)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS[:1] + RUNS[3:4])
def test_slopes_of_any_size_and_distance_leave_no_nan(implementation, dtype):
  problem = cases.make(kv_lens=[0, 1, 300, 300], dtype=dtype)
  problem.page_indices[3, 17:] = problem.k_pages.shape[0]
  slopes = np.asarray([3e38, -3e38, 2.0**95, -1e30], np.float32)
  attend = functools.partial(
    paged_jax.paged_attention,
    alibi_slopes=jnp.asarray(slopes),
    return_lse=True,
    implementation=implementation,
  )
  out, lse = attend(*problem.decode_args())
  # A single key has all the weight: the nearest, or the farthest.
  expected, _ = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], alibi_slopes=slopes
  )
  assert cases.relative_error(out, expected) < cases.TOLERANCE[dtype]
  assert np.isfinite(np.asarray(lse[1:])).all()
  problem.kv_lens[3] = 2**31 - 1
  for x in attend(*problem.decode_args()):
    assert np.isfinite(np.asarray(x[1:], np.float32)).all()


@pytest.mark.slow
def test_ragged_matches_oracle_with_many_blocks():
  problem = cases.make(
    kv_lens=[700, 1, 260, 129, 64, 64, 3, 900],
    q_lens=[600, 1, 257, 128, 64, 1, 3, 127],
    num_q_heads=2,
    num_kv_heads=1,
  )
  _check_ragged(problem)


def test_ragged_ignores_inactive_sequences_and_padding_tokens():
  problem = cases.make(
    kv_lens=[40, 20, 33], q_lens=[4, 20, 7], num_active=2, spare_tokens=9
  )
  _check_ragged(problem)
  out = paged_jax.ragged_paged_attention(*problem.args())
  assert not np.asarray(out)[24:].any()


def test_ragged_query_longer_than_its_context_sees_nothing_before_it():
  # As for a refused row, the tokens were never stored.
  problem = cases.make(kv_lens=[0, 3, 20], q_lens=[5, 6, 4])
  _check_ragged(problem)


def test_an_empty_batch_gives_an_empty_output():
  q, k_pages, v_pages, kv_lens, table = cases.make(kv_lens=[5]).decode_args()
  out, lse = paged_jax.paged_attention(
    q[:0], k_pages, v_pages, kv_lens[:0], table[:0], return_lse=True
  )
  assert out.shape == (0, 4, 64)
  assert lse.shape == (0, 4)


@pytest.mark.parametrize("kv_len", [49, 10**6, 2**31 - 1])
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[:1] + RUNS[3:4])
def test_a_length_beyond_the_table_sees_all_of_it(
  implementation, dtype, kv_len
):
  problem = cases.make(kv_lens=[48, 5], dtype=dtype)
  problem.page_indices[0, 3] = problem.k_pages.shape[0]
  expected = paged_jax.paged_attention(
    *problem.decode_args(), implementation=implementation
  )
  problem.kv_lens[0] = kv_len
  out = paged_jax.paged_attention(
    *problem.decode_args(), implementation=implementation
  )
  np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


def test_ragged_without_tokens_gives_an_empty_output():
  problem = cases.make(kv_lens=[5, 6], q_lens=[0, 0])
  out, lse = paged_jax.ragged_paged_attention(*problem.args(), return_lse=True)
  assert out.shape == (0, 4, 64)
  assert lse.shape == (0, 4)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[:2] + RUNS[3:4])
def test_unread_memory_leaves_no_trace(implementation, dtype, poison):
  build = dict(kv_lens=LENS, dtype=dtype, page_size=64)
  run = lambda problem: paged_jax.paged_attention(
    *problem.decode_args(), return_lse=True, implementation=implementation
  )
  clean = run(cases.make(**build, poison=0.0))
  dirty = run(cases.make(**build, poison=poison))
  cases.assert_same_bits(clean, dirty)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_unread_memory_leaves_no_trace_in_a_ragged_batch(poison):
  build = dict(
    kv_lens=[17, 40, 64], q_lens=[17, 3, 1], num_active=2, spare_tokens=3
  )
  run = lambda problem: paged_jax.ragged_paged_attention(
    *problem.args(), return_lse=True
  )
  clean = run(cases.make(**build, poison=0.0))
  dirty = run(cases.make(**build, poison=poison))
  cases.assert_same_bits(clean, dirty)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS[:1] + RUNS[3:4])
def test_output_does_not_depend_on_page_order(implementation, dtype):
  problem = cases.make(kv_lens=LENS, dtype=dtype)
  num_pages = problem.k_pages.shape[0]
  order = np.random.default_rng(5).permutation(num_pages)
  moved = dataclasses.replace(
    problem,
    k_pages=problem.k_pages[order],
    v_pages=problem.v_pages[order],
    page_indices=np.append(np.argsort(order), num_pages)[
      problem.page_indices
    ].astype(np.int32),
  )
  run = lambda p: paged_jax.paged_attention(
    *p.decode_args(), implementation=implementation
  )
  np.testing.assert_array_equal(
    np.asarray(run(problem)), np.asarray(run(moved))
  )


@pytest.mark.parametrize(("implementation", "dtype"), RUNS[:1] + RUNS[3:4])
def test_two_runs_are_bitwise_equal(implementation, dtype):
  problem = cases.make(kv_lens=LENS, dtype=dtype)
  run = lambda: paged_jax.paged_attention(
    *problem.decode_args(), return_lse=True, implementation=implementation
  )
  cases.assert_same_bits(run(), run())


class VariantsTest(chex.TestCase):
  """Runs the ops, which are jitted themselves, inside another jit."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_paged_attention(self):
    problem = cases.make(kv_lens=LENS)
    out, lse = self.variant(
      functools.partial(paged_jax.paged_attention, return_lse=True)
    )(*problem.decode_args())
    chex.assert_shape(out, (len(LENS), 4, 64))
    chex.assert_type([out, lse], jnp.float32)
    expected = oracle.paged_attention(*dataclasses.astuple(problem)[:5])
    cases.assert_matches(out, lse, *expected, "float32")

  @chex.variants(with_jit=True, without_jit=True)
  def test_ragged_paged_attention(self):
    problem = cases.make(kv_lens=[1, 17, 40], q_lens=[1, 17, 5])
    out, lse = self.variant(
      functools.partial(paged_jax.ragged_paged_attention, return_lse=True)
    )(*problem.args())
    chex.assert_shape(lse, (23, 4))
    expected = oracle.ragged_paged_attention(*dataclasses.astuple(problem))
    cases.assert_matches(out, lse, *expected, "float32")


@pytest.mark.slow
def test_without_jit_at_all_the_op_is_the_same():
  problem = cases.make(kv_lens=[1, 17])
  with jax.disable_jit():
    out, lse = paged_jax.paged_attention(
      *problem.decode_args(), return_lse=True, implementation="xla"
    )
  expected = oracle.paged_attention(*dataclasses.astuple(problem)[:5])
  cases.assert_matches(out, lse, *expected, "float32")


def test_temporary_memory_does_not_grow_with_the_context():
  def temporary_bytes(pages_per_seq):
    shapes = (
      jax.ShapeDtypeStruct((64, 8, 64), jnp.float32),
      jax.ShapeDtypeStruct((64, 2, 16, 64), jnp.float32),
      jax.ShapeDtypeStruct((64, 2, 16, 64), jnp.float32),
      jax.ShapeDtypeStruct((64,), jnp.int32),
      jax.ShapeDtypeStruct((64, pages_per_seq), jnp.int32),
    )
    run = jax.jit(
      lambda *args: paged_jax.paged_attention(*args, implementation="xla")
    )
    memory = run.lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary_bytes(4096) == temporary_bytes(64)
