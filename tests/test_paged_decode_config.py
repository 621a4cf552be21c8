"""What the decode kernel takes, and that it lowers: no GPU needed."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_decode
from pallas_kernels.paged_decode import Config

PLAIN = dict(
  scale=0.125, sliding_window=None, num_sink_tokens=0, logits_soft_cap=None
)


def _lower(*, heads, head_dim, page_size, dtype, config=None, **options):
  """Lowers the kernel to Hopper, which needs no GPU."""
  pages = jax.ShapeDtypeStruct((99, heads[1], page_size, head_dim), dtype)
  return (
    jax.jit(
      lambda *args: paged_decode.paged_decode(
        *args[:5], sinks=args[5], config=config, **PLAIN | options
      )
    )
    .trace(
      jax.ShapeDtypeStruct((3, heads[0], head_dim), dtype),
      pages,
      pages,
      jax.ShapeDtypeStruct((3,), jnp.int32),
      jax.ShapeDtypeStruct((3, 40), jnp.int32),
      jax.ShapeDtypeStruct((heads[0],), jnp.float32),
    )
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize(
  ("heads", "page_size", "dtype"),
  [
    ((2, 2), 8, "bfloat16"),
    ((9, 3), 16, "float16"),
    ((64, 1), 24, "float16"),
    ((4, 1), 256, "bfloat16"),
  ],
)
def test_lowers_to_hopper(head_dim, heads, page_size, dtype):
  shapes = dict(
    heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype
  )
  assert "mosaic_gpu" in _lower(**shapes)


@pytest.mark.parametrize(
  "options",
  [
    dict(config=Config(128, 2, 4)),
    dict(config=Config(64, 4, 1)),
    dict(sliding_window=100),
    dict(sliding_window=100, num_sink_tokens=4),
    dict(logits_soft_cap=30.0),
  ],
  ids=str,
)
def test_lowers_to_hopper_with_options(options):
  shapes = dict(heads=(8, 2), head_dim=128, page_size=16, dtype="bfloat16")
  assert "mosaic_gpu" in _lower(**shapes, **options)


@pytest.mark.parametrize(
  ("changed", "reason"),
  [
    (dict(dtype="float32"), "dtype=float32"),
    (dict(head_dim=80), "head_dim=80"),
    (dict(page_size=12), "page_size=12"),
    (dict(num_q_heads=9), "num_q_heads=9"),
    (dict(num_q_heads=130), "group=65"),
  ],
)
def test_unsupported_names_the_value(changed, reason):
  shapes = dict(
    head_dim=128, page_size=16, num_q_heads=8, num_kv_heads=2, dtype="bfloat16"
  )
  assert paged_decode.unsupported(**shapes) is None
  assert reason in str(paged_decode.unsupported(**shapes | changed))


@pytest.mark.parametrize("fields", [(96, 2, 1), (64, 1, 1), (64, 2, 0)])
def test_config_refuses_bad_values(fields):
  with pytest.raises(ValueError, match="must be"):
    Config(*fields)


def test_config_beyond_shared_memory_is_refused():
  config = Config(128, 3, 1)
  needed = paged_decode.smem_bytes(config, 128, jnp.bfloat16)
  assert needed > paged_decode.SMEM_LIMIT
  with pytest.raises(ValueError, match=f"takes {needed} bytes"):
    _lower(
      heads=(4, 1), head_dim=128, page_size=16, dtype="bfloat16", config=config
    )


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("num_seqs", [1, 8, 20, 64, 256])
def test_default_config_fits_and_fills_the_device(head_dim, num_seqs):
  config = paged_decode.default_config(num_seqs, 8, head_dim, 16, 8192)
  needed = paged_decode.smem_bytes(config, head_dim, jnp.bfloat16)
  assert needed <= paged_decode.SMEM_LIMIT
  waves = num_seqs * 8 * config.num_splits / paged_decode.NUM_SMS
  assert waves / np.ceil(waves) > 0.9


def test_default_config_does_not_split_what_a_window_hides():
  options = dict(sliding_window=128, num_sink_tokens=4)
  config = paged_decode.default_config(1, 1, 128, 16, 8192, **options)
  assert config.num_splits <= 2
