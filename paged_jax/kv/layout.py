"""The shapes of a model's layers, and the layer groups of its cache.

Layers with the same number of KV heads, the same head_dim and the same window
form a group, which has one page table and one pool. Most models have one group;
models that mix windowed and full layers have two.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paged_jax.kv import dtypes
from pallas_kernels.common.spec import check_count


@dataclasses.dataclass(frozen=True)
class LayerKV:
  """The shape of the keys and values of one layer of a model.

  Attributes:
    num_kv_heads: Number of key and value heads, at least 1.
    head_dim: Width of one head, at least 1.
    sliding_window: Number of positions that a query of the layer sees, its own
      included, at least 1; None if it sees all. Pages that the window has
      passed may be released.
    shares: Index of an earlier, equal layer whose keys and values this layer
      reads instead of writing its own; None if it writes its own.

  Raises:
    ValueError: If a field is out of its range.
  """

  num_kv_heads: int
  head_dim: int
  sliding_window: int | None = None
  shares: int | None = None

  def __post_init__(self):
    check_count("num_kv_heads", self.num_kv_heads, 1)
    check_count("head_dim", self.head_dim, 1)
    if self.sliding_window is not None:
      check_count("sliding_window", self.sliding_window, 1)


@dataclasses.dataclass(frozen=True)
class KVLayout:
  """The layout of the pages of a layer group, over all devices together."""

  num_layers: int  # layers that write keys and values
  num_kv_heads: int
  head_dim: int
  sliding_window: int | None
  page_size: int  # tokens
  dtype: np.dtype

  @property
  def page_bytes(self) -> int:
    """Bytes of one page: K and V of all layers, and their scales."""
    return page_bytes(
      self.num_layers,
      self.num_kv_heads,
      self.page_size,
      self.head_dim,
      self.dtype,
    )


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a layer's keys and values in the cache."""

  group: int  # index of the layer group
  layer: int  # index in the group
  is_shared: bool  # whether another layer writes them


def page_bytes(
  num_layers: int,
  num_kv_heads: int,
  page_size: int,
  head_dim: int,
  dtype: DTypeLike,
) -> int:
  """Returns the bytes of one page: K and V of all layers, and their scales."""
  row = head_dim * jnp.dtype(dtype).itemsize
  if dtypes.is_quantised(dtype):
    row += dtypes.SCALE_DTYPE.itemsize
  return 2 * num_layers * num_kv_heads * page_size * row


def layouts(
  layers: Sequence[LayerKV], page_size: int, dtype: DTypeLike
) -> tuple[KVLayout, ...]:
  """Returns the layout of each group, in the order of their first layers.

  Args:
    layers: The layers of a model.
    page_size: Tokens per page.
    dtype: Dtype of K and V.

  Raises:
    ValueError: If `layers` is empty, or if `shares` of a layer is not an
      earlier layer that is equal and does not share itself.
  """
  layers = tuple(layers)
  counts: dict[int, int] = {}
  shapes: dict[int, LayerKV] = {}
  for layer, place in zip(layers, places(layers), strict=True):
    shapes.setdefault(place.group, layer)
    own = not place.is_shared
    counts[place.group] = counts.get(place.group, 0) + own
  return tuple(
    KVLayout(
      num_layers=counts[group],
      num_kv_heads=shape.num_kv_heads,
      head_dim=shape.head_dim,
      sliding_window=shape.sliding_window,
      page_size=page_size,
      dtype=jnp.dtype(dtype),
    )
    for group, shape in shapes.items()
  )


@functools.lru_cache
def places(layers: tuple[LayerKV, ...]) -> tuple[Place, ...]:
  """Returns the place of each layer's keys and values.

  Raises:
    ValueError: If `layers` is empty, or if `shares` of a layer is not an
      earlier layer that is equal and does not share itself.
  """
  if not layers:
    raise ValueError("layers is empty; it must have at least one layer.")
  groups: dict[LayerKV, int] = {}
  counts: list[int] = []
  found: list[Place] = []
  for i, layer in enumerate(layers):
    kind = dataclasses.replace(layer, shares=None)
    if layer.shares is not None:
      found.append(_shared(layers, found, i))
      continue
    group = groups.setdefault(kind, len(groups))
    if group == len(counts):
      counts.append(0)
    found.append(Place(group, counts[group], is_shared=False))
    counts[group] += 1
  return tuple(found)


def _shared(layers: tuple[LayerKV, ...], found: list[Place], i: int) -> Place:
  """Returns the place of layer `i`, which shares that of an earlier layer."""
  shares = layers[i].shares
  if shares is None or not 0 <= shares < i or found[shares].is_shared:
    raise ValueError(
      f"layers[{i}].shares={shares} must be an earlier layer that does not "
      "share itself."
    )
  if dataclasses.replace(layers[i], shares=None) != layers[shares]:
    raise ValueError(
      f"layers[{i}]={layers[i]} shares with layer {shares}, which differs: "
      f"{layers[shares]}."
    )
  return dataclasses.replace(found[shares], is_shared=True)
