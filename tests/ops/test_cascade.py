"""Attention of rows that share pages, compared with the oracle."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import prefixes
import pytest

import paged_jax
from paged_jax.ops import cascade


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.RUNS)
@pytest.mark.parametrize("num_shared", [0, 1, 5, 20])
def test_matches_oracle_for_shared_lengths(implementation, dtype, num_shared):
  problem = prefixes.make(num_shared, dtype=dtype)
  prefixes.check(problem, num_shared, implementation=implementation)
  # `num_shared` may be less than the number of pages that rows share.
  prefixes.check(problem, num_shared // 2, implementation=implementation)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
def test_matches_oracle_for_shapes(implementation, dtype, head_dim, heads):
  num_q_heads, num_kv_heads = heads
  problem = prefixes.make(
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  prefixes.check(problem, 5, implementation=implementation)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
@pytest.mark.parametrize(
  "sinks", [None, prefixes.SINKS], ids=["no_sinks", "sinks"]
)
@pytest.mark.parametrize(
  "options",
  [{}, dict(scale=0.3), dict(logits_soft_cap=1.5), dict(scale=-0.2)],
  ids=str,
)
def test_matches_oracle_for_options(implementation, dtype, sinks, options):
  prefixes.check(
    prefixes.make(dtype=dtype),
    5,
    implementation=implementation,
    sinks=sinks,
    **options,
  )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
  "sinks", [None, prefixes.SINKS], ids=["no_sinks", "sinks"]
)
def test_quantised_pages_match_oracle(implementation, dtype, kv_dtype, sinks):
  # On a GPU, each part uses the implementation that supports it.
  implementation = "xla" if implementation == "xla" else None
  problem, scales = cases.quantise(prefixes.make(dtype=dtype), kv_dtype)
  prefixes.check(
    problem, 5, implementation=implementation, sinks=sinks, **scales
  )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  "groups", [[0, 2**31 - 1], [-(2**31), 4], [4, 2], [0, 100]]
)
def test_groups_out_of_range_leave_the_result(groups):
  problem = prefixes.make(dtype="float32")
  prefixes.check(
    problem,
    5,
    implementation="xla",
    groups=groups,
  )


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_rows_that_cannot_share_attend_all_on_their_own(implementation, dtype):
  # Rows that are inactive, shorter by a page or by a token, have other pages
  # or only another last page, and one that is longer than the table.
  kv_lens = [0, 64, 79, 80, 100, 100, 83, 96]
  problem = cases.make(kv_lens=kv_lens, page_size=prefixes.PAGE, dtype=dtype)
  problem = prefixes.share(problem, {3: [4, 6, 7]}, 5)
  problem = prefixes.share(problem, {3: [1, 2, 5]}, 4)
  for num_shared in (1, 4, 5, 6, 7, 100):
    prefixes.check(
      problem, num_shared, implementation=implementation, sinks=prefixes.SINKS
    )
  beyond = dataclasses.replace(problem, kv_lens=problem.kv_lens.copy())
  beyond.kv_lens[7], beyond.kv_lens[0] = 2**31 - 1, -(2**31)
  expected = prefixes.run(problem, 5, implementation=implementation)
  cases.assert_same_bits(
    prefixes.run(beyond, 5, implementation=implementation), expected
  )


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_queries_of_a_row_that_does_not_share_leave_no_trace(
  implementation, dtype
):
  problem = cases.make(
    kv_lens=[0, 90, 85, 40], page_size=prefixes.PAGE, dtype=dtype
  )
  problem = prefixes.share(problem, {1: [2]}, 5)
  spoilt = dataclasses.replace(problem, q=problem.q.copy())
  spoilt.q[[0, 3]] = np.nan
  run = lambda p: [
    np.asarray(x) for x in prefixes.run(p, 5, implementation=implementation)
  ]
  clean, dirty = run(problem), run(spoilt)
  cases.assert_same_bits([x[:3] for x in clean], [x[:3] for x in dirty])
  assert not dirty[0][0].any()
  assert np.isnan(dirty[0][3]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_each_group_has_a_prefix_of_its_own(implementation, dtype):
  kv_lens = [80, 99, 0, 200, 160, 161, 30, 90, 33]
  problem = cases.make(kv_lens=kv_lens, page_size=prefixes.PAGE, dtype=dtype)
  problem = prefixes.share(problem, {1: [0]}, 5)
  problem = prefixes.share(problem, {3: [4, 5]}, 10)
  # The third group is empty; the last three rows are in none.
  for counts in ([5, 10, 3, 0], [2, 10, 3, 1], [4, 20, 0, 7]):
    prefixes.check(
      problem,
      jnp.asarray(counts, jnp.int32),
      groups=[0, 3, 6, 6, 6],
      implementation=implementation,
    )
  prefixes.check(problem, 5, groups=[0, 3, 6], implementation=implementation)
  prefixes.check(problem, 5, groups=[1, 4], implementation=implementation)


@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_holes_are_skipped_wherever_they_are(implementation, dtype):
  problem = prefixes.make(dtype=dtype)
  table, num_pages = problem.page_indices, len(problem.k_pages)
  table[:, 1], table[:, 4] = num_pages, -1
  table[5, [5, 7]] = num_pages + 1000, -(2**31)
  prefixes.check(
    problem, 5, implementation=implementation, sinks=prefixes.SINKS
  )
  table[:, :5] = num_pages
  prefixes.check(
    problem, 5, implementation=implementation, sinks=prefixes.SINKS
  )


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_unread_memory_leaves_no_trace(implementation, dtype, poison):
  run = lambda value: prefixes.run(
    prefixes.make(poison=value, dtype=dtype), 5, implementation=implementation
  )
  cases.assert_same_bits(run(0.0), run(poison))


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_two_runs_are_bitwise_equal(implementation, dtype, batch_invariant):
  run = lambda: prefixes.run(
    prefixes.make(dtype=dtype),
    5,
    implementation=implementation,
    batch_invariant=batch_invariant,
  )
  cases.assert_same_bits(run(), run())


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), prefixes.FEW_RUNS)
def test_batch_invariance_is_handed_to_both_parts(implementation, dtype):
  options = dict(implementation=implementation, batch_invariant=True)
  problem = prefixes.make(40, prefixes.OWN_LENS * 7, dtype=dtype)
  prefixes.check(problem, 40, implementation=implementation)
  out, lse = prefixes.run(problem, 40, **options)
  expected = prefixes.expected(problem)
  cases.assert_matches(out, lse, *expected, problem.q.dtype)
  if implementation == "xla":
    return  # invariant if its matrix products are
  rows = np.array([41, 5, 3])
  few = dataclasses.replace(
    problem,
    q=problem.q[rows],
    kv_lens=problem.kv_lens[rows],
    page_indices=problem.page_indices[rows],
  )
  cases.assert_same_bits(
    prefixes.run(few, 40, **options), (out[rows], lse[rows])
  )


def test_all_shared_lengths_share_one_program():
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return paged_jax.cascade_attention(*args, return_lse=True)

  problem = prefixes.make()
  for num_shared in (0, 3, 5):
    out, lse = attend(*problem.decode_args(), jnp.int32(num_shared))
    cases.assert_matches(out, lse, *prefixes.expected(problem), "float32")
  assert len(traces) == 1
  before = cascade._split._cache_size()
  prefixes.run(problem, 2)
  once = cascade._split._cache_size()
  assert once <= before + 1
  prefixes.run(problem, 4)
  assert cascade._split._cache_size() == once


def test_shared_pages_are_read_only_once():
  """The group's part reads the prefix once; the rows' part only own keys."""
  problem = prefixes.make(20, [1, 16, 17])
  _, _, _, kv_lens, table = problem.decode_args()
  split = cascade._split(
    kv_lens,
    table,
    jnp.array([20]),
    jnp.array([0, 3]),
    page_size=prefixes.PAGE,
    num_pages=len(problem.k_pages),
  )
  assert split.joins.all()
  assert split.shared_lens.tolist() == [20 * prefixes.PAGE]
  assert split.own_lens.tolist() == [1, 16, 17]
  np.testing.assert_array_equal(split.shared_pages[0], table[0])
  np.testing.assert_array_equal(split.own_pages[:, :2], table[:, 20:22])
  assert (split.own_pages[:, 2:] == len(problem.k_pages)).all()


def test_the_first_row_that_is_long_enough_says_what_is_shared():
  problem = cases.make(kv_lens=[0, 70, 90, 85, 80, 90], page_size=16)
  problem = prefixes.share(problem, {2: [1, 3, 4]}, 4)
  problem = prefixes.share(problem, {2: [3, 4]}, 5)
  joined = lambda count: (
    cascade._split(
      *problem.decode_args()[3:],
      jnp.array([count]),
      jnp.array([0, 6]),
      page_size=16,
      num_pages=len(problem.k_pages),
    )
    .joins.astype(int)
    .tolist()
  )
  assert joined(4) == [0, 1, 1, 1, 1, 0]
  assert joined(5) == [0, 0, 1, 1, 1, 0]
  assert joined(6) == [0, 0, 0, 0, 0, 0]


def test_nothing_is_read_for_a_group_in_which_nobody_shares():
  problem = cases.make(kv_lens=[0, 0, 20, 40], page_size=prefixes.PAGE)
  split = cascade._split(
    *problem.decode_args()[3:],
    jnp.array([1, 3]),
    jnp.array([0, 2, 4]),
    page_size=prefixes.PAGE,
    num_pages=len(problem.k_pages),
  )
  assert not split.joins.any()
  assert split.shared_lens.tolist() == [0, 0]
  np.testing.assert_array_equal(split.own_lens, problem.kv_lens)


def test_an_empty_batch_gives_an_empty_output():
  q, k_pages, v_pages, kv_lens, table = prefixes.make().decode_args()
  out, lse = paged_jax.cascade_attention(
    q[:0], k_pages, v_pages, kv_lens[:0], table[:0], 3, return_lse=True
  )
  assert out.shape == (0, 4, 64)
  assert lse.shape == (0, 4)


BAD = {
  "float": (dict(num_shared_pages=2.0), "num_shared_pages must be an array"),
  "bool": (dict(num_shared_pages=True), "num_shared_pages=True"),
  "negative": (dict(num_shared_pages=-1), "num_shared_pages=-1 must be in"),
  "dtype": (
    dict(num_shared_pages=jnp.float32(1)),
    "num_shared_pages.dtype=float32",
  ),
  "shape": (
    dict(num_shared_pages=jnp.array([1, 2])),
    r"num_shared_pages.shape=\(2,\) must be \(\) or \(1,\)",
  ),
  "groups": (
    dict(cu_group_lens=jnp.array([0])),
    r"cu_group_lens.shape=\(1,\) must be",
  ),
  "list of groups": (
    dict(cu_group_lens=[0, 2]),
    "cu_group_lens must be an array",
  ),
  "queries": (dict(q=lambda x: x[:1]), r"q.shape=\(1, 4, 64\)"),
  "pages": (dict(k_pages=lambda x: x[:, :, :12]), "k_pages.shape"),
  "scales": (dict(k_scales=jnp.ones((4, 2, 16))), "k_scales must be None"),
  "scale": (dict(scale=float("nan")), "scale=nan"),
  "soft cap": (dict(logits_soft_cap=-1.0), "logits_soft_cap=-1.0"),
  "sinks": (dict(sinks=jnp.zeros(3)), r"sinks.shape=\(3,\)"),
  "invariant": (dict(batch_invariant=1), "batch_invariant=1"),
  "implementation": (dict(implementation="cuda"), "implementation='cuda'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_named(changes, message):
  names = ("q", "k_pages", "v_pages", "kv_lens", "page_indices")
  arguments = dict(zip(names, prefixes.make().decode_args(), strict=True))
  arguments["num_shared_pages"] = 1
  for name, change in changes.items():
    is_change = callable(change)
    arguments[name] = change(arguments[name]) if is_change else change
  with pytest.raises(ValueError, match=message):
    paged_jax.cascade_attention(**arguments)


@pytest.mark.usefixtures("unchecked_shapes")
def test_windows_are_refused():
  with pytest.raises(TypeError, match="sliding_window"):
    prefixes.run(prefixes.make(), 5, sliding_window=16)
