"""The decode kernel: on a Hopper GPU as it is, elsewhere interpreted."""

import dataclasses
import functools

import cases
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import decode_config, paged_decode
from pallas_kernels.decode_config import Config

pytestmark = pytest.mark.sampled

# The default has a program for each multiprocessor, which takes the
# interpreter minutes.
SMALL = Config(64, 2, 3)
# Most of the time goes into compiling the interpreter: tests share programs.
SHARED = dict(config=SMALL, sinks=(-2, 0, 1))


def _make(kv_lens, *, dtype="bfloat16", **options):
  options = dict(num_q_heads=4, num_kv_heads=1) | options
  return cases.make(kv_lens=kv_lens, dtype=dtype, **options)


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


def _make_shared(*kv_lens):
  """Returns a problem whose shapes do not depend on the lengths."""
  problem = _pad_with_nan_pages(_make([400, 400, 400], num_q_heads=3))
  problem.kv_lens[:] = kv_lens
  return problem


def _run(
  problem,
  *,
  config=SMALL,
  sinks=None,
  alibi_slopes=None,
  interpret=cases.INTERPRET,
  **options,
):
  per_head = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
  out, lse = paged_decode.paged_decode(
    *problem.decode_args(),
    sinks=per_head(sinks),
    alibi_slopes=per_head(alibi_slopes),
    config=config,
    interpret=interpret,
    **cases.PLAIN | options,
  )
  assert out.dtype == problem.q.dtype
  assert lse.dtype == jnp.float32
  return np.asarray(out), np.asarray(lse)


def _check(problem, *, config=SMALL, sinks=None, scales=None, **options):
  scales, judged = scales or {}, cases.PLAIN | options
  judged.pop("batch_invariant", None)  # is not about the result
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], sinks=sinks, **judged, **scales
  )
  scales = {name: jnp.asarray(x) for name, x in scales.items()}
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = _run(problem, config=each, sinks=sinks, **options, **scales)
    cases.assert_matches(out, lse, *expected, problem.q.dtype)


def _check_quantised(problem, kv_dtype, **options):
  problem, scales = cases.quantise(problem, kv_dtype)
  _check(problem, scales=scales, **options)


def _assert_same_bits(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", Config(128, 2, 4)),
    (64, (64, 1), 128, "float16", Config(64, 4, 2)),
    (80, (9, 1), 40, "bfloat16", Config(64, 2, 5)),
    (96, (9, 3), 32, "float16", Config(64, 3, 3)),
    (128, (4, 1), 24, "bfloat16", Config(64, 2, 3)),
    (192, (16, 1), 256, "bfloat16", Config(64, 2, 4)),
    (256, (8, 1), 64, "float16", Config(64, 2, 1)),
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
    (dict(sliding_window=70, num_sink_tokens=5), [-2, 0, 1, 5]),
    (dict(logits_soft_cap=30.0, scale=4.0), [-2, 0, 1, 40]),
    (
      dict(sliding_window=100, num_sink_tokens=64, logits_soft_cap=2.0),
      None,
    ),
    (dict(alibi_slopes=[0.5, 0.1, -0.05, 0.004]), None),
    (
      dict(
        sliding_window=100,
        num_sink_tokens=64,
        logits_soft_cap=2.0,
        alibi_slopes=[0.02, 0.1, -0.01, 0.004],
      ),
      [-2, 0, 1, 5],
    ),
  ],
  ids=str,
)
def test_matches_oracle_for_options(options, sinks):
  _check(_make([0, 64, 330]), sinks=sinks, **options)


def test_slopes_are_those_of_the_query_heads():
  problem = _make([0, 1, 330], num_q_heads=6, num_kv_heads=2)
  problem.page_indices[2, [0, 7, 20]] = len(problem.k_pages)
  _check(problem, alibi_slopes=2.0 ** -np.arange(1, 7))


def test_slopes_of_any_size_and_distance_leave_no_nan():
  problem = _make([0, 1, 330])
  problem.page_indices[2, 18:] = len(problem.k_pages)
  slopes = [3e38, -3e38, 2.0**95, -1e30]
  out, lse = _run(problem, alibi_slopes=slopes)
  # One key weighs all: the nearest, or the farthest.
  expected, _ = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], **cases.PLAIN, alibi_slopes=slopes
  )
  assert cases.relative_error(out, expected) < cases.TOLERANCE["bfloat16"]
  assert np.isfinite(lse[1:]).all()
  problem.kv_lens[2] = 2**31 - 1
  for x in _run(problem, alibi_slopes=slopes):
    assert np.isfinite(x[1:].astype(np.float32)).all()


@pytest.mark.parametrize("kv_dtype", decode_config.QUANTISED_DTYPES)
@pytest.mark.parametrize(
  ("head_dim", "page_size", "dtype"),
  [
    (64, 8, "float16"),
    (80, 16, "bfloat16"),
    (96, 24, "bfloat16"),
    (128, 16, "bfloat16"),
    (192, 64, "bfloat16"),
    (256, 32, "float16"),
  ],
)
def test_quantised_pages_match_oracle(head_dim, page_size, dtype, kv_dtype):
  problem = _make(
    [0, 1, page_size + 1, 200],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  _check_quantised(problem, kv_dtype)


@pytest.mark.parametrize("kv_dtype", decode_config.QUANTISED_DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_quantised_pages_take_every_option(kv_dtype, batch_invariant):
  problem = _make_shared(330, 64, 300)
  problem.page_indices[0, 3] = len(problem.k_pages)
  _check_quantised(
    problem,
    kv_dtype,
    **SHARED,
    sliding_window=150,
    num_sink_tokens=20,
    logits_soft_cap=30.0,
    alibi_slopes=(0.02, -0.01, 0.3),
    batch_invariant=batch_invariant,
  )


def test_values_of_any_size_weigh_as_they_should():
  problem = _make([200, 130], dtype="float16")
  rng = np.random.default_rng(0)
  rows = problem.v_pages.astype(np.float64)
  sizes = 10.0 ** rng.uniform(-12, 12, rows.shape[:3])
  data, v_scales = cases.quantise_rows(rows * sizes[..., None], "int8")
  problem, scales = cases.quantise(problem, "int8")
  problem.v_pages = data
  problem.q = problem.q.astype(jnp.bfloat16)  # in whose range the output lies
  _check(problem, scales=scales | dict(v_scales=v_scales))


def test_values_that_are_all_zero_count_in_the_denominator():
  problem, scales = cases.quantise(_make([70, 130]), "int8")
  for position in range(64):
    page = problem.page_indices[1, position // 16]
    problem.v_pages[page, :, position % 16] = 0
    scales["v_scales"][page, :, position % 16] = 0
  _check(problem, scales=scales)


# The weights of the first tile's values, and of the second's, are 2^140 apart.
@pytest.mark.parametrize("num_programs", [1, 3])
def test_the_denominator_keeps_keys_whose_values_are_zero(num_programs):
  problem, scales = cases.quantise(_make([130], dtype="float16"), "int8")
  problem.q = problem.q.astype(jnp.bfloat16)
  scales["v_scales"] = np.where(np.isnan(scales["v_scales"]), np.nan, 2.0**40)
  scales["v_scales"] = scales["v_scales"].astype(np.float32)
  for position in range(64):
    page = problem.page_indices[0, position // 16]
    problem.v_pages[page, :, position % 16] = 0
    scales["v_scales"][page, :, position % 16] = 0
  _check(problem, scales=scales, config=Config(64, 2, num_programs))


def test_a_scale_of_values_that_is_nan_spares_the_log_sum_exp():
  problem, scales = cases.quantise(_make([70, 130]), "int8")
  page = problem.page_indices[1, 3]
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], **cases.PLAIN, **scales
  )
  scales["v_scales"][page, 0, 5] = np.nan
  out, lse = _run(
    problem, **{name: jnp.asarray(x) for name, x in scales.items()}
  )
  assert np.isnan(out[1].astype(np.float32)).all()
  cases.assert_matches(out[:1], lse[:1], *(x[:1] for x in expected), "bfloat16")
  np.testing.assert_allclose(lse, expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv_dtype", decode_config.QUANTISED_DTYPES)
def test_unused_quantised_memory_leaves_no_trace(kv_dtype):
  runs = []
  for filler in (0.0, np.nan):
    problem, scales = cases.quantise(
      _make([1, 70, 201], poison=filler), kv_dtype
    )
    scales = {name: jnp.asarray(x) for name, x in scales.items()}
    runs.append(_run(problem, **scales))
  _assert_same_bits(*runs)


def test_scales_of_another_shape_are_refused():
  problem, scales = cases.quantise(_make([3]), "int8")
  scales = {name: jnp.asarray(x) for name, x in scales.items()}
  with pytest.raises(ValueError, match="v_scales must be an array"):
    _run(problem, k_scales=scales["k_scales"])
  with pytest.raises(
    ValueError, match="k_scales.dtype=float16 must be float32"
  ):
    _run(
      problem, **scales | dict(k_scales=scales["k_scales"].astype("float16"))
    )
  with pytest.raises(ValueError, match="k_scales must be None"):
    _run(_make([3]), **scales)


# In comments: the shares of the tiles of sequences a, b and c.
@pytest.mark.parametrize(
  ("num_programs", "many_kv_lens"),
  [
    (1, [(64, 333, 0), (0, 0, 0)]),
    (
      3,
      [
        (128, 128, 128),  # aa|bb|cc
        (64, 400, 64),  # abb|bbb|bbc
        (333, 64, 130),  # aaaa|aab|ccc
        (0, 333, 0),  # abb|bbb|bc, where a and c write zeros
        (0, 0, 0),
      ],
    ),
    (
      7,
      [
        (192, 192, 192),  # aa|ab|b|b|c|c|c
        (400, 1, 0),  # aa|aa|a|a|a|b|c: more partials than are loaded at once
        (5, 30, 64),  # a|b|c and four programs that have nothing to do
      ],
    ),
  ],
)
def test_any_dealing_of_tiles_matches_oracle(num_programs, many_kv_lens):
  options = SHARED | dict(config=Config(64, 2, num_programs))
  for kv_lens in many_kv_lens:
    _check(_make_shared(*kv_lens), **options)


@pytest.mark.parametrize(
  ("kv_lens", "num_kv_heads", "num_programs"),
  [([200, 70], 2, 5), ([570], 1, 9)],  # aaa|aAA|AA|bb|BB and a|a|a|a|a|a|a|a|a
)
def test_any_dealing_of_heads_matches_oracle(
  kv_lens, num_kv_heads, num_programs
):
  problem = _make(kv_lens, num_kv_heads=num_kv_heads)
  _check(problem, config=Config(64, 2, num_programs))


def test_holes_are_skipped():
  problem = _make_shared(330, 64, 300)
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  table[2, 2:6] = num_pages
  _check(problem, **SHARED)
  options = dict(sliding_window=150, num_sink_tokens=20)
  _check(problem, **SHARED, **options)


# The interpreter multiplies with NumPy, which warns of Inf - Inf.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_unused_memory_leaves_no_trace(poison):
  clean, poisoned = (
    _run(
      _make([1, 70, 201], dtype="float16", poison=filler),
      config=Config(64, 2, 3),
    )
    for filler in (0.0, poison)
  )
  _assert_same_bits(clean, poisoned)


def test_keys_left_of_the_window_leave_no_trace():
  problem = _make([300], head_dim=80)
  options = dict(sliding_window=100, num_sink_tokens=3)
  clean = _run(problem, **options)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  for position in range(3, 200):
    page = problem.page_indices[0, position // 16]
    problem.k_pages[page, :, position % 16] = np.nan
    problem.v_pages[page, :, position % 16] = np.nan
  _assert_same_bits(clean, _run(problem, **options))


# Columns of a tile past the group hold the next queries.
def test_queries_of_others_leave_no_trace():
  problem = _make_shared(70, 330, 70)
  clean = _run(problem, **SHARED)
  problem.q = np.array(problem.q)
  problem.q[[0, 2]] = np.nan
  poisoned = _run(problem, **SHARED)
  _assert_same_bits([x[1] for x in clean], [x[1] for x in poisoned])


def test_fewer_queries_than_columns_of_a_tile():
  problem = _make([70, 130], num_q_heads=3)
  _check(problem)


def test_two_runs_are_bitwise_equal():
  problem = _make_shared(7, 333, 80)
  _assert_same_bits(_run(problem, **SHARED), _run(problem, **SHARED))


def test_the_order_of_pages_does_not_matter():
  problem = _make_shared(7, 333, 80)
  expected = _run(problem, **SHARED)
  order = np.random.default_rng(1).permutation(len(problem.k_pages))
  problem.k_pages = problem.k_pages[order]
  problem.v_pages = problem.v_pages[order]
  to = np.append(np.argsort(order), len(order)).astype(np.int32)
  problem.page_indices = to[problem.page_indices]
  _assert_same_bits(expected, _run(problem, **SHARED))


def test_row_in_one_share_does_not_depend_on_its_batchmates():
  together = _run(_make_shared(400, 64, 64), **SHARED)  # aaa|aaa|abc
  apart = _run(_make_shared(0, 64, 333), **SHARED)  # abc|ccc|cc
  _assert_same_bits([x[1] for x in together], [x[1] for x in apart])


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_fixed_splits_do_not_depend_on_the_batch(kv_dtype):
  kv_lens = [1100, 64, 333, 0, 700]  # 18, 1, 6, 1 and 11 tiles: 5, 1, 2, 1, 3
  problem, scales = _make(kv_lens), {}
  if kv_dtype:
    problem, scales = cases.quantise(problem, kv_dtype)
  run = functools.partial(
    _run,
    batch_invariant=True,
    **{name: jnp.asarray(x) for name, x in scales.items()},
  )
  together = run(problem, config=Config(64, 2, 4))
  if kv_dtype is None:
    _check(problem, config=Config(64, 2, 4), batch_invariant=True)
  rows = [4, 0, 1]
  fewer = dataclasses.replace(
    problem,
    q=problem.q[rows],
    kv_lens=problem.kv_lens[rows],
    page_indices=problem.page_indices[rows],
  )
  for num_programs in (1, 7):
    apart = run(fewer, config=Config(64, 3, num_programs))
    _assert_same_bits([x[rows] for x in together], apart)


def test_lengths_out_of_range_are_cut():
  problem = _make_shared(26 * 16, 80, 0)
  assert problem.page_indices.shape == (3, 26)
  problem.page_indices[0, -1] = problem.page_indices[0, 0]
  expected = _run(problem, **SHARED)
  problem.kv_lens[:] = 1000, 80, -3
  _assert_same_bits(expected, _run(problem, **SHARED))


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
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return paged_decode.paged_decode(
      *args, sinks=None, config=SMALL, interpret=cases.INTERPRET, **cases.PLAIN
    )

  for kv_lens in ((0, 0, 0), (17, 99, 1)):
    attend(*_make_shared(*kv_lens).decode_args())
  assert len(traces) == 1


def test_dtypes_must_agree():
  problem = _make([3])
  problem.v_pages = problem.v_pages.astype(np.float16)
  with pytest.raises(ValueError, match="must be the same"):
    _run(problem)


@pytest.mark.skipif(
  cases.ON_HOPPER, reason="only the interpreter looks for races"
)
@pytest.mark.always
# Of a tile of one chunk, a warp copies K, another V, a third Q. Not for 8-bit
# pages: the interpreter takes a load that a copy follows for a race.
@pytest.mark.parametrize(
  ("head_dim", "page_size"), [(64, 16), (80, 16), (64, 64)]
)
def test_no_memory_is_reused_before_it_was_read(head_dim, page_size, capfd):
  problem = _make([70, 200, 0], head_dim=head_dim, page_size=page_size)
  config = Config(64, 2, 2)  # three tiles for each of two programs
  # Here, and only here, threads stand for the warps that copy (`warps`).
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  run = functools.partial(_run, problem, config=config)
  each_warp = run(interpret=interpret)
  assert "RACE" not in capfd.readouterr().out
  _assert_same_bits(each_warp, run())
