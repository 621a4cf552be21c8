"""What a model says of its layers, and the groups that the cache makes of them.

Layers of the same number and width of heads and the same window are a group:
they share a page table and a pool. Most models have one group; models that mix
windowed and full layers have two.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paged_jax.kv import dtypes


@dataclasses.dataclass(frozen=True)
class LayerKV:
  """What the cache must know of one layer of a model.

  Attributes:
    num_kv_heads: Key and value heads.
    head_dim: Width of one head.
    sliding_window: Positions that a query of the layer sees, its own included;
      None if it sees all. Pages behind the window may be given back.
    shares: Number of an earlier, equal layer whose keys and values this layer
      reads; it writes none of its own.
  """

  num_kv_heads: int
  head_dim: int
  sliding_window: int | None = None
  shares: int | None = None

  def __post_init__(self):
    for name in ("num_kv_heads", "head_dim"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ValueError(f"{self.sliding_window=} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class KVLayout:
  """The layout of a group of equal layers, for all devices together."""

  num_layers: int
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
  """Where the keys and values of a layer are."""

  group: int
  layer: int  # in the group
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

  Raises:
    ValueError: If there are no layers, or one shares with a layer that it
      cannot share with.
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
  """Returns where the keys and values of each layer of a model are.

  Raises:
    ValueError: If there are no layers, or one shares with a layer that it
      cannot share with.
  """
  if not layers:
    raise ValueError("layers is empty; a model has at least one.")
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
  """Returns the place of layer `i`, which is that of another layer."""
  shares = layers[i].shares
  if shares is None or not 0 <= shares < i or found[shares].is_shared:
    raise ValueError(
      f"layers[{i}].shares={shares} must be an earlier layer that does not "
      "share."
    )
  if dataclasses.replace(layers[i], shares=None) != layers[shares]:
    raise ValueError(
      f"layers[{i}]={layers[i]} shares with layer {shares}, which differs: "
      f"{layers[shares]}."
    )
  return dataclasses.replace(found[shares], is_shared=True)
