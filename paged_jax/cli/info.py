"""`paged-jax info`: what this machine runs, and why."""

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
        f"{op} attention: {_KERNEL}, since its kernel serves bfloat16 with "
        f"head_dim=64 on {device.device_kind!r}."
      )
    else:
      print(f"{op} attention: xla, since {reason}")
  directory = demo.cache_dir()
  print(f"cache folder: {directory}")
  models = ", ".join(path.name for path in sorted(directory.glob("*.gguf")))
  print(f"demo model: {models or 'not fetched yet'}")


def default_device() -> jax.Device:
  """Returns the device everything runs on.

  Raises:
    CommandError: If JAX finds none, as when `JAX_PLATFORMS` names a platform
      that is not there.
  """
  try:
    return devices.default_device()
  # An assertion is what JAX fails with if it lacks the platform's plugin.
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
  """Returns why the Pallas kernel cannot serve these shapes here, or None.

  Args:
    op: One of `ATTENTION_OPS`.
    dtype: Of the model.
    kv_dtype: Of the pages; None is that of the model.
    head_dim: Width of one head.
    num_q_heads: Query heads.
    num_kv_heads: Key and value heads.
    page_size: Tokens a page.
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
