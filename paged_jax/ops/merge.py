"""Merges attention outputs of the same queries over disjoint sets of keys."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from paged_jax.kv import dtypes
from paged_jax.ops import checks


def merge_attention(
  *parts: tuple[
    Float[Array, "num_tokens num_q_heads head_dim"],
    Float32[Array, "num_tokens num_q_heads"],
  ],
  sinks: Float[Array, " num_q_heads"] | None = None,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float32[Array, "num_tokens num_q_heads"],
]:
  """Merges attention outputs of the same queries over disjoint sets of keys.

  The result is the attention over the union of the keys. With the output
  `out_i` and the log-sum-exp `lse_i` of each part:

      lse = log(sum_i exp(lse_i) + exp(sink))    exp(sink) only with sinks
      out = sum_i exp(lse_i - lse) * out_i

  This is the merge of the online softmax (Milakov & Gimelshein, 2018), as in
  cascade attention and in context parallelism.

  Args:
    *parts: One or more pairs of an output [num_tokens, num_q_heads, head_dim],
      all in one dtype, and its log-sum-exp f32[num_tokens, num_q_heads], as the
      ops return them with `return_lse=True`. Where the log-sum-exp is -inf, the
      part is ignored, even if its output is NaN. If only one part is left, its
      output is returned unchanged (except that -0 becomes 0).
    sinks: [num_q_heads], one more logit per head, only in the denominator.
      Compute the parts without sinks, so that they count once.

  Returns:
    The output in the dtype of the parts, and `lse`. Tokens without a key in
    any part give 0 and -inf, with or without sinks.

  Raises:
    ValueError: If there are no parts, or if a part or `sinks` has the wrong
      shape or dtype.

  Example:
    merge_attention((out_0, lse_0), (out_1, lse_1))
  """
  _check_parts(parts)
  if sinks is not None:
    checks.check_per_head(parts[0][0], sinks=sinks)
  return _merge(parts, sinks)


@jax.jit
def _merge(parts, sinks):
  """Merges in float32; see `merge_attention`."""
  outs, lses = zip(*parts, strict=True)
  top = functools.reduce(jnp.maximum, lses)
  empty = top == -jnp.inf
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)[None]
    top = jnp.maximum(top, sinks)
  shift = jnp.where(empty, 0.0, top)
  weights = [jnp.exp(lse - shift) for lse in lses]
  total = functools.reduce(jnp.add, weights)
  if sinks is not None:
    total += jnp.exp(sinks - shift)
  total = jnp.where(empty, 1.0, total)
  out = jnp.zeros(outs[0].shape, jnp.float32)
  for part, lse, weight in zip(outs, lses, weights, strict=True):
    # A select, because the output of a part without keys may be NaN.
    weight = (weight / total)[..., None]
    seen = (lse != -jnp.inf)[..., None]
    out += jnp.where(seen, part.astype(jnp.float32) * weight, 0.0)
  lse = jnp.where(empty, -jnp.inf, shift + jnp.log(total))
  return out.astype(outs[0].dtype), lse


def _check_parts(parts) -> None:
  """Raises a ValueError if the parts cannot be merged."""
  if not parts:
    raise ValueError("parts is empty: there is nothing to merge.")
  for i, part in enumerate(parts):
    name = f"parts[{i}]"
    if not isinstance(part, tuple | list) or len(part) != 2:
      raise ValueError(
        f"{name} must be a pair, the output and the log-sum-exp; got "
        f"{type(part).__name__}."
      )
    out, lse = part
    checks.check_are_arrays(**{f"{name}[0]": out, f"{name}[1]": lse})
    first = parts[0][0]
    if out.dtype not in dtypes.FLOAT_DTYPES or out.dtype != first.dtype:
      raise ValueError(
        f"{name}[0].dtype={out.dtype} must be {dtypes.FLOAT_NAMES}, and "
        "the same in all parts."
      )
    if out.ndim != 3 or out.shape != first.shape:
      raise ValueError(
        f"{name}[0].shape={out.shape} must have 3 axes, and be the same in all "
        "parts."
      )
    if lse.dtype != jnp.float32:
      raise ValueError(f"{name}[1].dtype={lse.dtype} must be float32.")
    if lse.shape != out.shape[:2]:
      raise ValueError(f"{name}[1].shape={lse.shape} must be {out.shape[:2]}.")
