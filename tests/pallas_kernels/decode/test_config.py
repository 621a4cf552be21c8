"""Limits and configs of the decode kernel, and its lowering without a GPU."""

import itertools

import jax
import jax.numpy as jnp
import kernel_calls
import pytest

from pallas_kernels.common import gpu, limits
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.decode import short_queries
from pallas_kernels.decode.config import Config

pytestmark = pytest.mark.slow

PLAIN = dict(
  scale=0.125, sliding_window=None, num_sink_tokens=0, logits_soft_cap=None
)


def _lower(
  *,
  heads,
  head_dim,
  page_size,
  dtype,
  kv_dtype=None,
  num_seqs=3,
  config=None,
  has_alibi=False,
  **options,
):
  """Lowers the kernel for Hopper; no GPU is needed."""
  page = heads[1], page_size, head_dim
  pages = jax.ShapeDtypeStruct((99, *page), kv_dtype or dtype)
  scales = None
  if kv_dtype is not None:
    scales = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)

  def run(*args):
    *args, sinks, alibi_slopes, k_scales, v_scales = args
    return kernel_calls.call(
      decode_kernel.paged_decode,
      *args,
      sinks=sinks,
      alibi_slopes=alibi_slopes,
      k_scales=k_scales,
      v_scales=v_scales,
      config=config,
      **PLAIN | options,
    )

  per_head = jax.ShapeDtypeStruct((heads[0],), jnp.float32)
  return (
    jax.jit(run)
    .trace(
      jax.ShapeDtypeStruct((num_seqs, heads[0], head_dim), dtype),
      pages,
      pages,
      jax.ShapeDtypeStruct((num_seqs,), jnp.int32),
      jax.ShapeDtypeStruct((num_seqs, 40), jnp.int32),
      per_head,
      per_head if has_alibi else None,
      scales,
      scales,
    )
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )


# Few and many items have different default configs; 8, 32 and 64 columns.
@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("head_dim", "num_seqs", "heads", "page_size", "dtype"),
  [
    (head_dim, *rest)
    for head_dim, rest in itertools.product(
      limits.HEAD_DIMS,
      [
        (3, (2, 2), 8, "bfloat16"),
        (300, (64, 2), 24, "float16"),
        (3, (64, 1), 256, "bfloat16"),
      ],
    )
    if decode_config.unsupported(head_dim, 8, *rest[1], "bfloat16") is None
  ],
)
def test_lowers_to_hopper(head_dim, num_seqs, heads, page_size, dtype):
  text = _lower(
    head_dim=head_dim,
    num_seqs=num_seqs,
    heads=heads,
    page_size=page_size,
    dtype=dtype,
  )
  assert "mosaic_gpu" in text


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("kv_dtype", limits.QUANTISED_DTYPES)
@pytest.mark.parametrize("head_dim", limits.HEAD_DIMS)
def test_quantised_pages_lower_to_hopper(head_dim, kv_dtype):
  text = _lower(
    head_dim=head_dim,
    num_seqs=300,
    heads=(8, 2),
    page_size=8,
    dtype="bfloat16",
    kv_dtype=kv_dtype,
    batch_invariant=True,
    has_alibi=kv_dtype == "int8",
  )
  assert "mosaic_gpu" in text


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  "options",
  [
    dict(config=Config(128, 2, 4), sliding_window=100),
    dict(
      config=Config(64, 4, 1),
      sliding_window=100,
      num_sink_tokens=4,
      logits_soft_cap=30.0,
      has_alibi=True,
    ),
  ],
  ids=str,
)
def test_lowers_to_hopper_with_options(options):
  shapes = dict(heads=(8, 2), head_dim=128, page_size=16, dtype="bfloat16")
  assert "mosaic_gpu" in _lower(**shapes, **options)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("head_dim", "heads", "max_q_len"),
  [(64, (64, 8), 8), (80, (2, 2), 1), (128, (8, 1), 8), (256, (8, 2), 8)],
)
@pytest.mark.parametrize(
  "options",
  [
    dict(causal=False),
    dict(max_new=8),
    dict(max_new=100, sliding_window=100, num_sink_tokens=4),
    dict(max_new=4, kv_dtype="int8"),
  ],
  ids=str,
)
def test_few_query_tokens_lower_to_hopper(head_dim, heads, max_q_len, options):
  array, num_seqs = jax.ShapeDtypeStruct, 9
  options = PLAIN | options
  max_new = options.pop("max_new", None)
  kv_dtype = options.pop("kv_dtype", None)
  pages = array((99, heads[1], 16, head_dim), kv_dtype or "bfloat16")
  scales = kv_dtype and array(pages.shape[:3], jnp.float32)
  num_tokens = num_seqs * max_q_len

  def run(*args):
    *args, tree_mask, scales = args
    more = dict(k_scales=scales, v_scales=scales, tree_mask=tree_mask)
    return kernel_calls.call(
      short_queries.attend,
      *args,
      max_q_len=max_q_len,
      sinks=None,
      **more,
      **options,
    )

  traced = jax.jit(run).trace(
    array((num_tokens, heads[0], head_dim), jnp.bfloat16),
    pages,
    pages,
    array((num_seqs,), jnp.int32),
    array((num_seqs, 40), jnp.int32),
    array((num_seqs + 1,), jnp.int32),
    array((), jnp.int32),
    max_new and array((num_tokens, max_new), jnp.bool_),
    scales,
  )
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_given_config_lowers_to_hopper():
  text = _lower(
    heads=(32, 1),
    head_dim=64,
    page_size=16,
    dtype="float16",
    num_seqs=512,
    config=Config(128, 3, 264),
  )
  assert "mosaic_gpu" in text


@pytest.mark.quick
@pytest.mark.parametrize(
  ("changed", "reason"),
  [
    (dict(dtype="float32"), "dtype=float32"),
    (dict(head_dim=72), "head_dim=72"),
    (dict(page_size=12), "page_size=12"),
    (dict(num_q_heads=9), "num_q_heads=9"),
    (dict(num_q_heads=130), "group=65"),
    (dict(num_q_heads=98, head_dim=192), "group=49"),
  ],
)
def test_unsupported_names_the_value(changed, reason):
  shapes = dict(
    head_dim=128, page_size=16, num_q_heads=8, num_kv_heads=2, dtype="bfloat16"
  )
  assert decode_config.unsupported(**shapes) is None
  assert reason in str(decode_config.unsupported(**shapes | changed))


@pytest.mark.quick
@pytest.mark.parametrize("fields", [(96, 2, 1), (64, 1, 1), (64, 2, 0)])
def test_config_refuses_bad_values(fields):
  with pytest.raises(ValueError, match="must be"):
    Config(*fields)


@pytest.mark.quick
def test_config_beyond_shared_memory_is_refused():
  config = Config(128, 4, 1)
  needed = decode_config.smem_bytes(config, 4, 128, jnp.bfloat16)
  assert needed > limits.SMEM_LIMIT
  with pytest.raises(ValueError, match=f"takes {needed} bytes"):
    _lower(
      heads=(4, 1), head_dim=128, page_size=16, dtype="bfloat16", config=config
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", limits.HEAD_DIMS)
def test_default_config_fits_and_fills_the_device(head_dim, dtype):
  for group, num_seqs in itertools.product(range(1, 65), (1, 20, 300)):
    if decode_config.unsupported(head_dim, 8, 2 * group, 2, "bfloat16"):
      continue
    config = decode_config.default_config(
      2 * num_seqs, group, head_dim, dtype, device=gpu.Gpu("", 100)
    )
    needed = decode_config.smem_bytes(config, group, head_dim, dtype)
    assert needed <= limits.SMEM_LIMIT
    assert config.num_programs in (100, 200)
    # The hardware reserves 1 KiB more for each program.
    each = config.num_programs // 100
    assert each * (needed + 1024) <= limits.SM_SMEM
