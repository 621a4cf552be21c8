"""The options of an attention op: one static value and one pytree of arrays.

Only the public ops take each option as a keyword. Everything below them passes
an `AttentionSpec`, which is static under jit, and an `AttentionArrays`.

Imports no Pallas.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

# ALiBi slopes are clamped to this: times any distance, it is finite in f32.
MAX_SLOPE = 2.0**95
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # smallest normal number


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
  """Static options; `paged_jax.paged_attention` documents each of them.

  Raises:
    ValueError: If an option has a wrong type, is out of range or is not finite
      in float32, or if there is a window without `causal`.
  """

  scale: float
  sliding_window: int | None = None
  num_sink_tokens: int = 0
  logits_soft_cap: float | None = None
  causal: bool = True
  batch_invariant: bool = False

  def __post_init__(self):
    for name in ("batch_invariant", "causal"):
      value = getattr(self, name)
      if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")
    for name in ("scale", "logits_soft_cap"):
      value = getattr(self, name)
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      if value is not None and not is_number:
        raise ValueError(f"{name}={value!r} must be a Python number.")
    cap = self.logits_soft_cap
    if cap is not None and not _FLOAT32_TINY <= cap <= _FLOAT32_MAX:
      raise ValueError(
        f"logits_soft_cap={cap} must be positive and normal in float32."
      )
    if not abs(self.scale) <= _FLOAT32_MAX:
      raise ValueError(f"scale={self.scale} must be finite in float32.")
    if self.sliding_window is not None:
      check_count("sliding_window", self.sliding_window, 1)
      if not self.causal:
        raise ValueError(
          f"sliding_window={self.sliding_window} must be None with "
          "causal=False."
        )
    check_count("num_sink_tokens", self.num_sink_tokens, 0)
    # As Python floats, they do not promote arrays as NumPy floats would.
    object.__setattr__(self, "scale", float(self.scale))
    if cap is not None:
      object.__setattr__(self, "logits_soft_cap", float(cap))


class AttentionArrays(NamedTuple):
  """Array options; `paged_jax.paged_attention` documents each of them."""

  sinks: jax.Array | None = None  # [num_q_heads]
  alibi_slopes: jax.Array | None = None  # [num_q_heads]
  tree_mask: jax.Array | None = None  # bool[num_tokens, max_new]


def check_count(name: str, value: object, least: int) -> None:
  """Checks that a static option is an integer in [least, 2**31).

  Args:
    name: Name of the option, for the message.
    value: Its value.
    least: The least allowed value.

  Raises:
    ValueError: If it is not a Python integer, or out of range.
  """
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f"{name}={value!r} must be a Python integer.")
  if not least <= value < 2**31:
    raise ValueError(f"{name}={value} must be in [{least}, 2**31).")
