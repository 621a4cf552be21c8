"""Chooses the implementation of each op, and says why a kernel cannot serve it.

  "mosaic_gpu"  Pallas kernels for Hopper GPUs (`pallas_kernels`)
  "xla"         plain JAX: every option, every device

There is one function for each op. None of them imports a kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from paged_jax import devices
from pallas_kernels.decode import config as decode_config
from pallas_kernels.pages import limits as page_limits
from pallas_kernels.ragged import config as ragged_config

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


@dataclasses.dataclass(frozen=True)
class Choice:
  """The implementation of an op, for arguments of certain shapes."""

  implementation: str  # one of IMPLEMENTATIONS
  reason: str | None  # why no kernel can serve the op; None if one can
  # For attention: whether the decode kernel serves it, not the ragged kernel.
  uses_decode_kernel: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShapes:
  """The shapes and dtypes that decide whether a kernel can serve attention."""

  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  page_size: int
  dtype: DTypeLike  # of the queries
  kv_dtype: DTypeLike  # of the pages

  @classmethod
  def of(
    cls, q: Array | jax.ShapeDtypeStruct, k_pages: Array | jax.ShapeDtypeStruct
  ) -> "AttentionShapes":
    """Returns the shapes of queries and pages.

    Args:
      q: [..., num_q_heads, head_dim].
      k_pages: [..., num_kv_heads, page_size, head_dim].
    """
    *_, num_kv_heads, page_size, head_dim = k_pages.shape
    return cls(
      num_q_heads=q.shape[-2],
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      page_size=page_size,
      dtype=q.dtype,
      kv_dtype=k_pages.dtype,
    )

  @property
  def positional(self) -> tuple[int, int, int, int, DTypeLike]:
    """The positional arguments of both kernels' `unsupported`."""
    return (
      self.head_dim,
      self.page_size,
      self.num_q_heads,
      self.num_kv_heads,
      self.dtype,
    )


def decode_attention(
  implementation: str | None, shapes: AttentionShapes
) -> Choice:
  """Chooses the implementation of `paged_attention`.

  Args:
    implementation: The implementation that the caller requests, or None.
    shapes: Shapes of the arguments.

  Raises:
    ValueError: If the implementation is unknown.
    NotImplementedError: If the kernel is requested and cannot serve the op.
  """
  return _choose(
    implementation, _why_not_decode(shapes, 1), uses_decode_kernel=True
  )


def ragged_attention(
  implementation: str | None,
  shapes: AttentionShapes,
  *,
  max_q_len: int | None = None,
  causal: bool = True,
  has_alibi: bool = False,
) -> Choice:
  """Chooses the implementation of `ragged_paged_attention`.

  Args:
    implementation: The implementation that the caller requests, or None.
    shapes: Shapes of the arguments.
    max_q_len: Upper bound of the query tokens of a sequence, None if unknown.
      If the decode kernel supports it, that kernel serves the op.
    causal: Whether a query sees only keys up to its own position.
    has_alibi: Whether there are ALiBi slopes.

  Raises:
    ValueError: If the implementation is unknown.
    NotImplementedError: If a kernel is requested and none can serve the op.
  """
  if max_q_len is not None and _why_not_decode(shapes, max_q_len) is None:
    return _choose(implementation, None, uses_decode_kernel=True)
  if has_alibi and not causal:
    reason = "the ragged kernel supports alibi_slopes only with causal=True."
  else:
    reason = ragged_config.unsupported(
      *shapes.positional, kv_dtype=shapes.kv_dtype
    )
  return _choose(implementation, reason)


def kv_write(
  implementation: str | None,
  pool_shape: tuple[int, ...],
  dtype: DTypeLike,
  num_tokens: int,
) -> Choice:
  """Chooses the implementation of writes to a pool.

  Args:
    implementation: The implementation that the caller requests, or None.
    pool_shape: Shape of `KVPool.k`.
    dtype: Dtype of `KVPool.k`.
    num_tokens: Number of tokens to write.

  Raises:
    ValueError: If the implementation is unknown.
    NotImplementedError: If the kernel is requested and cannot serve the op.
  """
  # For quantised tokens, the kernel takes 12 to 15 % longer than a scatter
  # (H200, benchmarks.kv_write). float32 was not measured.
  by_default = jnp.dtype(dtype).itemsize == 2
  return _choose(
    implementation,
    page_limits.unsupported_write(pool_shape, dtype, num_tokens),
    by_default=by_default,
  )


def page_copy(
  implementation: str | None, pools: list[Array | jax.ShapeDtypeStruct]
) -> Choice:
  """Chooses the implementation of page copies.

  Args:
    implementation: The implementation that the caller requests, or None.
    pools: The arrays of a pool; their first axis is the page.

  Raises:
    ValueError: If the implementation is unknown.
    NotImplementedError: If the kernel is requested and cannot serve the op.
  """
  reasons = (page_limits.unsupported_copy(x.shape[1:], x.dtype) for x in pools)
  return _choose(implementation, next(filter(None, reasons), None))


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError if the implementation is unknown."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} must be None or one of {IMPLEMENTATIONS}."
    )


def _why_not_decode(shapes: AttentionShapes, max_q_len: int) -> str | None:
  return decode_config.unsupported(
    *shapes.positional, kv_dtype=shapes.kv_dtype, max_q_len=max_q_len
  )


def _choose(
  implementation: str | None,
  unsupported: str | None,
  *,
  by_default: bool = True,
  uses_decode_kernel: bool = False,
) -> Choice:
  """Returns the choice.

  Kernels that are unmeasured or slower than XLA are used only when requested by
  name.

  Args:
    implementation: The implementation that the caller requests, or None.
    unsupported: Why the kernel does not support the shapes, None if it does.
    by_default: Whether the kernel is used without a request.
    uses_decode_kernel: See `Choice`.
  """
  check_implementation(implementation)
  reason = devices.why_not_hopper() or unsupported
  if implementation == "mosaic_gpu" and reason is not None:
    raise NotImplementedError(f"{implementation=} is not available: {reason}")
  if implementation is None:
    serves = reason is None and by_default
    implementation = "mosaic_gpu" if serves else "xla"
  return Choice(implementation, reason, uses_decode_kernel)
