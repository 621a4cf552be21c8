"""The decode kernel with quantised pages; see also `test_kernel`."""

import dataclasses

import cases
import decode_runs
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels.common import limits
from pallas_kernels.decode.config import Config

pytestmark = pytest.mark.slow


def _check_quantised(problem, kv_dtype, **options):
  problem, scales = cases.quantise(problem, kv_dtype)
  decode_runs.check(problem, scales=scales, **options)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
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
  problem = decode_runs.make(
    [0, 1, page_size + 1, 200],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  _check_quantised(problem, kv_dtype)


@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_quantised_pages_take_every_option(kv_dtype, batch_invariant):
  problem = decode_runs.make_shared(330, 64, 300)
  problem.page_indices[0, 3] = len(problem.k_pages)
  _check_quantised(
    problem,
    kv_dtype,
    **decode_runs.SHARED,
    sliding_window=150,
    num_sink_tokens=20,
    logits_soft_cap=30.0,
    alibi_slopes=(0.02, -0.01, 0.3),
    batch_invariant=batch_invariant,
  )


def test_values_of_any_size_weigh_as_they_should():
  problem = decode_runs.make([200, 130], dtype="float16")
  rng = np.random.default_rng(0)
  rows = problem.v_pages.astype(np.float64)
  sizes = 10.0 ** rng.uniform(-12, 12, rows.shape[:3])
  data, v_scales = cases.quantise_rows(rows * sizes[..., None], "int8")
  problem, scales = cases.quantise(problem, "int8")
  problem.v_pages = data
  problem.q = problem.q.astype(jnp.bfloat16)  # its range holds the output
  decode_runs.check(problem, scales=scales | dict(v_scales=v_scales))


def test_values_that_are_all_zero_count_in_the_denominator():
  problem, scales = cases.quantise(decode_runs.make([70, 130]), "int8")
  for position in range(64):
    page = problem.page_indices[1, position // 16]
    problem.v_pages[page, :, position % 16] = 0
    scales["v_scales"][page, :, position % 16] = 0
  decode_runs.check(problem, scales=scales)


# The value scales of the first tile and of the second differ by a factor 2^140.
@pytest.mark.parametrize("num_programs", [1, 3])
def test_the_denominator_keeps_keys_whose_values_are_zero(num_programs):
  problem, scales = cases.quantise(
    decode_runs.make([130], dtype="float16"), "int8"
  )
  problem.q = problem.q.astype(jnp.bfloat16)
  scales["v_scales"] = np.where(np.isnan(scales["v_scales"]), np.nan, 2.0**40)
  scales["v_scales"] = scales["v_scales"].astype(np.float32)
  for position in range(64):
    page = problem.page_indices[0, position // 16]
    problem.v_pages[page, :, position % 16] = 0
    scales["v_scales"][page, :, position % 16] = 0
  decode_runs.check(problem, scales=scales, config=Config(64, 2, num_programs))


def test_a_scale_of_values_that_is_nan_spares_the_log_sum_exp():
  problem, scales = cases.quantise(decode_runs.make([70, 130]), "int8")
  page = problem.page_indices[1, 3]
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], **cases.PLAIN, **scales
  )
  scales["v_scales"][page, 0, 5] = np.nan
  out, lse = decode_runs.run(
    problem, **{name: jnp.asarray(x) for name, x in scales.items()}
  )
  assert np.isnan(out[1].astype(np.float32)).all()
  cases.assert_matches(out[:1], lse[:1], *(x[:1] for x in expected), "bfloat16")
  np.testing.assert_allclose(lse, expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
def test_unused_quantised_memory_leaves_no_trace(kv_dtype):
  runs = []
  for filler in (0.0, np.nan):
    problem, scales = cases.quantise(
      decode_runs.make([1, 70, 201], poison=filler), kv_dtype
    )
    scales = {name: jnp.asarray(x) for name, x in scales.items()}
    runs.append(decode_runs.run(problem, **scales))
  cases.assert_same_bits(*runs)


@pytest.mark.quick
def test_scales_of_another_shape_are_refused():
  problem, scales = cases.quantise(decode_runs.make([3]), "int8")
  scales = {name: jnp.asarray(x) for name, x in scales.items()}
  with pytest.raises(ValueError, match="v_scales must be an array"):
    decode_runs.run(problem, k_scales=scales["k_scales"])
  with pytest.raises(
    ValueError, match="k_scales.dtype=float16 must be float32"
  ):
    decode_runs.run(
      problem, **scales | dict(k_scales=scales["k_scales"].astype("float16"))
    )
  with pytest.raises(ValueError, match="k_scales must be None"):
    decode_runs.run(decode_runs.make([3]), **scales)
