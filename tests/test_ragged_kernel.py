"""The ragged kernel: on a Hopper GPU as it is, elsewhere interpreted."""

import dataclasses

import cases
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import ragged_attention, widen
from pallas_kernels.decode_config import QUANTISED_DTYPES
from pallas_kernels.ragged_config import Config

pytestmark = pytest.mark.sampled

# The default has a program for each multiprocessor, which takes the
# interpreter minutes.
SMALL = Config(64, 2, num_programs=3, num_q_stages=2)
SPLIT = dataclasses.replace(SMALL, splits=True)
Q_LENS = [0, 1, 7, 63, 64, 65, 3]
KV_LENS = [20, 1, 70, 200, 64, 130, 0]
both = pytest.mark.parametrize("kv_dtype", QUANTISED_DTYPES)


def _run(
  problem,
  scales=None,
  *,
  config=SMALL,
  sinks=None,
  tree_mask=None,
  interpret=cases.INTERPRET,
  **options,
):
  scales = {name: jnp.asarray(x) for name, x in (scales or {}).items()}
  options = cases.on_device(options)
  out, lse = ragged_attention.attend(
    *problem.args(),
    sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    tree_mask=None if tree_mask is None else jnp.asarray(tree_mask),
    config=config,
    interpret=interpret,
    **cases.PLAIN | options,
    **scales,
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
  options = (
    dict(kv_lens=KV_LENS, q_lens=Q_LENS, dtype="bfloat16", spare_tokens=5)
    | options
  )
  return cases.make(**options)


@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_matches_oracle(config):
  _check(_make(), config=config)


def test_no_token_follows_the_last_tile():
  _check(_make(kv_lens=[20, 7], q_lens=[20, 7], spare_tokens=0))


def test_sequences_past_num_active_leave_no_trace():
  _check(_make(kv_lens=[40, 9, 77], q_lens=[30, 4, 40], num_active=2))


# Of 64 rows, tiles of K: aaaaaaa, then aaa bb c, or the like.
@pytest.mark.parametrize(
  ("kv_lens", "q_lens", "num_programs"),
  [
    ([400], [32], 9),  # more programs than tiles
    ([600], [1], 3),
    ([300, 70, 1, 0], [40, 70, 1, 0], 5),
    ([700, 20], [10, 20], 4),
  ],
)
def test_any_splitting_of_items_matches_oracle(kv_lens, q_lens, num_programs):
  config = dataclasses.replace(SPLIT, num_programs=num_programs)
  problem = _make(kv_lens=kv_lens, q_lens=q_lens)
  _check(problem, config=config, sinks=[-2, 0, 1, 5])


@pytest.mark.parametrize("num_compute_wgs", [1, 3])
def test_any_number_of_warpgroups_matches_oracle(num_compute_wgs):
  problem = _make(kv_lens=[300, 33], q_lens=[200, 33])
  _check(problem, config=Config(64, 2, num_compute_wgs, 2))


@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", Config(128, 2, 2, 2)),
    (80, (3, 1), 40, "bfloat16", Config(64, 2, 1, 2)),
    (96, (10, 2), 32, "float16", Config(64, 3, 2, 2)),
    (128, (8, 2), 24, "float16", Config(64, 2, 2, 3)),
    (192, (16, 1), 256, "bfloat16", Config(64, 2, 2, 4, splits=True)),
    (256, (6, 1), 64, "float16", Config(64, 2, 2, 1)),
    (256, (2, 1), 16, "bfloat16", Config(64, 2, 1, 7, splits=True)),
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
    (dict(scale=1e-50), None),  # 0 in float32
  ],
  ids=str,
)
def test_matches_oracle_for_options(options, sinks):
  _check(_make(kv_lens=[330, 66], q_lens=[80, 66]), sinks=sinks, **options)


@pytest.mark.parametrize(
  ("config", "heads", "options"),
  [
    (SMALL, (4, 2), {}),
    (SPLIT, (6, 2), dict(sliding_window=70, num_sink_tokens=5)),
    (Config(128, 2, 1, 3), (3, 1), dict(logits_soft_cap=3.0, scale=-0.1)),
    (Config(64, 2, 3, 2, splits=True), (20, 1), {}),
  ],
)
def test_alibi_matches_oracle(config, heads, options):
  problem = _make(num_q_heads=heads[0], num_kv_heads=heads[1])
  problem.page_indices[3, [1, 9]] = -1, len(problem.k_pages)
  slopes = np.geomspace(1, 1e-3, heads[0], dtype=np.float32)
  slopes[1] *= -1
  sinks = np.linspace(-2, 2, heads[0])
  _check(problem, config=config, sinks=sinks, alibi_slopes=slopes, **options)


@both
def test_alibi_over_quantised_pages_matches_oracle(kv_dtype):
  slopes = np.asarray([0.5, 0.01, -0.003, 0], np.float32)
  _check_quantised(_make(), kv_dtype, alibi_slopes=slopes)


def test_slopes_as_steep_as_can_be_see_only_themselves():
  problem = _make(kv_lens=[150, 9], q_lens=[40, 9])
  slopes = np.full(4, np.finfo(np.float32).max)
  out, _ = _run(problem, alibi_slopes=slopes)
  expected, _ = _run(problem, sliding_window=1)
  _assert_same_bits((out,), (expected,))


@pytest.mark.parametrize(
  "options", [dict(causal=False), dict(tree_mask=np.ones((10, 3), bool))]
)
def test_slopes_are_refused_where_distances_are_not_known(options):
  problem = _make(kv_lens=[30], q_lens=[10], spare_tokens=0)
  with pytest.raises(ValueError, match="alibi_slopes"):
    _run(problem, alibi_slopes=np.ones(4, np.float32), **options)


@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_every_query_sees_all_keys_if_not_causal(config):
  problem = _make(kv_lens=[150, 70, 3], q_lens=[40, 70, 5])
  _check(problem, config=config, causal=False)


def _random_mask(problem, max_new):
  """Returns a mask without any order, in which some tokens see no new one."""
  rng = np.random.default_rng(0)
  mask = rng.random((len(problem.q), max_new)) < rng.random((len(problem.q), 1))
  mask[::5] = False
  return mask


# Fewer columns than query tokens, one word of bits and several; tiles that
# have a part of the context, and that have none.
@pytest.mark.parametrize(
  ("max_new", "config", "options"),
  [
    (70, SMALL, {}),
    (1, SMALL, {}),
    (31, SPLIT, dict(sliding_window=1)),
    (33, SMALL, dict(sliding_window=20, num_sink_tokens=70)),
    (64, Config(128, 2, 1, 2), dict(logits_soft_cap=3.0)),
    (200, Config(128, 2, 3, 2, splits=True), dict(sliding_window=70)),
  ],
)
def test_a_tree_matches_oracle(max_new, config, options):
  # The last is what a refused row looks like: its tokens were not stored.
  problem = _make(
    kv_lens=[20, 1, 70, 200, 64, 163, 3], q_lens=[0, 1, 7, 63, 64, 65, 9]
  )
  problem.page_indices[3, [1, 9]] = -1, len(problem.k_pages)
  mask = _random_mask(problem, max_new)
  sinks = [-2, 0, 1, 5]
  _check(problem, config=config, sinks=sinks, tree_mask=mask, **options)


def test_a_window_does_not_bound_new_tokens():
  problem = _make(kv_lens=[100], q_lens=[40], spare_tokens=0)
  mask = np.ones((40, 40), bool)
  _check(problem, tree_mask=mask, sliding_window=1)


@pytest.mark.parametrize("heads", [(10, 2), (128, 1)])
def test_a_tree_of_any_group_matches_oracle(heads):
  problem = _make(
    kv_lens=[90, 9, 130],
    q_lens=[3, 9, 2],
    num_active=2,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=80,
  )
  _check(problem, tree_mask=_random_mask(problem, 9))


@pytest.mark.parametrize("window", [None, 9])
def test_a_chain_is_causal(window):
  problem = _make(kv_lens=[150, 70], q_lens=[40, 70])
  mask = np.zeros((len(problem.q), 70), bool)
  for start, end in ((0, 40), (40, 110)):
    chain = np.tri(end - start, 70, dtype=bool)
    mask[start:end] = np.triu(chain, 1 - (window or 70))
  _assert_same_bits(
    _run(problem, sliding_window=window),
    _run(problem, sliding_window=window, tree_mask=mask),
  )


@pytest.mark.parametrize("window", [None, 3])
def test_a_new_token_that_none_sees_leaves_no_trace(window):
  problem = _make(kv_lens=[164, 130, 20], q_lens=[70, 64, 4], poison=0.0)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  mask = _random_mask(problem, 66)
  mask[:, 1] = True
  context, unseen = [94, 66, 16], []
  for seq, columns in enumerate(([0, 33, 34, 60, 65, 66, 69], [31, 63], [2])):
    start, end = problem.cu_q_lens[seq : seq + 2]
    mask[start:end, [column for column in columns if column < 66]] = False
    unseen += [(seq, context[seq] + column) for column in columns]
    if window:  # the last that the sequence does not see of its context
      seen = mask[start:end, : end - start].sum(1).min()
      unseen.append((seq, context[seq] + seen - 1 - window))
  runs = []
  for filler in (0.0, np.nan):
    for seq, position in unseen:
      page = problem.page_indices[seq, position // 16]
      for pages in (problem.k_pages, problem.v_pages):
        pages[page, :, position % 16] = filler
    runs.append(_run(problem, tree_mask=mask, sliding_window=window))
  assert np.isfinite(runs[0][0].astype(np.float32)).all()
  _assert_same_bits(*runs)


def test_holes_are_skipped():
  problem = _make(kv_lens=[330, 64, 300], q_lens=[70, 64, 90])
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  table[2, 2:6] = num_pages
  _check(problem)
  _check(problem, sliding_window=150, num_sink_tokens=20)


def _assert_same_bits(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.tobytes() == y.tobytes()


# The interpreter multiplies with NumPy, which warns of Inf - Inf.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_unused_memory_leaves_no_trace(poison):
  clean, poisoned = (
    _run(
      _make(kv_lens=[70, 201], q_lens=[70, 5], dtype="float16", poison=filler)
    )
    for filler in (0.0, poison)
  )
  _assert_same_bits(clean, poisoned)


# In the second, sink tokens and the window lie in one tile.
@pytest.mark.parametrize(("kv_len", "window"), [(300, 100), (64, 15)])
def test_keys_left_of_the_window_leave_no_trace(kv_len, window):
  problem = _make(kv_lens=[kv_len], q_lens=[30], spare_tokens=0)
  options = dict(sliding_window=window, num_sink_tokens=3)
  clean = _run(problem, **options)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  for position in range(3, kv_len - 29 - window):
    page = problem.page_indices[0, position // 16]
    problem.k_pages[page, :, position % 16] = np.nan
    problem.v_pages[page, :, position % 16] = np.nan
  _assert_same_bits(clean, _run(problem, **options))


@both
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_quantised_pages_match_oracle(kv_dtype, config):
  _check_quantised(_make(), kv_dtype, config=config)


def _check_quantised(problem, kv_dtype, *, config=SMALL, sinks=None, **options):
  problem, scales = cases.quantise(problem, kv_dtype)
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(cases.dequantise(problem, scales)),
    sinks=sinks,
    **cases.PLAIN | options,
  )
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = _run(problem, scales, config=each, sinks=sinks, **options)
    cases.assert_matches(out, lse, *expected, problem.q.dtype)


@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "kv_dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", "int8", Config(128, 2, 2, 2)),
    (80, (3, 1), 40, "float16", "float8_e4m3fn", Config(64, 2, 1, 2)),
    (96, (6, 2), 64, "float16", "int8", Config(64, 3, 2, 2)),
    (128, (8, 2), 24, "bfloat16", "float8_e4m3fn", Config(128, 2, 2, 3)),
    (192, (6, 1), 256, "bfloat16", "int8", Config(64, 2, 2, 4, splits=True)),
    (256, (6, 1), 8, "float16", "float8_e4m3fn", Config(64, 2, 2, 1)),
    (256, (2, 1), 16, "bfloat16", "int8", Config(64, 2, 2, 3, splits=True)),
  ],
)
def test_quantised_pages_match_oracle_for_shapes(
  head_dim, heads, page_size, dtype, kv_dtype, config
):
  problem = _make(
    kv_lens=[40, 9, page_size + 17, 200],
    q_lens=[40, 0, 17, 1],
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  _check_quantised(problem, kv_dtype, config=config)


@both
def test_quantised_pages_take_every_option_and_holes(kv_dtype):
  problem = _make(kv_lens=[330, 64, 300], q_lens=[70, 64, 90])
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  _check_quantised(
    problem,
    kv_dtype,
    sinks=[-2, 0, 1, 5],
    sliding_window=150,
    num_sink_tokens=20,
    logits_soft_cap=30.0,
  )


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantised_pages_are_those_of_their_rounded_values(kv_dtype, dtype):
  problem, scales = cases.quantise(_make(dtype=dtype), kv_dtype)
  _assert_same_bits(
    _run(problem, scales), _run(cases.dequantise(problem, scales))
  )


@both
def test_unused_quantised_memory_leaves_no_trace(kv_dtype):
  clean, poisoned = (
    _run(
      *cases.quantise(
        _make(kv_lens=[70, 201], q_lens=[70, 5], page_size=64, poison=filler),
        kv_dtype,
      )
    )
    for filler in (0.0, np.nan)
  )
  _assert_same_bits(clean, poisoned)


@both
def test_quantised_keys_left_of_the_window_leave_no_trace(kv_dtype):
  problem, scales = cases.quantise(
    _make(kv_lens=[300], q_lens=[30], spare_tokens=0), kv_dtype
  )
  options = dict(sliding_window=100, num_sink_tokens=3)
  clean = _run(problem, scales, **options)
  for position in range(3, 300 - 29 - 100):
    page = problem.page_indices[0, position // 16]
    for name in scales:
      scales[name][page, :, position % 16] = np.nan
  _assert_same_bits(clean, _run(problem, scales, **options))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@both
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
def test_a_seen_scale_that_is_nan_shows(kv_dtype, name):
  problem, scales = cases.quantise(
    _make(kv_lens=[70, 20], q_lens=[5, 3], spare_tokens=0), kv_dtype
  )
  scales[name][problem.page_indices[0, 1], 1, 2] = np.nan
  out, _ = _run(problem, scales)
  bad = np.isnan(np.asarray(out, np.float32)).all(-1)
  assert bad[:5].tolist() == [[False, False, True, True]] * 5
  assert not bad[5:].any()


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_cut_where_numbers_leave_the_dtype(kv_dtype, dtype):
  problem, scales = cases.quantise(_make(dtype=dtype), kv_dtype)
  limit = np.float32(widen.largest_scale(dtype, kv_dtype))
  cut = {name: x.copy() for name, x in scales.items()}
  page = problem.page_indices[3, 2]
  scales["v_scales"][page, 0, 5], cut["v_scales"][page, 0, 5] = 3e38, limit
  out, lse = _run(problem, scales)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  _assert_same_bits((out, lse), _run(cases.dequantise(problem, cut)))


def test_scales_must_belong_to_pages():
  problem, scales = cases.quantise(_make(kv_lens=[9], q_lens=[3]), "int8")
  with pytest.raises(ValueError, match="v_scales must be an array"):
    _run(problem, dict(k_scales=scales["k_scales"]))
  with pytest.raises(ValueError, match="k_scales.dtype=float16"):
    _run(problem, scales | dict(k_scales=scales["k_scales"].astype("float16")))
  with pytest.raises(ValueError, match="k_scales must be None"):
    _run(_make(kv_lens=[9], q_lens=[3]), scales)


def test_two_runs_are_bitwise_equal():
  _assert_same_bits(_run(_make(), config=SPLIT), _run(_make(), config=SPLIT))


def test_all_lengths_share_one_trace():
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return ragged_attention.attend(
      *args, sinks=None, config=SMALL, interpret=cases.INTERPRET, **cases.PLAIN
    )

  problem = _make(kv_lens=[100, 40], q_lens=[30, 40])
  for cu_q_lens, kv_lens in (([0, 30, 70], [100, 40]), ([0, 1, 9], [7, 8])):
    problem.cu_q_lens = np.asarray(cu_q_lens, np.int32)
    problem.kv_lens = np.asarray(kv_lens, np.int32)
    attend(*problem.args()[:-1], jnp.int32(2))
  assert len(traces) == 1


def test_no_sequences_and_no_tokens_are_fine():
  problem = _make(kv_lens=[9], q_lens=[3])
  q, k, v, kv_lens, table, _, _ = problem.args()
  nobody = kv_lens[:0], table[:0], jnp.zeros(1, jnp.int32), jnp.int32(0)
  for queries in (q, q[:0]):
    out, lse = ragged_attention.attend(
      queries, k, v, *nobody, sinks=None, **cases.PLAIN
    )
    assert not out.any()
    assert np.isneginf(lse).all()
    assert lse.shape == queries.shape[:2]


def test_dtypes_must_agree():
  problem = _make(kv_lens=[9], q_lens=[3])
  problem.v_pages = problem.v_pages.astype(np.float16)
  with pytest.raises(ValueError, match="must be the same"):
    _run(problem)


def test_a_window_must_be_causal():
  problem = _make(kv_lens=[9], q_lens=[3])
  with pytest.raises(ValueError, match="sliding_window=4 must be None"):
    _run(problem, sliding_window=4, causal=False)


@pytest.mark.skipif(
  cases.ON_HOPPER, reason="only the interpreter looks for races"
)
@pytest.mark.always
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_no_memory_is_reused_before_it_was_read(config, capfd):
  problem = _make(kv_lens=[150, 9, 70], q_lens=[70, 9, 1])
  # Here, and only here, threads stand for the warps that copy (`warps`).
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  each_warp = _run(problem, config=config, interpret=interpret)
  _assert_same_bits(each_warp, _run(problem, config=config))
  quantised = cases.quantise(problem, "int8")
  _run(*quantised, config=config, interpret=interpret)
  assert "RACE" not in capfd.readouterr().out
