"""The ragged kernel: compiled on a Hopper GPU, elsewhere interpreted."""

import dataclasses

import cases
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import kernel_calls
import numpy as np
import pytest
import ragged_runs

from pallas_kernels.ragged import kernel as ragged_kernel
from pallas_kernels.ragged.config import Config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", [ragged_runs.SMALL, ragged_runs.SPLIT])
def test_matches_oracle(config):
  ragged_runs.check(ragged_runs.make(), config=config)


def test_no_token_follows_the_last_tile():
  ragged_runs.check(
    ragged_runs.make(kv_lens=[20, 7], q_lens=[20, 7], spare_tokens=0)
  )


def test_sequences_past_num_active_leave_no_trace():
  ragged_runs.check(
    ragged_runs.make(kv_lens=[40, 9, 77], q_lens=[30, 4, 40], num_active=2)
  )


# Items of 64 rows with several KV tiles: aaaaaaa, aaa bb c and similar.
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
  config = dataclasses.replace(ragged_runs.SPLIT, num_programs=num_programs)
  problem = ragged_runs.make(kv_lens=kv_lens, q_lens=q_lens)
  ragged_runs.check(problem, config=config, sinks=[-2, 0, 1, 5])


@pytest.mark.parametrize("num_compute_wgs", [1, 3])
def test_any_number_of_warpgroups_matches_oracle(num_compute_wgs):
  problem = ragged_runs.make(kv_lens=[300, 33], q_lens=[200, 33])
  ragged_runs.check(problem, config=Config(64, 2, num_compute_wgs, 2))


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
  problem = ragged_runs.make(
    kv_lens=[40, 9, page_size + 17, 200],
    q_lens=q_lens,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  ragged_runs.check(problem, config=config)


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
  ragged_runs.check(
    ragged_runs.make(kv_lens=[330, 66], q_lens=[80, 66]), sinks=sinks, **options
  )


@pytest.mark.parametrize(
  ("config", "heads", "options"),
  [
    (ragged_runs.SMALL, (4, 2), {}),
    (ragged_runs.SPLIT, (6, 2), dict(sliding_window=70, num_sink_tokens=5)),
    (Config(128, 2, 1, 3), (3, 1), dict(logits_soft_cap=3.0, scale=-0.1)),
    (Config(64, 2, 3, 2, splits=True), (20, 1), {}),
  ],
)
def test_alibi_matches_oracle(config, heads, options):
  problem = ragged_runs.make(num_q_heads=heads[0], num_kv_heads=heads[1])
  problem.page_indices[3, [1, 9]] = -1, len(problem.k_pages)
  slopes = np.geomspace(1, 1e-3, heads[0], dtype=np.float32)
  slopes[1] *= -1
  sinks = np.linspace(-2, 2, heads[0])
  ragged_runs.check(
    problem, config=config, sinks=sinks, alibi_slopes=slopes, **options
  )


def test_slopes_as_steep_as_can_be_see_only_themselves():
  problem = ragged_runs.make(kv_lens=[150, 9], q_lens=[40, 9])
  slopes = np.full(4, np.finfo(np.float32).max)
  out, _ = ragged_runs.run(problem, alibi_slopes=slopes)
  expected, _ = ragged_runs.run(problem, sliding_window=1)
  cases.assert_same_bits((out,), (expected,))


@pytest.mark.parametrize(
  "options", [dict(causal=False), dict(tree_mask=np.ones((10, 3), bool))]
)
def test_slopes_are_refused_where_distances_are_not_known(options):
  problem = ragged_runs.make(kv_lens=[30], q_lens=[10], spare_tokens=0)
  with pytest.raises(ValueError, match="alibi_slopes"):
    ragged_runs.run(problem, alibi_slopes=np.ones(4, np.float32), **options)


@pytest.mark.parametrize("config", [ragged_runs.SMALL, ragged_runs.SPLIT])
def test_every_query_sees_all_keys_if_not_causal(config):
  problem = ragged_runs.make(kv_lens=[150, 70, 3], q_lens=[40, 70, 5])
  ragged_runs.check(problem, config=config, causal=False)


def _random_mask(problem, max_new):
  """Returns a random mask, in which some tokens see no new token."""
  rng = np.random.default_rng(0)
  mask = rng.random((len(problem.q), max_new)) < rng.random((len(problem.q), 1))
  mask[::5] = False
  return mask


# Fewer columns than query tokens, one word of bits and several; tiles with and
# without a part of the context.
@pytest.mark.parametrize(
  ("max_new", "config", "options"),
  [
    (70, ragged_runs.SMALL, {}),
    (1, ragged_runs.SMALL, {}),
    (31, ragged_runs.SPLIT, dict(sliding_window=1)),
    (33, ragged_runs.SMALL, dict(sliding_window=20, num_sink_tokens=70)),
    (64, Config(128, 2, 1, 2), dict(logits_soft_cap=3.0)),
    (200, Config(128, 2, 3, 2, splits=True), dict(sliding_window=70)),
  ],
)
def test_a_tree_matches_oracle(max_new, config, options):
  # As for a refused row, the tokens of the last sequence were not stored.
  problem = ragged_runs.make(
    kv_lens=[20, 1, 70, 200, 64, 163, 3], q_lens=[0, 1, 7, 63, 64, 65, 9]
  )
  problem.page_indices[3, [1, 9]] = -1, len(problem.k_pages)
  mask = _random_mask(problem, max_new)
  sinks = [-2, 0, 1, 5]
  ragged_runs.check(
    problem, config=config, sinks=sinks, tree_mask=mask, **options
  )


def test_a_window_does_not_bound_new_tokens():
  problem = ragged_runs.make(kv_lens=[100], q_lens=[40], spare_tokens=0)
  mask = np.ones((40, 40), bool)
  ragged_runs.check(problem, tree_mask=mask, sliding_window=1)


@pytest.mark.parametrize("heads", [(10, 2), (128, 1)])
def test_a_tree_of_any_group_matches_oracle(heads):
  problem = ragged_runs.make(
    kv_lens=[90, 9, 130],
    q_lens=[3, 9, 2],
    num_active=2,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=80,
  )
  ragged_runs.check(problem, tree_mask=_random_mask(problem, 9))


@pytest.mark.parametrize("window", [None, 9])
def test_a_chain_is_causal(window):
  problem = ragged_runs.make(kv_lens=[150, 70], q_lens=[40, 70])
  mask = np.zeros((len(problem.q), 70), bool)
  for start, end in ((0, 40), (40, 110)):
    chain = np.tri(end - start, 70, dtype=bool)
    mask[start:end] = np.triu(chain, 1 - (window or 70))
  cases.assert_same_bits(
    ragged_runs.run(problem, sliding_window=window),
    ragged_runs.run(problem, sliding_window=window, tree_mask=mask),
  )


@pytest.mark.parametrize("window", [None, 3])
def test_a_new_token_that_none_sees_leaves_no_trace(window):
  problem = ragged_runs.make(
    kv_lens=[164, 130, 20], q_lens=[70, 64, 4], poison=0.0
  )
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
    if window:  # the last context token that the window hides
      seen = mask[start:end, : end - start].sum(1).min()
      unseen.append((seq, context[seq] + seen - 1 - window))
  runs = []
  for filler in (0.0, np.nan):
    for seq, position in unseen:
      page = problem.page_indices[seq, position // 16]
      for pages in (problem.k_pages, problem.v_pages):
        pages[page, :, position % 16] = filler
    runs.append(ragged_runs.run(problem, tree_mask=mask, sliding_window=window))
  assert np.isfinite(runs[0][0].astype(np.float32)).all()
  cases.assert_same_bits(*runs)


def test_holes_are_skipped():
  problem = ragged_runs.make(kv_lens=[330, 64, 300], q_lens=[70, 64, 90])
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  table[2, 2:6] = num_pages
  ragged_runs.check(problem)
  ragged_runs.check(problem, sliding_window=150, num_sink_tokens=20)


# The interpreter multiplies with NumPy, which warns of Inf - Inf.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_unused_memory_leaves_no_trace(poison):
  clean, poisoned = (
    ragged_runs.run(
      ragged_runs.make(
        kv_lens=[70, 201], q_lens=[70, 5], dtype="float16", poison=filler
      )
    )
    for filler in (0.0, poison)
  )
  cases.assert_same_bits(clean, poisoned)


# In the second case, sink tokens and the window are in one tile.
@pytest.mark.parametrize(("kv_len", "window"), [(300, 100), (64, 15)])
def test_keys_left_of_the_window_leave_no_trace(kv_len, window):
  problem = ragged_runs.make(kv_lens=[kv_len], q_lens=[30], spare_tokens=0)
  options = dict(sliding_window=window, num_sink_tokens=3)
  clean = ragged_runs.run(problem, **options)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  for position in range(3, kv_len - 29 - window):
    page = problem.page_indices[0, position // 16]
    problem.k_pages[page, :, position % 16] = np.nan
    problem.v_pages[page, :, position % 16] = np.nan
  cases.assert_same_bits(clean, ragged_runs.run(problem, **options))


def test_two_runs_are_bitwise_equal():
  cases.assert_same_bits(
    ragged_runs.run(ragged_runs.make(), config=ragged_runs.SPLIT),
    ragged_runs.run(ragged_runs.make(), config=ragged_runs.SPLIT),
  )


def test_all_lengths_share_one_trace():
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return kernel_calls.call(
      ragged_kernel.attend,
      *args,
      sinks=None,
      config=ragged_runs.SMALL,
      interpret=cases.INTERPRET,
      **cases.PLAIN,
    )

  problem = ragged_runs.make(kv_lens=[100, 40], q_lens=[30, 40])
  for cu_q_lens, kv_lens in (([0, 30, 70], [100, 40]), ([0, 1, 9], [7, 8])):
    problem.cu_q_lens = np.asarray(cu_q_lens, np.int32)
    problem.kv_lens = np.asarray(kv_lens, np.int32)
    attend(*problem.args()[:-1], jnp.int32(2))
  assert len(traces) == 1


@pytest.mark.quick
def test_no_sequences_and_no_tokens_are_fine():
  problem = ragged_runs.make(kv_lens=[9], q_lens=[3])
  q, k, v, kv_lens, table, _, _ = problem.args()
  nobody = kv_lens[:0], table[:0], jnp.zeros(1, jnp.int32), jnp.int32(0)
  for queries in (q, q[:0]):
    out, lse = kernel_calls.call(
      ragged_kernel.attend, queries, k, v, *nobody, **cases.PLAIN
    )
    assert not out.any()
    assert np.isneginf(lse).all()
    assert lse.shape == queries.shape[:2]


@pytest.mark.quick
def test_dtypes_must_agree():
  problem = ragged_runs.make(kv_lens=[9], q_lens=[3])
  problem.v_pages = problem.v_pages.astype(np.float16)
  with pytest.raises(ValueError, match="they must match"):
    ragged_runs.run(problem)


@pytest.mark.quick
def test_a_window_must_be_causal():
  problem = ragged_runs.make(kv_lens=[9], q_lens=[3])
  with pytest.raises(ValueError, match="sliding_window=4 must be None"):
    ragged_runs.run(problem, sliding_window=4, causal=False)


@pytest.mark.skipif(
  cases.ON_HOPPER, reason="only the interpreter looks for races"
)
@pytest.mark.parametrize("config", [ragged_runs.SMALL, ragged_runs.SPLIT])
def test_no_memory_is_reused_before_it_was_read(config, capfd):
  problem = ragged_runs.make(kv_lens=[150, 9, 70], q_lens=[70, 9, 1])
  # Only in this test do threads of the interpreter stand for the warps that
  # copy (`warps`).
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  each_warp = ragged_runs.run(problem, config=config, interpret=interpret)
  cases.assert_same_bits(each_warp, ragged_runs.run(problem, config=config))
  quantised = cases.quantise(problem, "int8")
  ragged_runs.run(*quantised, config=config, interpret=interpret)
  assert "RACE" not in capfd.readouterr().out
