"""The layer groups that a cache forms from a model's layers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from paged_jax import CacheConfig, LayerKV, PagedCache
from paged_jax.kv import layout
from paged_jax.kv.layout import KVLayout, Place

FULL = LayerKV(2, 16)
WINDOWED = LayerKV(2, 16, sliding_window=32)


def _groups(*layers):
  return layout.layouts(layers, 8, jnp.float32)


def test_equal_layers_are_one_group():
  (group,) = _groups(FULL, FULL, FULL)
  assert group == KVLayout(
    num_layers=3,
    num_kv_heads=2,
    head_dim=16,
    sliding_window=None,
    page_size=8,
    dtype=jnp.dtype("float32"),
  )


@pytest.mark.parametrize(
  "other",
  [LayerKV(1, 16), LayerKV(2, 32), WINDOWED],
  ids=["heads", "width", "window"],
)
def test_layers_that_differ_are_groups_of_their_own(other):
  first, second = _groups(FULL, other, FULL)
  assert (first.num_layers, second.num_layers) == (2, 1)
  for group, layer in ((first, FULL), (second, other)):
    assert group.num_kv_heads == layer.num_kv_heads
    assert group.head_dim == layer.head_dim
    assert group.sliding_window == layer.sliding_window


def test_windows_that_differ_are_groups_of_their_own():
  wider = dataclasses.replace(WINDOWED, sliding_window=33)
  windows = [g.sliding_window for g in _groups(wider, WINDOWED, FULL)]
  assert windows == [33, 32, None]


def test_groups_are_in_the_order_of_their_first_layers():
  layers = (WINDOWED, FULL, FULL, WINDOWED, FULL)
  assert [g.sliding_window for g in _groups(*layers)] == [32, None]
  assert layout.places(layers) == (
    Place(0, 0, is_shared=False),
    Place(1, 0, is_shared=False),
    Place(1, 1, is_shared=False),
    Place(0, 1, is_shared=False),
    Place(1, 2, is_shared=False),
  )


def test_a_layer_that_shares_has_the_place_of_the_other_and_no_pages():
  sharing = dataclasses.replace(WINDOWED, shares=2)
  layers = (FULL, WINDOWED, WINDOWED, sharing, WINDOWED, sharing)
  places = layout.places(layers)
  assert places[2] == Place(1, 1, is_shared=False)
  assert places[3] == places[5] == Place(1, 1, is_shared=True)
  assert places[4] == Place(1, 2, is_shared=False)
  assert [g.num_layers for g in _groups(*layers)] == [1, 3]


def test_layouts_are_those_of_the_pools():
  layers = (FULL, WINDOWED, FULL, dataclasses.replace(FULL, shares=0))
  config = CacheConfig(
    num_pages=3, page_size=8, num_seqs=2, max_len=16, dtype=jnp.bfloat16
  )
  cache = jax.eval_shape(lambda: PagedCache.init(layers, config))
  assert cache.layers == layers
  for group, num_layers in zip(cache.groups, (2, 1), strict=True):
    assert group.layout.num_layers == num_layers
    assert group.pool.k.shape == group.pool.v.shape == (3, num_layers, 2, 8, 16)
    assert group.pool.k.dtype == group.layout.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("dtype", "row"),
  [
    ("float32", 16 * 4),
    ("bfloat16", 16 * 2),
    ("int8", 16 + 4),  # and a float32 scale
    ("float8_e4m3fn", 16 + 4),
  ],
)
def test_page_bytes_are_those_of_the_arrays(dtype, row):
  layers = (FULL, FULL, FULL)
  (group,) = layout.layouts(layers, 8, dtype)
  assert group.page_bytes == 2 * 3 * 2 * 8 * row
  config = CacheConfig(
    num_pages=5, page_size=8, num_seqs=1, max_len=8, dtype=dtype
  )
  cache = jax.eval_shape(lambda: PagedCache.init(layers, config))
  arrays = jax.tree.leaves(cache.groups[0].pool)
  total = sum(x.size * x.dtype.itemsize for x in arrays)
  assert total == 5 * group.page_bytes


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: LayerKV(0, 16), r"num_kv_heads=0 must be in \[1, "),
    (lambda: LayerKV(2, 16.5), "head_dim=16.5 must be a Python integer"),
    (lambda: LayerKV(2, 0), r"head_dim=0 must be in \[1, "),
    (lambda: LayerKV(2, 16, 0), r"sliding_window=0 must be in \[1, "),
  ],
)
def test_sizes_out_of_range_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ("layers", "message"),
  [
    ((), "layers is empty"),
    ((LayerKV(2, 16, shares=0),), r"layers\[0\].shares=0 must be an earlier"),
    ((FULL, LayerKV(2, 16, shares=2), FULL), r"layers\[1\].shares=2"),
    ((FULL, LayerKV(2, 16, shares=-1)), r"layers\[1\].shares=-1"),
    (
      (FULL, LayerKV(2, 16, shares=0), LayerKV(2, 16, shares=1)),
      r"layers\[2\].shares=1 must be an earlier layer that does not share",
    ),
    ((FULL, LayerKV(1, 16, shares=0)), r"layers\[1\]=.* shares with layer 0"),
    ((FULL, LayerKV(2, 16, 32, shares=0)), "which differs"),
  ],
)
def test_layers_that_do_not_fit_together_are_named(layers, message):
  for groups_of in (layout.places, lambda x: layout.layouts(x, 8, "float32")):
    with pytest.raises(ValueError, match=message):
      groups_of(layers)
