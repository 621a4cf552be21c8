"""A cache of two layer groups, and a plain model of each group beside it.

Each token is a different number, written as K and V of every layer, so that
each value identifies its token. A row is served if every group's model serves
it.
"""

import collections
import copy

import jax
import jax.numpy as jnp
import numpy as np
from page_model import PageModel

from paged_jax import CacheConfig, LayerKV, PagedCache, begin_step, page_table
from paged_jax.kv import cache as paged_cache
from paged_jax.kv import layout
from paged_jax.kv import pool as kv_pool

WINDOW = 6
LAYERS = (LayerKV(1, 4), LayerKV(2, 8, sliding_window=WINDOW), LayerKV(1, 4))
PAGE_SIZE, NUM_SEQS, WIDTH, MOST_NEW = 8, 4, 3, 17
NUM_TOKENS = NUM_SEQS * MOST_NEW
CONFIG = CacheConfig(
  num_pages=(7, 5),
  page_size=PAGE_SIZE,
  num_seqs=NUM_SEQS,
  max_len=WIDTH * PAGE_SIZE,
  dtype=jnp.float32,
)


def values(tokens, layer, num_heads, width):
  """Returns the keys of a layer for f32 tokens: all different, and exact."""
  head = np.arange(num_heads, dtype=np.float32)[None, :, None] / 8
  column = np.arange(width, dtype=np.float32)[None, None] / 64
  return tokens[:, None, None] + (layer / 4 + head + column)


@jax.jit
def step_and_write(cache, q_lens, rows, tokens):
  """Runs a model step. Returns the cache and bool[num_rows], who was served."""
  cache, step = begin_step(cache, q_lens, NUM_TOKENS, rows=rows)
  for layer, place in enumerate(layout.places(cache.layers)):
    pool = cache.groups[place.group].pool
    k = values(tokens, layer, pool.k.shape[2], pool.k.shape[4])
    slots = step.groups[place.group].slots
    pool = kv_pool.write(pool, place.layer, k, -k, slots)
    cache = cache.with_pool(place.group, pool)
  return cache, step.ok


jitted = {
  name: jax.jit(getattr(paged_cache, name))
  for name in (
    "adopt",
    "fork",
    "permute",
    "release",
    "release_outside_window",
    "truncate",
  )
}


@jax.jit
def _are_valid(cache):
  return [page_table.check(group.table).valid for group in cache.groups]


class CacheAndModels:
  """Applies each transition to a cache and its models, and compares them.

  Attributes:
    seen: Counts the events that random programs should reach.
  """

  def __init__(self):
    cache = PagedCache.init(LAYERS, CONFIG)
    # Memory that was never written must not be read.
    for i, group in enumerate(cache.groups):
      nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), group.pool)
      cache = cache.with_pool(i, nan)
    self.cache = cache
    self.models = [
      PageModel(num_pages, PAGE_SIZE, NUM_SEQS, WIDTH)
      for num_pages in CONFIG.num_pages
    ]
    self.next_token = 1
    self.seen = collections.Counter()

  @property
  def lens(self):
    return [len(row.tokens) for row in self.models[0].rows]

  def step(self, counts, order=range(NUM_SEQS)):
    """Appends to the rows in `order`. Returns which rows were served."""
    order = list(order)
    fresh = {}
    for row in order:
      fresh[row] = list(range(self.next_token, self.next_token + counts[row]))
      self.next_token += counts[row]
    flat = np.full(NUM_TOKENS, np.nan, np.float32)
    flat[: sum(counts)] = [token for row in order for token in fresh[row]]

    each = [model.plan_append(counts, order)[0] for model in self.models]
    ok = [all(row) for row in zip(*each, strict=True)]
    first, second = each
    self.seen["refused by one group"] += first != second
    before = self.cache
    self.cache, served = step_and_write(
      before,
      np.asarray([counts[row] for row in order], np.int32),
      np.asarray(order, np.int32),
      flat,
    )
    expected = [ok[row] and counts[row] > 0 for row in order]
    assert served.tolist() == expected

    counts = [n if good else 0 for n, good in zip(counts, ok, strict=True)]
    for model, group in zip(self.models, self.cache.groups, strict=True):
      again, copies = model.plan_append(counts, order)
      assert all(again)
      self.seen["copied"] += len(copies)
      free = set(range(model.num_pages)) - model.used()
      tokens = {row: iter(each) for row, each in fresh.items()}
      entries = np.asarray(group.table.page_indices).tolist()
      next_of = lambda row, tokens=tokens: next(tokens[row])
      taken = model.append(counts, again, copies, entries, next_of)
      assert len(set(taken)) == len(taken)
      assert set(taken) <= free
    self.agree(before, [row for row in range(NUM_SEQS) if not counts[row]])
    return ok

  def change(self, name, rows, *args, per_group=None):
    """Runs a transition of the given rows. Returns `ok`.

    An entry of `rows` is left out if it is `num_seqs`. `per_group` holds the
    arguments for each group's model, where they differ between groups.
    """
    args_of = per_group or [args] * len(self.models)
    trials = [copy.deepcopy(model) for model in self.models]
    each = [
      getattr(model, name)(rows, *some)
      for model, some in zip(trials, args_of, strict=True)
    ]
    ok = [all(entry) for entry in zip(*each, strict=True)]
    self.seen[f"{name} refused by one group"] += each[0] != each[1]
    self.seen[name] += sum(ok)
    kept = [r if good else NUM_SEQS for r, good in zip(rows, ok, strict=True)]
    for model, some in zip(self.models, args_of, strict=True):
      assert all(getattr(model, name)(kept, *some))

    before = self.cache
    i32 = lambda x: np.asarray(x, np.int32)
    if name == "adopt":  # only the models take the tokens
      pages, lens, floors, _ = zip(*args_of, strict=True)
      args = [i32(p) for p in pages], i32(lens[0]), [i32(f) for f in floors]
    else:
      args = [i32(arg) for arg in args]
    self.cache, served = jitted[name](before, i32(rows), *args)
    assert served.tolist() == ok
    changed = rows if name != "fork" else args[0].tolist()
    self.agree(before, set(range(NUM_SEQS)) - set(changed))
    return ok

  def permute(self, parents):
    ok = {model.permute(parents) for model in self.models}
    before = self.cache
    self.cache, served = jitted["permute"](before, np.asarray(parents, "i4"))
    assert {bool(served)} == ok
    itself = [row for row, parent in enumerate(parents) if row == parent]
    self.agree(before, itself if bool(served) else range(NUM_SEQS))
    return bool(served)

  def release(self, rows):
    for model in self.models:
      model.release(rows)
    mask, before = np.isin(np.arange(NUM_SEQS), rows), self.cache
    self.cache = jitted["release"](before, mask)
    self.agree(before, set(range(NUM_SEQS)) - set(rows))

  def release_outside_window(self):
    self.models[1].release_outside_window(WINDOW, 0)
    before = self.cache
    self.cache = jitted["release_outside_window"](before)
    self.agree(before, ())

  def agree(self, before, untouched):
    """Compares the cache with the models, and some rows with their old state.

    Args:
      before: The cache before the transition.
      untouched: Rows that must not have changed, bit for bit.
    """
    assert all(map(bool, _are_valid(self.cache)))
    assert self.cache.kv_lens.tolist() == self.lens
    for old, new in zip(before.groups, self.cache.groups, strict=True):
      assert new.table.kv_lens.tolist() == self.lens
      for field in ("page_indices", "kv_lens", "min_lens"):
        a, b = (np.asarray(getattr(g.table, field)) for g in (old, new))
        for row in untouched:
          np.testing.assert_array_equal(a[row], b[row])
    for layer, place in enumerate(layout.places(LAYERS)):
      self._agree_on_contents(layer, place)

  def _agree_on_contents(self, layer, place):
    group, model = self.cache.groups[place.group], self.models[place.group]
    k, v = (np.asarray(x)[:, place.layer] for x in (group.pool.k, group.pool.v))
    num_pages, num_heads, _, width = k.shape
    for entries, row in zip(
      np.asarray(group.table.page_indices), model.rows, strict=True
    ):
      named = [num_pages if page is None else page for page in row.pages]
      assert entries.tolist() == named + [num_pages] * (WIDTH - len(named))
      position = np.arange(len(row.tokens))
      page = entries[position // PAGE_SIZE]
      kept = page < num_pages
      page, offset = page[kept], position[kept] % PAGE_SIZE
      tokens = np.asarray(row.tokens, np.float32)[kept]
      expected = values(tokens, layer, num_heads, width)
      np.testing.assert_array_equal(k[page, :, offset], expected)
      np.testing.assert_array_equal(v[page, :, offset], -expected)
