"""The options of an attention op, as two values that travel whole.

The public ops spell every option out as a keyword. Below them, an option is a
field: of `AttentionSpec` if programs are compiled for its value, of
`AttentionArrays` if it is an array. Imports no Pallas.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

# The greatest slope of ALiBi: times any distance, it is a finite number.
MAX_SLOPE = 2.0**95
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
  """Static options; see `paged_jax.paged_attention` for their meaning."""

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
    if cap is not None and not 0 < cap <= _FLOAT32_MAX:
      raise ValueError(
        f"logits_soft_cap={cap} must be positive, and finite in float32."
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
    # A NumPy float would widen what it meets.
    object.__setattr__(self, "scale", float(self.scale))
    if cap is not None:
      object.__setattr__(self, "logits_soft_cap", float(cap))


class AttentionArrays(NamedTuple):
  """Options that are arrays, or None; see `paged_jax.paged_attention`."""

  sinks: jax.Array | None = None  # [num_q_heads]
  alibi_slopes: jax.Array | None = None  # [num_q_heads]
  tree_mask: jax.Array | None = None  # bool[num_tokens, max_new]


def check_count(name: str, value: object, least: int) -> None:
  """Raises a ValueError if a value is not an integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f"{name}={value!r} must be a Python integer.")
  if not least <= value < 2**31:
    raise ValueError(f"{name}={value} must be in [{least}, 2**31).")
