"""`paged-jax info`: shows what this machine runs, and why."""

import argparse
import collections
import importlib.metadata
import platform

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from paged_jax import __version__, devices, dispatch
from paged_jax.checkpoints import demo
from paged_jax.cli.errors import CommandError
from paged_jax.kv import dtypes

_KERNEL = "mosaic_gpu"
ATTENTION_OPS = {
  "decode": dispatch.decode_attention,
  "prefill": dispatch.ragged_attention,
}
_PACKAGES = ("jax", "jaxlib", "flax", "gguf", "tokenizers")


def run(args: argparse.Namespace) -> None:
  """Prints versions, devices, attention implementations and the cache."""
  print(f"python: {platform.python_version()}")
  print(f"paged-jax: {__version__}")
  for package in _PACKAGES:
    print(f"{package}: {_version(package)}")
  device = default_device()
  kinds = collections.Counter(
    f"{d.device_kind} ({d.platform})" for d in jax.devices()
  )
  found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
  print(f"devices: {found}")
  for op in ATTENTION_OPS:
    reason = why_not_kernel(op, dtype=jnp.bfloat16)
    if reason is None:
      print(
        f"{op} attention: {_KERNEL}, since its kernel supports bfloat16 with "
        f"head_dim=64 on {device.device_kind!r}."
      )
    else:
      print(f"{op} attention: xla, since {reason}")
  directory = demo.cache_dir()
  print(f"cache folder: {directory}")
  models = ", ".join(path.name for path in sorted(directory.glob("*.gguf")))
  print(f"demo model: {models or 'not downloaded yet'}")


def default_device() -> jax.Device:
  """Returns the default device of JAX.

  Raises:
    CommandError: If JAX finds no device, for example because `JAX_PLATFORMS`
      names a platform that is not available.
  """
  try:
    return devices.default_device()
  # JAX raises an AssertionError if the platform's plugin is not installed.
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.jax_platforms
    raise CommandError(
      f"JAX_PLATFORMS={platforms!r}: JAX finds no device. {error}".rstrip()
    ) from error


def why_not_kernel(
  op: str,
  *,
  dtype: DTypeLike,
  kv_dtype: DTypeLike | None = None,
  head_dim: int = 64,
  num_q_heads: int = 1,
  num_kv_heads: int = 1,
  page_size: int = 16,
) -> str | None:
  """Returns why the kernel cannot serve these shapes here, or None if it can.

  Args:
    op: One of `ATTENTION_OPS`.
    dtype: Dtype of the model.
    kv_dtype: Dtype of the pages; `dtype` if None.
    head_dim: Width of one head.
    num_q_heads: Number of query heads.
    num_kv_heads: Number of key and value heads.
    page_size: Tokens per page.
  """
  kv_dtype = jnp.dtype(kv_dtype or dtype)
  shapes = dispatch.AttentionShapes(
    num_q_heads=num_q_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtypes.query_dtype(dtype, kv_dtype),
    kv_dtype=kv_dtype,
  )
  return ATTENTION_OPS[op](None, shapes).reason


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"
