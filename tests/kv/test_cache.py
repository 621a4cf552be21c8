"""Transitions of a cache apply to all its layer groups, or to none."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_pair import (
  CONFIG,
  LAYERS,
  NUM_SEQS,
  PAGE_SIZE,
  WIDTH,
  CacheAndModels,
  jitted,
)

from paged_jax import CacheConfig, LayerKV, PagedCache, begin_step
from paged_jax.kv import cache as paged_cache

SEEDS = range(12)
NUM_STEPS = 40


class _Program:
  """Runs a random sequence of transitions on pools that are nearly full."""

  def __init__(self, seed):
    self.rng = np.random.default_rng(seed)
    self.pair = CacheAndModels()

  def run(self):
    choices = dict(
      step=0.4,
      fork=0.15,
      permute=0.05,
      truncate=0.15,
      release=0.1,
      window=0.08,
      adopt=0.07,
    )
    names, weights = list(choices), list(choices.values())
    for name in self.rng.choice(names, NUM_STEPS, p=weights):
      getattr(self, f"_{name}")()
    return self.pair.seen

  def _rows(self, size=2):
    """Returns random rows; some are out of range or occur twice."""
    return self.rng.integers(-1, NUM_SEQS + 2, size).tolist()

  def _step(self):
    counts = self.rng.choice([0, 0, 1, 1, 1, 2, 3, 5, 8, 17], NUM_SEQS)
    self.pair.step(counts.tolist(), self.rng.permutation(NUM_SEQS).tolist())

  def _fork(self):
    empty = [row for row, n in enumerate(self.pair.lens) if not n]
    dst = (empty + self._rows())[:2]
    self.pair.change("fork", self._rows(), dst)

  def _permute(self):
    parents = self.rng.integers(0, NUM_SEQS + 1, NUM_SEQS)
    if self.rng.random() < 0.2:
      parents[0] = -1
    self.pair.permute(parents.tolist())

  def _truncate(self):
    rows = self._rows()
    lens = [*self.pair.lens, 0, 0, 0]
    cut = lambda row: lens[row] + 1 - int(self.rng.geometric(0.15))
    self.pair.change("truncate", rows, [cut(row) for row in rows])

  def _release(self):
    self.pair.release([int(self.rng.integers(NUM_SEQS))])

  def _window(self):
    self.pair.release_outside_window()

  def _adopt(self):
    """Adopts the first tokens of a row, as after a prefix cache hit."""
    src, lens = int(self.rng.integers(NUM_SEQS)), self.pair.lens
    length = int(self.rng.integers(0, lens[src] + 2))
    num_pages = -(-length // PAGE_SIZE)
    spoilt = self.rng.choice(
      [0, 1, None]
    )  # group whose request names a free page
    per_group = []
    for i, model in enumerate(self.pair.models):
      row, none = model.rows[src], model.num_pages
      pages = [none if page is None else page for page in row.pages]
      pages = pages[:num_pages]
      if i == spoilt and pages and model.num_free():
        pages[-1] = min(set(range(none)) - model.used())
      pages += [none] * (WIDTH - len(pages))
      args = [pages, length, row.floor, row.tokens[:length]]
      per_group.append(tuple([arg] * 2 for arg in args))
    empty = [row for row, n in enumerate(lens) if not n]
    rows = (empty + self._rows())[:2]
    self.pair.change("adopt", rows, per_group=per_group)


@functools.cache
def _seen(seed):
  return _Program(seed).run()


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_serve_rows_in_all_groups_or_in_none(seed):
  _seen(seed)


def test_random_programs_reach_what_is_hard():
  seen = sum(map(_seen, SEEDS), collections.Counter())
  for what in (
    "refused by one group",
    "truncate refused by one group",
    "adopt refused by one group",
    "copied",
    "fork",
    "truncate",
    "adopt",
  ):
    assert seen[what] >= 5, (what, seen)


def test_a_row_that_one_group_refuses_is_refused_by_all():
  pair = CacheAndModels()
  # The groups have 7 and 5 pages: only the first has 2 left for the third row.
  assert pair.step([24, 16, 9, 0]) == [True, True, False, True]
  assert pair.lens == [24, 16, 0, 0]
  free = [int(group.table.num_free) for group in pair.cache.groups]
  assert free == [2, 0]
  # Rows that need no page are served.
  assert pair.step([0, 0, 1, 0]) == [True, True, False, True]


def test_a_shared_page_is_copied_in_every_group_before_it_is_written():
  pair = CacheAndModels()
  pair.step([13, 0, 0, 0])
  assert pair.change("fork", [0, 0], [1, 2]) == [True, True]
  assert pair.step([1, 1, 0, 0]) == [True] * 4
  for group in pair.cache.groups:
    first, last = np.asarray(group.table.page_indices)[:3, :2].T
    assert len(set(first)) == 1
    assert len(set(last)) == 3


def test_a_row_is_not_cut_to_where_one_group_lacks_its_window():
  pair = CacheAndModels()
  pair.step([20, 0, 0, 0])
  pair.release_outside_window()
  free = [int(group.table.num_free) for group in pair.cache.groups]
  assert free == [4, 3]  # a page of the windowed group is free again
  # A row of 13 tokens sees positions from 7 on, whose page is gone.
  assert pair.change("truncate", [0], [13]) == [False]
  assert pair.change("truncate", [0], [14]) == [True]


def test_a_row_adopts_other_pages_in_each_group():
  pair = CacheAndModels()
  pair.step([20, 0, 0, 0])
  pair.release_outside_window()
  pair.step([0, 0, 9, 0])
  pages = [[*model.rows[2].pages, model.num_pages] for model in pair.models]
  assert pages == [[3, 4, 7], [0, 3, 5]]
  tokens = pair.models[0].rows[2].tokens
  full = [([p], [9], [0], [tokens]) for p in pages]
  assert pair.change("adopt", [3], per_group=full) == [True]
  for group in pair.cache.groups:
    entries = np.asarray(group.table.page_indices)
    np.testing.assert_array_equal(entries[3], entries[2])
  pair.release([3])
  # A page that is free in one group is refused by both.
  pages[1] = [4, 3, 5]
  wrong = [([p], [9], [0], [tokens]) for p in pages]
  assert pair.change("adopt", [3], per_group=wrong) == [False]


def test_adopted_pages_are_given_for_each_group():
  cache = CacheAndModels().cache
  pages = [jnp.zeros(WIDTH, jnp.int32)] * 2
  with pytest.raises(ValueError, match=r"len\(pages\)=1 .* layer groups, 2"):
    jitted["adopt"](cache, 0, pages[:1], 8)
  with pytest.raises(ValueError, match=r"len\(min_lens\)=3 .* groups, 2"):
    jitted["adopt"](cache, 0, pages, 8, [0, 0, 0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_seqs=None), "num_seqs=None"),
    (dict(dtype=None), "dtype=None"),
    (dict(num_pages=None), "num_pages=None"),
    (dict(max_len=None), "max_len=None"),
    (dict(num_pages=(7, 5, 3)), r"num_pages=\(7, 5, 3\) .* 2 layer groups"),
    (dict(num_pages=(7,)), r"num_pages=\(7,\) .* 2 layer groups"),
  ],
)
def test_sizes_that_are_missing_or_do_not_fit_are_named(changes, message):
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ValueError, match=message):
    PagedCache.init(LAYERS, config)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(num_pages=()), r"num_pages=\(\) must have a number for each"),
    (dict(num_pages=(7, 0)), r"num_pages=0 must be in \[1, "),
    (dict(num_pages=0), r"num_pages=0 must be in \[1, "),
    (dict(num_pages=-1), r"num_pages=-1 must be in \[1, "),
    (dict(num_pages=(8, 2.5)), "num_pages=2.5 must be a Python integer"),
    (dict(num_pages=True), "num_pages=True must be a Python integer"),
    (dict(page_size=16.0), "page_size=16.0 must be a Python integer"),
    (dict(max_len=100.5), "max_len=100.5 must be a Python integer"),
    (dict(num_seqs="2"), "num_seqs='2' must be a Python integer"),
    (dict(prefill_chunk=None), "prefill_chunk=None must be a Python integer"),
    (dict(dtype="nope"), "dtype='nope' must be"),
    (dict(debug=1), "debug=1 must be True or False"),
  ],
)
def test_sizes_of_a_wrong_type_or_range_are_named(sizes, message):
  with pytest.raises(ValueError, match=message):
    CacheConfig(**sizes)


def test_a_pool_that_is_too_large_is_refused_before_anything_is_allocated():
  for num_pages in (2**27, 2**31 - 1):
    config = dataclasses.replace(CONFIG, num_pages=num_pages)
    with pytest.raises(ValueError, match="exceed the limit"):
      PagedCache.init(LAYERS, config)


def test_a_model_of_one_group_takes_one_number_of_pages():
  for num_pages in (7, (7,)):
    config = dataclasses.replace(CONFIG, num_pages=num_pages)
    cache = jax.eval_shape(lambda c=config: PagedCache.init(LAYERS[:1], c))
    assert cache.groups[0].table.num_pages == 7
  config = dataclasses.replace(CONFIG, num_pages=(7, 5))
  with pytest.raises(ValueError, match=r"num_pages=\(7, 5\) .* 1 layer groups"):
    PagedCache.init(LAYERS[:1], config)


def test_no_leaf_of_a_cache_is_empty():
  # A leaf of size 0 crashes the compiler under shard_map (jaxlib 0.11.2).
  for layers in (LAYERS, LAYERS[:1]):
    for dtype in (jnp.bfloat16, jnp.int8):
      config = dataclasses.replace(CONFIG, num_pages=3, dtype=dtype)
      make = functools.partial(PagedCache.init, layers, config)
      assert all(x.size for x in jax.tree.leaves(jax.eval_shape(make)))


def test_the_sizes_of_a_cache_are_those_of_its_tables():
  config = dataclasses.replace(CONFIG, max_len=17)
  cache = jax.eval_shape(lambda: PagedCache.init(LAYERS, config))
  assert cache.num_seqs == NUM_SEQS
  assert cache.max_len == 24  # whole pages
  assert [g.table.num_pages for g in cache.groups] == [7, 5]
  assert [g.table.pages_per_seq for g in cache.groups] == [3, 3]


def test_a_step_makes_no_second_pool():
  config = dataclasses.replace(CONFIG, num_pages=4096)
  layers = (LayerKV(1, 8), LayerKV(2, 8))
  cache = jax.eval_shape(lambda: PagedCache.init(layers, config))
  q_lens = jax.ShapeDtypeStruct((NUM_SEQS,), jnp.int32)
  step = jax.jit(
    functools.partial(begin_step, num_tokens=NUM_SEQS, max_q_len=1),
    donate_argnums=0,
  )
  memory = step.lower(cache, q_lens).compile().memory_analysis()
  pool_bytes = sum(
    2 * group.pool.k.size * group.pool.k.dtype.itemsize
    for group in cache.groups
  )
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 50


def test_a_transition_that_moves_no_page_leaves_pools_alone():
  """Forking and truncating change tables only: no pool is an operand."""
  cache = jax.eval_shape(lambda: PagedCache.init(LAYERS, CONFIG))
  rows = jax.ShapeDtypeStruct((2,), jnp.int32)
  for name in ("fork", "truncate"):
    jaxpr = jax.make_jaxpr(getattr(paged_cache, name))(cache, rows, rows)
    pools = {id(x) for x in jaxpr.jaxpr.invars if x.aval.ndim == 5}
    read = {id(x) for eqn in jaxpr.eqns for x in eqn.invars}
    assert len(pools) == 4
    assert not pools & read
