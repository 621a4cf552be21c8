"""The decode kernel with a few query tokens per sequence."""

import dataclasses

import cases
import jax.numpy as jnp
import kernel_calls
import numpy as np
import oracle
import pytest

import paged_jax
from pallas_kernels.common import limits
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import short_queries
from pallas_kernels.decode.config import Config

pytestmark = pytest.mark.slow

# A new sequence, no query, page boundaries, no tokens, several tiles.
Q_LENS = [3, 0, 1, 4, 0, 4]
KV_LENS = [3, 20, 16, 17, 0, 150]


def _run(problem, *, max_q_len=4, sinks=None, tree_mask=None, **options):
  options = cases.on_device(options)
  return kernel_calls.call(
    short_queries.attend,
    *problem.args(),
    max_q_len=max_q_len,
    sinks=None if sinks is None else jnp.asarray(sinks),
    tree_mask=None if tree_mask is None else jnp.asarray(tree_mask),
    config=Config(64, 2, 5),
    interpret=cases.INTERPRET,
    **cases.PLAIN | options,
  )


def _check(problem, *, sinks=None, max_q_len=4, **options):
  out, lse = _run(problem, max_q_len=max_q_len, sinks=sinks, **options)
  judged = cases.PLAIN | options
  judged.pop("batch_invariant", None)  # the oracle has no such option
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), sinks=sinks, **judged
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


@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
def test_quantised_pages_in_fixed_splits_match_oracle(kv_dtype):
  problem = cases.make(
    kv_lens=[3, 20, 16, 17, 0, 550],  # 9 tiles: 3 splits
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


def _random_mask(problem, max_new, seed=0):
  """Returns a random mask, in which some tokens see no new token."""
  rng = np.random.default_rng(seed)
  mask = rng.random((len(problem.q), max_new)) < 0.5
  mask[::5] = False
  return mask


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("max_q_len", "max_new", "options"),
  [
    (4, 4, {}),
    (5, 40, {}),
    (4, 3, dict(sliding_window=1)),
    (4, 4, dict(sliding_window=70, num_sink_tokens=5, logits_soft_cap=3.0)),
    (4, 4, dict(sliding_window=2, num_sink_tokens=30, batch_invariant=True)),
  ],
)
def test_a_tree_matches_oracle(max_q_len, max_new, options):
  problem = cases.make(
    # New tokens in two tiles, at the start of a tile, and none stored.
    kv_lens=[3, 20, 16, 66, 0, 150, 68],
    q_lens=[3, 0, 1, 4, 3, 4, 4],
    num_q_heads=6,
    dtype="bfloat16",
    spare_tokens=2,
  )
  problem.page_indices[5, 4] = len(problem.k_pages)
  mask = _random_mask(problem, max_new)
  sinks = np.linspace(-2, 2, 6).astype(np.float32)
  _check(problem, max_q_len=max_q_len, sinks=sinks, tree_mask=mask, **options)


def test_a_window_does_not_bound_new_tokens():
  problem = cases.make(kv_lens=[68], q_lens=[8], dtype="bfloat16")
  mask = np.ones((8, 8), bool)
  _check(problem, max_q_len=8, tree_mask=mask, sliding_window=1)


@pytest.mark.parametrize("max_q_len", [1, 2])
def test_a_token_need_not_see_itself(max_q_len):
  problem = cases.make(kv_lens=[1, 1, 65, 20], dtype="bfloat16")
  mask = np.array([[False], [True], [False], [True]])
  _check(problem, max_q_len=max_q_len, tree_mask=mask)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_new_token_that_none_sees_leaves_no_trace(kv_dtype, window):
  problem = cases.make(
    kv_lens=[66, 64, 20], q_lens=[4, 3, 4], dtype="bfloat16", poison=0.0
  )
  mask = _random_mask(problem, 4)
  mask[:, 1] = True
  mask[:4, [0, 2]], mask[4:7, 2], mask[7:, 0] = False, False, False
  unseen = [(0, 62), (0, 64), (1, 63), (2, 16)]
  if window:
    # The last context token that the window hides.
    num_seen = [mask[a:b].sum(1).min() for a, b in [(0, 4), (4, 7), (7, 11)]]
    context = [62, 61, 16]
    unseen += [
      (i, context[i] + num_seen[i] - 1 - window) for i in range(len(context))
    ]
  runs = []
  for filler in (0.0, np.nan):
    problem.k_pages = np.array(problem.k_pages)
    problem.v_pages = np.array(problem.v_pages)
    for seq, position in unseen:
      page = problem.page_indices[seq, position // 16]
      for pages in (problem.k_pages, problem.v_pages):
        pages[page, :, position % 16] = filler
    run, scales = problem, {}
    if kv_dtype:
      run, scales = cases.quantise(problem, kv_dtype)
    scales = {name: jnp.asarray(x) for name, x in scales.items()}
    runs.append(_run(run, tree_mask=mask, sliding_window=window, **scales))
  for x in runs[0]:
    assert np.isfinite(np.asarray(x, np.float32)).all()
  cases.assert_same_bits(*runs)


@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
def test_a_tree_over_quantised_pages_matches_oracle(kv_dtype):
  problem = cases.make(kv_lens=KV_LENS, q_lens=Q_LENS, dtype="bfloat16")
  mask = _random_mask(problem, 4)
  problem, scales = cases.quantise(problem, kv_dtype)
  out, lse = _run(
    problem,
    tree_mask=mask,
    **{name: jnp.asarray(x) for name, x in scales.items()},
  )
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(problem), tree_mask=mask, **cases.PLAIN, **scales
  )
  cases.assert_matches(out, lse, *expected, "bfloat16")


@pytest.mark.parametrize("max_q_len", [1, 4])
def test_every_query_sees_all_keys_if_not_causal(max_q_len):
  q_lens = np.minimum(Q_LENS, max_q_len)
  problem = cases.make(kv_lens=KV_LENS, q_lens=q_lens, dtype="bfloat16")
  _check(problem, max_q_len=max_q_len, causal=False)


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


@pytest.mark.quick
def test_no_sequences_and_no_tokens_are_fine():
  problem = cases.make(kv_lens=[9], dtype="bfloat16")
  q, k, v, kv_lens, table, _, _ = problem.args()
  nobody = kv_lens[:0], table[:0], jnp.zeros(1, jnp.int32), jnp.int32(0)
  options = dict(max_q_len=2, sinks=None, **cases.PLAIN)
  for queries in (q, q[:0]):
    out, lse = kernel_calls.call(
      short_queries.attend, queries, k, v, *nobody, **options
    )
    assert not out.any()
    assert np.isneginf(lse).all()
    assert lse.shape == queries.shape[:2]


@pytest.mark.quick
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


@pytest.mark.quick
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
