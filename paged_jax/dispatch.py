"""Which implementation an op gets here, and why not the other.

  "mosaic_gpu"  Pallas kernels for Hopper GPUs (`pallas_kernels`)
  "xla"         plain JAX: every option, every device

Each function answers for one op. Kernels are not imported to answer.
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
  reason: str | None  # why no kernel can serve, None if one can
  # Whether the decode kernel serves an attention op, rather than the ragged.
  by_decode: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShapes:
  """What the kernels ask of the arguments of an attention op."""

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
    """Returns the shapes of queries, and pages [..., heads, page, width]."""
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
    """The arguments of `unsupported`, of both kernels."""
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
  """Returns the implementation of `paged_attention`.

  Args:
    implementation: What the caller requests; None to choose.
    shapes: Of the arguments.

  Raises:
    ValueError: If there is no such implementation.
    NotImplementedError: If the kernel is requested and cannot serve.
  """
  return _choose(implementation, _not_by_decode(shapes, 1), by_decode=True)


def ragged_attention(
  implementation: str | None,
  shapes: AttentionShapes,
  *,
  max_q_len: int | None = None,
  causal: bool = True,
  has_alibi: bool = False,
) -> Choice:
  """Returns the implementation of `ragged_paged_attention`.

  Args:
    implementation: What the caller requests; None to choose.
    shapes: Of the arguments.
    max_q_len: Most query tokens of a sequence, None if it is not known. Few
      are served by the decode kernel, if it takes them.
    causal: Whether a query sees no key past its own.
    has_alibi: Whether there are slopes of ALiBi.

  Raises:
    ValueError: If there is no such implementation.
    NotImplementedError: If a kernel is requested and none can serve.
  """
  if max_q_len is not None and _not_by_decode(shapes, max_q_len) is None:
    return _choose(implementation, None, by_decode=True)
  if has_alibi and not causal:
    reason = "the ragged kernel takes alibi_slopes with causal=True only."
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
  """Returns the implementation of writes to a pool.

  Args:
    implementation: What the caller requests; None to choose.
    pool_shape: Of K, as in `KVPool`.
    dtype: Of K.
    num_tokens: Tokens to write.

  Raises:
    ValueError: If there is no such implementation.
    NotImplementedError: If the kernel is requested and cannot serve.
  """
  # With quantised tokens the kernel takes 12 to 15 % longer than scatters
  # (H200, benchmarks.kv_write); float32 was not measured.
  by_default = jnp.dtype(dtype).itemsize == 2
  return _choose(
    implementation,
    page_limits.unsupported_write(pool_shape, dtype, num_tokens),
    by_default=by_default,
  )


def page_copy(
  implementation: str | None, pools: list[Array | jax.ShapeDtypeStruct]
) -> Choice:
  """Returns the implementation of copies of pages.

  Args:
    implementation: What the caller requests; None to choose.
    pools: The arrays of a pool, whose first axis is the page.

  Raises:
    ValueError: If there is no such implementation.
    NotImplementedError: If the kernel is requested and cannot serve.
  """
  reasons = (page_limits.unsupported_copy(x.shape[1:], x.dtype) for x in pools)
  return _choose(implementation, next(filter(None, reasons), None))


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError if there is no such implementation."""
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} must be None or one of {IMPLEMENTATIONS}."
    )


def _not_by_decode(shapes: AttentionShapes, max_q_len: int) -> str | None:
  return decode_config.unsupported(
    *shapes.positional, kv_dtype=shapes.kv_dtype, max_q_len=max_q_len
  )


def _choose(
  implementation: str | None,
  unsupported: str | None,
  *,
  by_default: bool = True,
  by_decode: bool = False,
) -> Choice:
  """Returns the choice, given why the kernel does not take the shapes.

  Kernels that are slower than XLA, or were not measured, are used only when
  requested by name.
  """
  check_implementation(implementation)
  reason = devices.why_not_hopper() or unsupported
  if implementation == "mosaic_gpu" and reason is not None:
    raise NotImplementedError(f"{implementation=} is not available: {reason}")
  if implementation is None:
    serves = reason is None and by_default
    implementation = "mosaic_gpu" if serves else "xla"
  return Choice(implementation, reason, by_decode)
