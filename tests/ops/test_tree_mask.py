"""Visibility among the new tokens of a step: tree masks, and no mask at all."""

import dataclasses

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax

pytestmark = pytest.mark.slow(quick=1)

RUNS = [
  pytest.param("xla", "float32", id="xla-float32"),
  pytest.param("xla", "bfloat16", id="xla-bfloat16"),
  pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.gpu, id="mosaic-bf"),
  pytest.param("mosaic_gpu", "float16", marks=pytest.mark.gpu, id="mosaic-f16"),
]
SINKS = np.linspace(-1, 3, 6).astype(np.float32)
OPTIONS = {
  "plain": {},
  "window_of_one": dict(sliding_window=1),
  "window_and_sink_tokens": dict(
    sliding_window=3, num_sink_tokens=18, sinks=SINKS
  ),
  "all": dict(
    scale=0.2,
    sliding_window=33,
    num_sink_tokens=4,
    logits_soft_cap=2.0,
    sinks=SINKS,
  ),
}
# No query, no context, and new tokens across the ends of pages and tiles.
FEW = dict(
  q_lens=[0, 1, 5, 8, 4, 7, 1, 3], kv_lens=[9, 1, 5, 20, 130, 66, 64, 300]
)
MANY = dict(q_lens=[40, 0, 1, 70, 64, 13], kv_lens=[40, 9, 33, 200, 300, 150])


def _make(**options):
  return cases.make(**dict(num_q_heads=6, num_active=None) | options)


def _random_mask(problem, max_new=None, seed=0):
  """Returns a random mask, in which some tokens see no new token."""
  rng = np.random.default_rng(seed)
  max_new = max_new or int(np.diff(problem.cu_q_lens).max())
  mask = rng.random((len(problem.q), max_new)) < rng.random((len(problem.q), 1))
  mask[::5] = False
  return mask


def _chains(problem, window):
  """Returns the mask in which each token sees itself and those before it."""
  max_new = int(np.diff(problem.cu_q_lens).max())
  mask = np.zeros((len(problem.q), max_new), bool)
  for start, end in zip(
    problem.cu_q_lens[:-1], problem.cu_q_lens[1:], strict=True
  ):
    chain = np.tri(end - start, max_new, dtype=bool)
    mask[start:end] = np.triu(chain, 1 - (window or max_new))
  return mask


def _run(problem, implementation, *, max_q_len=None, **options):
  options = {
    name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    for name, x in options.items()
  }
  out, lse = paged_jax.ragged_paged_attention(
    *problem.args(),
    return_lse=True,
    max_q_len=max_q_len,
    implementation=implementation,
    **options,
  )
  return np.asarray(out), np.asarray(lse)


def _check(problem, implementation, *, max_q_len=None, **options):
  out, lse = _run(problem, implementation, max_q_len=max_q_len, **options)
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), **options
  )
  cases.assert_matches(out, lse, *expected, problem.q.dtype)


def _poison(problem, seq, columns):
  """Fills K and V of new tokens of a sequence with NaN."""
  problem = dataclasses.replace(
    problem,
    k_pages=np.array(problem.k_pages),
    v_pages=np.array(problem.v_pages),
  )
  q_len = problem.cu_q_lens[seq + 1] - problem.cu_q_lens[seq]
  page_size = problem.k_pages.shape[2]
  for position in problem.kv_lens[seq] - q_len + np.asarray(columns):
    page = problem.page_indices[seq, position // page_size]
    for pages in (problem.k_pages, problem.v_pages):
      pages[page, :, position % page_size] = np.nan
  return problem


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("max_q_len", [8, None])
def test_a_tree_mask_matches_oracle(implementation, dtype, options, max_q_len):
  lens = FEW if max_q_len else MANY
  problem = _make(**lens, dtype=dtype, spare_tokens=3)
  mask = _random_mask(problem)
  _check(
    problem, implementation, max_q_len=max_q_len, tree_mask=mask, **options
  )


# The window of every token begins one tile after the first new token's tile.
@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize(("q_len", "max_q_len"), [(8, 8), (110, None)])
def test_a_window_does_not_bound_new_tokens(
  implementation, dtype, q_len, max_q_len
):
  problem = _make(kv_lens=[252 + q_len], q_lens=[q_len], dtype=dtype)
  mask = np.ones((q_len, q_len), bool)
  options = dict(sliding_window=1, tree_mask=mask, max_q_len=max_q_len)
  _check(problem, implementation, **options)


# Fewer columns than query tokens, a word of bits or two of them, and more.
@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_new", [1, 31, 33, 100])
def test_a_mask_of_any_width_matches_oracle(implementation, dtype, max_new):
  problem = _make(**MANY, dtype=dtype, num_q_heads=2)
  mask = _random_mask(problem, max_new)
  _check(problem, implementation, tree_mask=mask)
  problem = _make(**FEW, dtype=dtype, num_q_heads=2)
  mask = _random_mask(problem, max_new)
  _check(problem, implementation, tree_mask=mask, max_q_len=8)


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_q_len", [8, None])
def test_holes_inactive_and_refused_sequences_are_fine(
  implementation, dtype, max_q_len
):
  problem = _make(
    # As for refused rows, the tokens of the first two were not stored.
    kv_lens=[0, 3, 90, 70, 50],
    q_lens=[5, 6, 7, 4, 3],
    num_active=4,
    spare_tokens=2,
    dtype=dtype,
  )
  num_pages = len(problem.k_pages)
  problem.page_indices[2, [0, 5]] = -1, num_pages  # a new token's page too
  problem.page_indices[3, 2] = num_pages + 100
  run = dict(max_q_len=max_q_len, tree_mask=_random_mask(problem, 9))
  _check(problem, implementation, **run)
  _check(problem, implementation, **run, sliding_window=40, num_sink_tokens=3)
  assert not _run(problem, implementation, **run)[0][22:].any()


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[1:3])
def test_a_tree_over_quantised_pages_matches_oracle(
  implementation, dtype, kv_dtype
):
  problem, scales = cases.quantise(_make(**FEW, dtype=dtype), kv_dtype)
  mask = _random_mask(problem)
  _check(problem, implementation, max_q_len=8, tree_mask=mask, **scales)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_q_len", [8, None])
def test_a_chain_is_causal(implementation, dtype, max_q_len, window):
  lens = FEW if max_q_len else MANY
  problem = _make(**lens, dtype=dtype, spare_tokens=1)
  # Otherwise a kernel may split the two differently and round other sums.
  options = dict(max_q_len=max_q_len, batch_invariant=True)
  options |= dict(sliding_window=window)
  mask = _chains(problem, window)
  cases.assert_same_bits(
    _run(problem, implementation, **options),
    _run(problem, implementation, **options, tree_mask=mask),
  )


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_q_len", [8, None])
def test_columns_past_the_query_tokens_are_ignored(
  implementation, dtype, max_q_len
):
  problem = _make(**FEW, dtype=dtype)
  options = dict(max_q_len=max_q_len, sliding_window=9)
  mask = _random_mask(problem, 40)
  full = mask.copy()
  for start, end in zip(
    problem.cu_q_lens[:-1], problem.cu_q_lens[1:], strict=True
  ):
    full[start:end, end - start :] = True
  cases.assert_same_bits(
    _run(problem, implementation, tree_mask=mask, **options),
    _run(problem, implementation, tree_mask=full, **options),
  )


@pytest.mark.parametrize("options", [{}, dict(sliding_window=9)], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_q_len", [8, None])
def test_a_new_token_that_none_sees_leaves_no_trace(
  implementation, dtype, max_q_len, options
):
  problem = _make(**FEW, dtype=dtype)
  options = options | dict(max_q_len=max_q_len)
  mask = _random_mask(problem)
  poisoned = problem
  for seq, columns in [(2, [0]), (3, [2, 7]), (4, range(4)), (5, [5])]:
    start, end = problem.cu_q_lens[seq : seq + 2]
    mask[start:end, columns] = False
    poisoned = _poison(poisoned, seq, columns)
  clean = _run(problem, implementation, tree_mask=mask, **options)
  assert np.isfinite(clean[0].astype(np.float32)).all()
  cases.assert_same_bits(
    clean, _run(poisoned, implementation, tree_mask=mask, **options)
  )


@pytest.mark.parametrize(("implementation", "dtype"), RUNS[::2])
@pytest.mark.parametrize("max_q_len", [8, None])
def test_every_query_sees_all_keys_if_not_causal(
  implementation, dtype, max_q_len
):
  lens = FEW if max_q_len else MANY
  problem = _make(**lens, dtype=dtype, spare_tokens=3)
  num_pages = len(problem.k_pages)
  problem.page_indices[3, 1] = num_pages
  options = dict(causal=False, max_q_len=max_q_len, logits_soft_cap=3.0)
  _check(problem, implementation, **options, sinks=SINKS)


@pytest.mark.parametrize(
  ("implementation", "dtype", "max_q_len"),
  [
    pytest.param("xla", "float32", None, id="xla"),
    pytest.param(
      "mosaic_gpu", "bfloat16", 8, marks=pytest.mark.gpu, id="mosaic-few"
    ),
  ],
)
def test_slopes_know_where_queries_stand_if_not_causal(
  implementation, dtype, max_q_len
):
  problem = _make(**FEW, dtype=dtype)
  slopes = np.asarray([1, 0.3, 0.1, 0.03, -0.01, 0], np.float32)
  options = dict(causal=False, alibi_slopes=slopes, sinks=SINKS)
  _check(problem, implementation, max_q_len=max_q_len, **options)


BAD_OPTIONS = {
  "causal as a number": (dict(causal=0), "causal=0 must be"),
  "window": (
    dict(causal=False, sliding_window=4),
    "sliding_window=4 must be None with causal=False",
  ),
  "both": (
    dict(causal=False, tree_mask=jnp.ones((5, 3), bool)),
    "tree_mask must be None with causal=False",
  ),
  "slopes": (
    dict(tree_mask=jnp.ones((5, 3), bool), alibi_slopes=jnp.ones(4)),
    "alibi_slopes must be None with a tree_mask",
  ),
  "list": (dict(tree_mask=[[True]] * 5), "tree_mask must be an array"),
  "dtype": (dict(tree_mask=jnp.ones((5, 3), jnp.int32)), "dtype=int32"),
  "rank": (dict(tree_mask=jnp.ones(5, bool)), r"shape=\(5,\) must be \(5, "),
  "rows": (dict(tree_mask=jnp.ones((4, 3), bool)), r"shape=\(4, 3\) must"),
  "columns": (dict(tree_mask=jnp.ones((5, 0), bool)), r"shape=\(5, 0\) must"),
}


@pytest.mark.quick
@pytest.mark.parametrize(
  ("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_options_are_named(options, message):
  problem = cases.make(kv_lens=[5, 40], q_lens=[2, 3])
  with pytest.raises(ValueError, match=message):
    paged_jax.ragged_paged_attention(*problem.args(), **options)
