"""Attention of rows that share pages, and merging, beside the oracle."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax
from paged_jax import cascade, devices
from pallas_kernels import (
  decode_config,
  gpu,
  paged_decode,
  ragged_attention,
  ragged_config,
)

PAGE = 16
# Own tokens after a prefix: none, one, to the end of a page, past it, many.
OWN_LENS = [0, 1, 15, 16, 17, 70]
RUNS = [
  pytest.param("xla", "float32", id="xla-float32"),
  pytest.param("xla", "bfloat16", id="xla-bfloat16"),
  pytest.param("xla", "float16", id="xla-float16"),
  pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.gpu, id="mosaic-bf"),
  pytest.param("mosaic_gpu", "float16", marks=pytest.mark.gpu, id="mosaic-f16"),
]
SINKS = np.array([-1, 0, 2, 30], np.float32)
DECODE_CONFIG = decode_config.Config(64, 2, num_programs=3)
RAGGED_CONFIG = ragged_config.Config(64, 2, num_programs=3, splits=True)
FEW_RUNS = RUNS[:1] + RUNS[3:4]


def _make(num_shared=5, own_lens=OWN_LENS, poison=np.nan, **options):
  """Returns a Problem whose rows share their first pages."""
  kv_lens = [num_shared * PAGE + n for n in own_lens]
  problem = cases.make(
    kv_lens=kv_lens, page_size=PAGE, poison=poison, **options
  )
  return _share(problem, {0: range(len(kv_lens))}, num_shared, poison)


def _share(problem, rows_of, num_shared, poison=np.nan):
  """Lets rows begin with the pages of others; what is free then is poison."""
  table = problem.page_indices.copy()
  for leader, rows in rows_of.items():
    for row in rows:
      table[row, :num_shared] = table[leader, :num_shared]
  free = np.setdiff1d(np.arange(len(problem.k_pages)), table)
  pools = {}
  for name in ("k_pages", "v_pages"):
    pools[name] = getattr(problem, name).copy()
    pools[name][free] = poison
  return dataclasses.replace(problem, page_indices=table, **pools)


def _jax(options):
  is_array = lambda x: isinstance(x, np.ndarray)
  return {n: jnp.asarray(x) if is_array(x) else x for n, x in options.items()}


def _run(problem, num_shared, **options):
  return paged_jax.cascade_attention(
    *problem.decode_args(), num_shared, return_lse=True, **_jax(options)
  )


def _expected(problem, **options):
  """What attention over the same table gives, which knows of no sharing."""
  arrays = dataclasses.astuple(problem)[:5]
  return oracle.paged_attention(*arrays, **options)


def _check(problem, num_shared, *, groups=None, implementation=None, **options):
  if groups is not None:
    groups = np.asarray(groups, np.int32)
  out, lse = _run(
    problem,
    num_shared,
    cu_group_lens=groups,
    implementation=implementation,
    **options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  expected = _expected(problem, **options)
  cases.assert_matches(out, lse, *expected, problem.q.dtype)


def _assert_same_bits(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("num_shared", [0, 1, 5, 20])
def test_matches_the_oracle_for_shared_lengths(
  implementation, dtype, num_shared
):
  problem = _make(num_shared, dtype=dtype)
  _check(problem, num_shared, implementation=implementation)
  # What is shared needs not be all that is.
  _check(problem, num_shared // 2, implementation=implementation)


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
def test_matches_the_oracle_for_shapes(implementation, dtype, head_dim, heads):
  num_q_heads, num_kv_heads = heads
  problem = _make(
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  _check(problem, 5, implementation=implementation)


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize(
  "options",
  [{}, dict(scale=0.3), dict(logits_soft_cap=1.5), dict(scale=-0.2)],
  ids=str,
)
def test_matches_the_oracle_for_options(implementation, dtype, sinks, options):
  _check(
    _make(dtype=dtype),
    5,
    implementation=implementation,
    sinks=sinks,
    **options,
  )


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no_sinks", "sinks"])
def test_quantised_pages_match_the_oracle(
  implementation, dtype, kv_dtype, sinks
):
  # On a GPU, each part takes what there is for it.
  implementation = "xla" if implementation == "xla" else None
  problem, scales = cases.quantise(_make(dtype=dtype), kv_dtype)
  _check(problem, 5, implementation=implementation, sinks=sinks, **scales)


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_rows_that_cannot_share_attend_all_on_their_own(implementation, dtype):
  # Inactive, shorter by a page and by a token, of the same pages but the last,
  # of none of them, and one that begins alike but goes on beyond the table.
  kv_lens = [0, 64, 79, 80, 100, 100, 83, 96]
  problem = cases.make(kv_lens=kv_lens, page_size=PAGE, dtype=dtype)
  problem = _share(problem, {3: [4, 6, 7]}, 5)
  problem = _share(problem, {3: [1, 2, 5]}, 4)
  for num_shared in (1, 4, 5, 6, 7, 100):
    _check(problem, num_shared, implementation=implementation, sinks=SINKS)
  beyond = dataclasses.replace(problem, kv_lens=problem.kv_lens.copy())
  beyond.kv_lens[7], beyond.kv_lens[0] = 2**31 - 1, -(2**31)
  expected = _run(problem, 5, implementation=implementation)
  _assert_same_bits(_run(beyond, 5, implementation=implementation), expected)


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_what_a_row_that_does_not_share_asks_leaves_no_trace(
  implementation, dtype
):
  problem = cases.make(kv_lens=[0, 90, 85, 40], page_size=PAGE, dtype=dtype)
  problem = _share(problem, {1: [2]}, 5)
  spoilt = dataclasses.replace(problem, q=problem.q.copy())
  spoilt.q[[0, 3]] = np.nan
  run = lambda p: [
    np.asarray(x) for x in _run(p, 5, implementation=implementation)
  ]
  clean, dirty = run(problem), run(spoilt)
  _assert_same_bits([x[:3] for x in clean], [x[:3] for x in dirty])
  assert not dirty[0][0].any()
  assert np.isnan(dirty[0][3]).all()


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_each_group_has_a_prefix_of_its_own(implementation, dtype):
  kv_lens = [80, 99, 0, 200, 160, 161, 30, 90, 33]
  problem = cases.make(kv_lens=kv_lens, page_size=PAGE, dtype=dtype)
  problem = _share(problem, {1: [0]}, 5)
  problem = _share(problem, {3: [4, 5]}, 10)
  # The third group is empty; the last three rows are in none.
  for counts in ([5, 10, 3, 0], [2, 10, 3, 1], [4, 20, 0, 7]):
    _check(
      problem,
      jnp.asarray(counts, jnp.int32),
      groups=[0, 3, 6, 6, 6],
      implementation=implementation,
    )
  _check(problem, 5, groups=[0, 3, 6], implementation=implementation)
  _check(problem, 5, groups=[1, 4], implementation=implementation)


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_holes_are_skipped_wherever_they_are(implementation, dtype):
  problem = _make(dtype=dtype)
  table, num_pages = problem.page_indices, len(problem.k_pages)
  table[:, 1], table[:, 4] = num_pages, -1
  table[5, [5, 7]] = num_pages + 1000, -(2**31)
  _check(problem, 5, implementation=implementation, sinks=SINKS)
  table[:, :5] = num_pages
  _check(problem, 5, implementation=implementation, sinks=SINKS)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_unread_memory_leaves_no_trace(implementation, dtype, poison):
  run = lambda value: _run(
    _make(poison=value, dtype=dtype), 5, implementation=implementation
  )
  _assert_same_bits(run(0.0), run(poison))


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_two_runs_are_bitwise_equal(implementation, dtype, batch_invariant):
  run = lambda: _run(
    _make(dtype=dtype),
    5,
    implementation=implementation,
    batch_invariant=batch_invariant,
  )
  _assert_same_bits(run(), run())


@pytest.mark.parametrize(("implementation", "dtype"), FEW_RUNS)
def test_batch_invariance_is_handed_to_both_parts(implementation, dtype):
  options = dict(implementation=implementation, batch_invariant=True)
  problem = _make(40, OWN_LENS * 7, dtype=dtype)
  _check(problem, 40, implementation=implementation)
  out, lse = _run(problem, 40, **options)
  expected = _expected(problem)
  cases.assert_matches(out, lse, *expected, problem.q.dtype)
  if implementation == "xla":
    return  # it is as invariant as its products are
  rows = np.array([41, 5, 3])
  few = dataclasses.replace(
    problem,
    q=problem.q[rows],
    kv_lens=problem.kv_lens[rows],
    page_indices=problem.page_indices[rows],
  )
  _assert_same_bits(_run(few, 40, **options), (out[rows], lse[rows]))


def test_all_shared_lengths_share_one_program():
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return paged_jax.cascade_attention(*args, return_lse=True)

  problem = _make()
  for num_shared in (0, 3, 5):
    out, lse = attend(*problem.decode_args(), jnp.int32(num_shared))
    cases.assert_matches(out, lse, *_expected(problem), "float32")
  assert len(traces) == 1
  before = cascade._split._cache_size()
  _run(problem, 2)
  once = cascade._split._cache_size()
  assert once <= before + 1
  _run(problem, 4)
  assert cascade._split._cache_size() == once


def test_shared_pages_are_read_only_once():
  """The part of the group has one row of keys, and rows only their own."""
  problem = _make(20, [1, 16, 17])
  _, _, _, kv_lens, table = problem.decode_args()
  split = cascade._split(
    kv_lens,
    table,
    jnp.array([20]),
    jnp.array([0, 3]),
    page_size=PAGE,
    num_pages=len(problem.k_pages),
  )
  assert split.joins.all()
  assert split.shared_lens.tolist() == [20 * PAGE]
  assert split.own_lens.tolist() == [1, 16, 17]
  np.testing.assert_array_equal(split.shared_pages[0], table[0])
  np.testing.assert_array_equal(split.own_pages[:, :2], table[:, 20:22])
  assert (split.own_pages[:, 2:] == len(problem.k_pages)).all()


def test_nothing_is_read_for_a_group_in_which_nobody_shares():
  problem = cases.make(kv_lens=[0, 0, 20, 40], page_size=PAGE)
  split = cascade._split(
    *problem.decode_args()[3:],
    jnp.array([1, 3]),
    jnp.array([0, 2, 4]),
    page_size=PAGE,
    num_pages=len(problem.k_pages),
  )
  assert not split.joins.any()
  assert split.shared_lens.tolist() == [0, 0]
  np.testing.assert_array_equal(split.own_lens, problem.kv_lens)


def test_an_empty_batch_gives_an_empty_output():
  q, k_pages, v_pages, kv_lens, table = _make().decode_args()
  out, lse = paged_jax.cascade_attention(
    q[:0], k_pages, v_pages, kv_lens[:0], table[:0], 3, return_lse=True
  )
  assert out.shape == (0, 4, 64)
  assert lse.shape == (0, 4)


def _with_kernels(monkeypatch):
  """Lets the ops be the kernels: on a GPU as they are, else interpreted."""

  def run(kernel, config):
    def attend(*args, return_lse, implementation, **options):
      del return_lse, implementation
      if kernel is ragged_attention.attend:
        del options["k_scales"], options["v_scales"]
      return kernel(
        *args[:6],
        *map(jnp.asarray, args[6:]),
        **cases.PLAIN | options,
        sinks=None,
        config=config,
        interpret=cases.INTERPRET,
      )

    return attend

  for name, kernel, config in (
    ("paged_attention", paged_decode.paged_decode, DECODE_CONFIG),
    ("ragged_paged_attention", ragged_attention.attend, RAGGED_CONFIG),
  ):
    monkeypatch.setattr(cascade, name, run(kernel, config))


def test_kernels_match_the_oracle(monkeypatch):
  _with_kernels(monkeypatch)
  kv_lens = [80, 130, 0, 97, 64, 200, 161]
  problem = cases.make(kv_lens=kv_lens, page_size=PAGE, dtype="bfloat16")
  problem = _share(problem, {0: [1, 3]}, 5)
  problem = _share(problem, {5: [6]}, 10)
  options = dict(scale=0.125, logits_soft_cap=None)
  _check(problem, 5, groups=[0, 5], sinks=SINKS, **options)
  counts = jnp.array([5, 10], jnp.int32)
  _check(problem, counts, groups=[0, 4, 7], sinks=SINKS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("num_shared", "heads"), [(128, (32, 8)), (515, (8, 2)), (515, (2, 2))]
)
def test_kernels_match_the_oracle_for_real_sizes(num_shared, heads):
  own_lens = np.random.default_rng(0).integers(0, 300, 24).tolist()
  problem = _make(
    num_shared,
    own_lens,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=128,
    dtype="bfloat16",
  )
  _check(problem, num_shared, implementation="mosaic_gpu")


def _lowered(monkeypatch, kv_dtype, **options):
  """Returns the program for a Hopper GPU, which it takes none to make."""
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  pages = jax.ShapeDtypeStruct((99, 8, 16, 128), kv_dtype)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  q = jax.ShapeDtypeStruct((128, 32, 128), jnp.bfloat16)
  scales = {}
  if pages.dtype != q.dtype:
    shape = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)
    scales = dict(k_scales=shape, v_scales=shape)
  run = jax.jit(
    lambda *args, **scales: paged_jax.cascade_attention(
      *args, **scales, **options
    )
  )
  args = q, pages, pages, ints(128), ints(128, 40), ints()
  lowered = run.trace(*args, **scales).lower(lowering_platforms=("cuda",))
  return lowered.as_text()


def test_both_parts_take_the_kernels_on_hopper(monkeypatch):
  text = _lowered(monkeypatch, jnp.bfloat16, implementation="mosaic_gpu")
  for name in ("ragged_attention", "merge_ragged_partials", "paged_decode"):
    assert name in text


def test_quantised_pages_take_the_kernel_for_own_keys(monkeypatch):
  assert "paged_decode" in _lowered(monkeypatch, jnp.int8)


def test_one_prefix_is_split_over_all_multiprocessors():
  config = ragged_config.default_config(128, 8, 4, 128, device=gpu.Gpu("", 132))
  assert config.splits
  assert config.num_programs == 132


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
  arguments = dict(zip(names, _make().decode_args(), strict=True))
  arguments["num_shared_pages"] = 1
  for name, change in changes.items():
    is_change = callable(change)
    arguments[name] = change(arguments[name]) if is_change else change
  with pytest.raises(ValueError, match=message):
    paged_jax.cascade_attention(**arguments)


@pytest.mark.usefixtures("unchecked_shapes")
def test_windows_are_refused():
  with pytest.raises(TypeError, match="sliding_window"):
    _run(_make(), 5, sliding_window=16)
