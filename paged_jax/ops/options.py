"""The options of the public attention ops, checked once and handed down."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged_jax.ops import checks as attention_checks
from pallas_kernels.common import checks as page_checks

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_PER_HEAD = ("sinks", "alibi_slopes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options that a program is compiled for; see `paged_jax.paged_attention`."""

  scale: float
  sliding_window: int | None
  num_sink_tokens: int
  logits_soft_cap: float | None
  batch_invariant: bool
  causal: bool = True

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
      attention_checks.check_count("sliding_window", self.sliding_window, 1)
      if not self.causal:
        raise ValueError(
          f"sliding_window={self.sliding_window} must be None with "
          "causal=False."
        )
    attention_checks.check_count("num_sink_tokens", self.num_sink_tokens, 0)
    # A float of NumPy would widen what it meets.
    object.__setattr__(self, "scale", float(self.scale))
    if cap is not None:
      object.__setattr__(self, "logits_soft_cap", float(cap))

  def named(self, names: Iterable[str]) -> dict[str, Any]:
    """Returns those of these names, as a kernel takes them."""
    return {name: getattr(self, name) for name in names}


class ArrayOptions(NamedTuple):
  """Options that are arrays, or None; see `paged_jax.paged_attention`."""

  k_scales: Array | None
  v_scales: Array | None
  sinks: Array | None
  alibi_slopes: Array | None

  def check(self, q: Array, k_pages: Array) -> None:
    """Raises a ValueError if one does not fit queries and pages."""
    given = {name: x for name, x in self._asdict().items() if x is not None}
    attention_checks.check_arrays(**given)
    page_checks.check_scales(
      k_pages, k_scales=self.k_scales, v_scales=self.v_scales
    )
    per_head = {name: given[name] for name in _PER_HEAD if name in given}
    attention_checks.check_per_head(q, **per_head)


def check_tree_mask(
  tree_mask: Array | None, q: Array, arrays: ArrayOptions, options: Options
) -> None:
  """Raises a ValueError if a mask does not fit queries and other options."""
  if tree_mask is None:
    return
  if not options.causal:
    raise ValueError("causal=False must be True with a tree_mask.")
  if arrays.alibi_slopes is not None:
    raise ValueError(
      "alibi_slopes must be None with a tree_mask: where the key of a token of "
      "a tree is stored says nothing of distances along its path."
    )
  attention_checks.check_arrays(tree_mask=tree_mask)
  shape = jnp.shape(tree_mask)
  if tree_mask.dtype != jnp.bool_:
    raise ValueError(f"tree_mask.dtype={tree_mask.dtype} must be bool.")
  if len(shape) != 2 or shape[0] != q.shape[0] or shape[1] < 1:
    raise ValueError(
      f"tree_mask.shape={shape} must be ({q.shape[0]}, max_new): num_tokens, "
      "and at least one column."
    )
