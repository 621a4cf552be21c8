"""Limits and configs of the ragged kernel, and its lowering without a GPU."""

import dataclasses
import itertools

import cases
import jax
import jax.numpy as jnp
import kernel_calls
import pytest
from jax.experimental.mosaic.gpu import core as mosaic

from pallas_kernels.common import gpu
from pallas_kernels.common.limits import (
  HEAD_DIMS,
  QUANTISED_DTYPES,
  SMEM_LIMIT,
)
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged import kernel as ragged_kernel
from pallas_kernels.ragged.config import Config, default_config

pytestmark = pytest.mark.slow


def _lower(
  *,
  num_tokens=4096,
  heads=(8, 2),
  head_dim=128,
  page_size=16,
  dtype="bfloat16",
  kv_dtype=None,
  config=None,
  max_new=None,
  has_alibi=False,
  **options,
):
  """Lowers the kernel for Hopper; no GPU is needed."""
  shape = 99, heads[1], page_size, head_dim
  pages = jax.ShapeDtypeStruct(shape, kv_dtype or dtype)
  scales = kv_dtype and jax.ShapeDtypeStruct(shape[:3], jnp.float32)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  return (
    jax.jit(
      lambda *args: kernel_calls.call(
        ragged_kernel.attend,
        *args[:7],
        sinks=args[7],
        k_scales=args[8],
        v_scales=args[8],
        tree_mask=args[9],
        alibi_slopes=args[7] if has_alibi else None,
        config=config,
        **cases.PLAIN | options,
      )
    )
    .trace(
      jax.ShapeDtypeStruct((num_tokens, heads[0], head_dim), dtype),
      pages,
      pages,
      ints(5),
      ints(5, 40),
      ints(6),
      ints(),
      jax.ShapeDtypeStruct((heads[0],), jnp.float32),
      scales,
      max_new and jax.ShapeDtypeStruct((num_tokens, max_new), jnp.bool_),
    )
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )


# Many items, and few, which the default config splits.
@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("head_dim", "num_tokens", "heads", "page_size", "dtype"),
  [
    (head_dim, *rest)
    for head_dim, rest in itertools.product(
      HEAD_DIMS,
      [
        (99999, (32, 8), 16, "bfloat16"),
        (100, (1, 1), 8, "float16"),
        (300, (128, 1), 256, "bfloat16"),
      ],
    )
  ],
)
def test_lowers_to_hopper(head_dim, num_tokens, heads, page_size, dtype):
  text = _lower(
    head_dim=head_dim,
    num_tokens=num_tokens,
    heads=heads,
    page_size=page_size,
    dtype=dtype,
  )
  assert "mosaic_gpu" in text


@pytest.mark.parametrize("kv_dtype", QUANTISED_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantised_pages_lower_to_hopper(head_dim, kv_dtype):
  shapes = [(99999, (32, 8), 16, "bfloat16"), (100, (2, 1), 8, "float16")]
  for num_tokens, heads, page_size, dtype in shapes:
    text = _lower(
      head_dim=head_dim,
      num_tokens=num_tokens,
      heads=heads,
      page_size=page_size,
      dtype=dtype,
      kv_dtype=kv_dtype,
    )
    assert "mosaic_gpu" in text


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_smem_bytes_is_the_requested_shared_memory(
  head_dim, kv_dtype, monkeypatch
):
  monkeypatch.setattr(mosaic, "_SMEM_SIZE_BOUND", 0)
  is_quantised = kv_dtype is not None
  for config in (
    default_config(4096, 2, 4, head_dim, is_quantised=is_quantised),
    Config(64, 2, num_compute_wgs=1, num_q_stages=2),
  ):
    needed = ragged_config.smem_bytes(config, head_dim, is_quantised)
    with pytest.raises(ValueError, match=f"smem_bytes={needed} >"):
      _lower(head_dim=head_dim, kv_dtype=kv_dtype, config=config)


@pytest.mark.parametrize(
  "options",
  [
    dict(sliding_window=100, num_sink_tokens=4, logits_soft_cap=30.0),
    dict(causal=False, scale=-1.0),
    dict(has_alibi=True),
    dict(has_alibi=True, kv_dtype="int8", config=Config(64, 2, splits=True)),
    dict(max_new=4),
    dict(max_new=100, sliding_window=100, config=Config(64, 2, splits=True)),
    dict(config=Config(64, 4)),
    dict(config=Config(128, 2, p_in_smem=True)),
    dict(config=Config(64, 2, num_compute_wgs=3), head_dim=64),
    dict(config=Config(64, 2, num_compute_wgs=1, splits=True)),
  ],
  ids=str,
)
def test_lowers_to_hopper_with_options(options):
  assert "mosaic_gpu" in _lower(**options)


@pytest.mark.quick
@pytest.mark.parametrize(
  ("changed", "reason"),
  [
    (dict(dtype="float32"), "dtype=float32"),
    (dict(head_dim=72), "head_dim=72"),
    (dict(page_size=12), "page_size=12"),
    (dict(num_q_heads=9), "num_q_heads=9"),
    (dict(num_q_heads=258), "group=129"),
    (dict(kv_dtype="float16"), "kv_dtype=float16 with dtype=bfloat16"),
    (dict(kv_dtype="float8_e5m2"), "kv_dtype=float8_e5m2"),
  ],
)
def test_unsupported_names_the_value(changed, reason):
  shapes = dict(
    head_dim=128, page_size=16, num_q_heads=8, num_kv_heads=2, dtype="bfloat16"
  )
  assert ragged_config.unsupported(**shapes) is None
  assert ragged_config.unsupported(**shapes, kv_dtype="int8") is None
  assert reason in str(ragged_config.unsupported(**shapes | changed))


@pytest.mark.quick
@pytest.mark.parametrize(
  "fields", [(96, 2), (64, 1), (64, 2, 4), (64, 2, 2, 0), (64, 2, 2, 1, 3)]
)
def test_config_refuses_bad_values(fields):
  with pytest.raises(ValueError, match="must be"):
    Config(*fields)


@pytest.mark.quick
def test_config_beyond_shared_memory_is_refused():
  config = Config(128, 3)
  needed = ragged_config.smem_bytes(config, 128)
  assert needed > SMEM_LIMIT
  with pytest.raises(ValueError, match=f"takes {needed} bytes"):
    _lower(config=config)


@pytest.mark.quick
def test_config_with_too_few_rows_is_refused():
  with pytest.raises(ValueError, match="must be a multiple of self.group=128"):
    _lower(heads=(128, 1), config=Config(64, 2, num_compute_wgs=1))


@pytest.mark.quick
@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_default_config_fits_and_fills_the_device(head_dim, is_quantised):
  for num_tokens, group in itertools.product((1, 512, 16384), (1, 4, 128)):
    config = default_config(
      num_tokens,
      2,
      group,
      head_dim,
      is_quantised=is_quantised,
      device=gpu.Gpu("", 100),
    )
    needed = ragged_config.smem_bytes(config, head_dim, is_quantised)
    assert needed <= SMEM_LIMIT
    assert config.num_programs == 100
    items = num_tokens * group * 2 // config.block_q
    assert config.splits or items >= 100


@pytest.mark.quick
def test_registers_suffice_for_all_warpgroups():
  config = Config(64, 2)
  for num_wgs, *shape in itertools.product((2, 3), HEAD_DIMS, (False, True)):
    config = dataclasses.replace(config, num_compute_wgs=num_wgs)
    compute, memory = ragged_config.registers(config, *shape)
    assert num_wgs * compute + memory <= 512


@pytest.mark.quick
@pytest.mark.parametrize("num_wgs", [2, 3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_quantised", [False, True])
def test_warpgroups_do_not_ask_for_more_registers_than_a_program_has(
  head_dim, num_wgs, is_quantised
):
  config = Config(64, 2, num_compute_wgs=num_wgs)
  compute, memory = ragged_config.registers(config, head_dim, is_quantised)
  each = 65_536 // (128 * (num_wgs + 1)) // 8 * 8
  assert compute * num_wgs + memory <= each * (num_wgs + 1)
