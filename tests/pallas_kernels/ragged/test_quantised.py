"""The ragged kernel with quantised pages; see also `test_kernel`."""

import dataclasses

import cases
import numpy as np
import oracle
import pytest
import ragged_runs

from pallas_kernels.common.limits import QUANTISED_DTYPES
from pallas_kernels.ragged import dequantise
from pallas_kernels.ragged.config import Config

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("kv_dtype", QUANTISED_DTYPES)


def _check_quantised(
  problem, kv_dtype, *, config=ragged_runs.SMALL, sinks=None, **options
):
  problem, scales = cases.quantise(problem, kv_dtype)
  expected = oracle.ragged_paged_attention(
    *dataclasses.astuple(cases.dequantise(problem, scales)),
    sinks=sinks,
    **cases.PLAIN | options,
  )
  for each in [config] + [None] * cases.ON_HOPPER:
    out, lse = ragged_runs.run(
      problem, scales, config=each, sinks=sinks, **options
    )
    cases.assert_matches(out, lse, *expected, problem.q.dtype)


@both
def test_alibi_over_quantised_pages_matches_oracle(kv_dtype):
  slopes = np.asarray([0.5, 0.01, -0.003, 0], np.float32)
  _check_quantised(ragged_runs.make(), kv_dtype, alibi_slopes=slopes)


@both
@pytest.mark.parametrize("config", [ragged_runs.SMALL, ragged_runs.SPLIT])
def test_quantised_pages_match_oracle(kv_dtype, config):
  _check_quantised(ragged_runs.make(), kv_dtype, config=config)


@pytest.mark.slow(quick=1)
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
  problem = ragged_runs.make(
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
  problem = ragged_runs.make(kv_lens=[330, 64, 300], q_lens=[70, 64, 90])
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
  problem, scales = cases.quantise(ragged_runs.make(dtype=dtype), kv_dtype)
  cases.assert_same_bits(
    ragged_runs.run(problem, scales),
    ragged_runs.run(cases.dequantise(problem, scales)),
  )


@both
def test_unused_quantised_memory_leaves_no_trace(kv_dtype):
  clean, poisoned = (
    ragged_runs.run(
      *cases.quantise(
        ragged_runs.make(
          kv_lens=[70, 201], q_lens=[70, 5], page_size=64, poison=filler
        ),
        kv_dtype,
      )
    )
    for filler in (0.0, np.nan)
  )
  cases.assert_same_bits(clean, poisoned)


@both
def test_quantised_keys_left_of_the_window_leave_no_trace(kv_dtype):
  problem, scales = cases.quantise(
    ragged_runs.make(kv_lens=[300], q_lens=[30], spare_tokens=0), kv_dtype
  )
  options = dict(sliding_window=100, num_sink_tokens=3)
  clean = ragged_runs.run(problem, scales, **options)
  for position in range(3, 300 - 29 - 100):
    page = problem.page_indices[0, position // 16]
    for name in scales:
      scales[name][page, :, position % 16] = np.nan
  cases.assert_same_bits(clean, ragged_runs.run(problem, scales, **options))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@both
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
def test_a_seen_scale_that_is_nan_shows(kv_dtype, name):
  problem, scales = cases.quantise(
    ragged_runs.make(kv_lens=[70, 20], q_lens=[5, 3], spare_tokens=0), kv_dtype
  )
  scales[name][problem.page_indices[0, 1], 1, 2] = np.nan
  out, _ = ragged_runs.run(problem, scales)
  bad = np.isnan(np.asarray(out, np.float32)).all(-1)
  assert bad[:5].tolist() == [[False, False, True, True]] * 5
  assert not bad[5:].any()


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_cut_where_numbers_leave_the_dtype(kv_dtype, dtype):
  problem, scales = cases.quantise(ragged_runs.make(dtype=dtype), kv_dtype)
  limit = np.float32(dequantise.largest_scale(dtype, kv_dtype))
  cut = {name: x.copy() for name, x in scales.items()}
  page = problem.page_indices[3, 2]
  scales["v_scales"][page, 0, 5], cut["v_scales"][page, 0, 5] = 3e38, limit
  out, lse = ragged_runs.run(problem, scales)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  cases.assert_same_bits(
    (out, lse), ragged_runs.run(cases.dequantise(problem, cut))
  )


@pytest.mark.quick
def test_scales_must_belong_to_pages():
  problem, scales = cases.quantise(
    ragged_runs.make(kv_lens=[9], q_lens=[3]), "int8"
  )
  with pytest.raises(ValueError, match="v_scales must be an array"):
    ragged_runs.run(problem, dict(k_scales=scales["k_scales"]))
  with pytest.raises(ValueError, match="k_scales.dtype=float16"):
    ragged_runs.run(
      problem, scales | dict(k_scales=scales["k_scales"].astype("float16"))
    )
  with pytest.raises(ValueError, match="k_scales must be None"):
    ragged_runs.run(ragged_runs.make(kv_lens=[9], q_lens=[3]), scales)
