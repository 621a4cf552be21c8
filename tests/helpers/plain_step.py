"""Steps of a small cache, compared with plain loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from page_model import PageModel

from paged_jax import CacheConfig, LayerKV, PagedCache, begin_step, page_table
from paged_jax.kv import cache as paged_cache

NUM_PAGES, PAGE_SIZE, NUM_SEQS, WIDTH = 5, 8, 4, 3
NOWHERE = NUM_PAGES * PAGE_SIZE
TREE = np.random.default_rng(0).random((8, 3)) < 0.5
# num_tokens, max_q_len, entries (None: all rows), for all tests.
FLAT = (16, None, None)
SOME = (16, None, 3)
SHORT = (8, 3, 4)
DECODE = (4, 1, None)
SOME_DECODE = (3, 1, 3)


@functools.cache
def empty():
  config = CacheConfig(
    num_pages=NUM_PAGES,
    page_size=PAGE_SIZE,
    num_seqs=NUM_SEQS,
    max_len=WIDTH * PAGE_SIZE,
    dtype=jnp.float32,
  )
  return PagedCache.init([LayerKV(1, 4)], config)


@functools.partial(jax.jit, static_argnames=("num_tokens", "max_q_len"))
def _begin(cache, q_lens, rows, *, num_tokens, max_q_len):
  cache, step = begin_step(
    cache,
    q_lens,
    num_tokens,
    rows=rows,
    max_q_len=max_q_len,
    tree_mask=jnp.asarray(TREE) if max_q_len == 3 else None,
  )
  return cache, step, step.rows_of_tokens()


release = jax.jit(paged_cache.release)
_is_valid = jax.jit(lambda table: page_table.check(table).valid)


def begin_all(cache, q_lens, rows=None, shape=FLAT):
  """Begins a step with traced lengths. Returns cache, step, rows of tokens."""
  num_tokens, max_q_len, _ = shape
  i32 = lambda x: None if x is None else np.asarray(x, np.int32)
  return _begin(
    cache, i32(q_lens), i32(rows), num_tokens=num_tokens, max_q_len=max_q_len
  )


def begin(*args, **kwargs):
  """Returns the cache and the step of `begin_all`."""
  return begin_all(*args, **kwargs)[:2]


def table_of(cache):
  return cache.groups[0].table


def assert_unchanged(before, after, rows):
  for field in ("page_indices", "kv_lens", "min_lens"):
    old, new = (
      np.asarray(getattr(table_of(c), field)) for c in (before, after)
    )
    np.testing.assert_array_equal(old[list(rows)], new[list(rows)])


class Plain:
  """The expected step, from loops over entries and tokens and a PageModel."""

  def __init__(self, cache):
    self.model = PageModel(NUM_PAGES, PAGE_SIZE, NUM_SEQS, WIDTH)
    self.cache = cache

  def run(self, q_lens, rows, shape):
    """Runs a step and compares it. Returns `ok` of its entries."""
    named = list(range(NUM_SEQS)) if rows is None else rows
    cu_q_lens, wanted, entry_of, order = self._wanted(q_lens, named, shape)
    served, _ = self.model.plan_append(wanted, order)
    before = self.cache
    self.cache, step, rows_of_tokens = begin_all(before, q_lens, rows, shape)
    table = table_of(self.cache)
    entries = np.asarray(table.page_indices)
    for row, model in enumerate(self.model.rows):
      if served[row] and wanted[row]:
        model.tokens += [None] * wanted[row]
        num_pages = self.model.pages_for(len(model.tokens))
        model.pages = entries[row, :num_pages].tolist()
    assert bool(_is_valid(table))
    refused = [row for row, n in enumerate(wanted) if not (n and served[row])]
    assert_unchanged(before, self.cache, refused)

    ok = [
      entry_of.get(row) == entry and served[row]
      for entry, row in enumerate(named)
    ]
    assert np.asarray(step.ok).tolist() == ok
    assert np.asarray(step.cu_q_lens).tolist() == cu_q_lens
    lens = [len(row.tokens) for row in self.model.rows]
    assert np.asarray(self.cache.kv_lens).tolist() == lens
    pairs = list(zip(named, ok, strict=True))
    kv_lens = [lens[row] if good else 0 for row, good in pairs]
    assert np.asarray(step.kv_lens).tolist() == kv_lens
    nobody = np.full(WIDTH, NUM_PAGES)
    pages = [entries[r] if 0 <= r < NUM_SEQS else nobody for r in named]
    np.testing.assert_array_equal(step.groups[0].page_indices, pages)
    self._agree_on_tokens(step, rows_of_tokens, cu_q_lens, ok, kv_lens, pages)
    return ok

  def _wanted(self, q_lens, named, shape):
    """Returns offsets, permitted tokens of each row, entries and order."""
    num_tokens, max_q_len, _ = shape
    most = num_tokens if max_q_len is None else max_q_len
    wanted, entry_of, order = [0] * NUM_SEQS, {}, []
    cu_q_lens, end = [0], 0
    for entry, (row, count) in enumerate(zip(named, q_lens, strict=True)):
      end += 1 if max_q_len == 1 else max(count, 0)
      cu_q_lens.append(min(end, num_tokens))
      if not 0 <= row < NUM_SEQS or row in order:
        continue
      order.append(row)
      if 0 < count <= most and end <= num_tokens:
        wanted[row], entry_of[row] = count, entry
    return cu_q_lens, wanted, entry_of, order

  def _agree_on_tokens(
    self, step, rows_of_tokens, cu_q_lens, ok, kv_lens, pages
  ):
    num_tokens = len(rows_of_tokens)
    is_token, positions = [False] * num_tokens, [0] * num_tokens
    slots, entry_of_token = [NOWHERE] * num_tokens, [len(ok)] * num_tokens
    for i, (start, end) in enumerate(itertools.pairwise(cu_q_lens)):
      for token in range(start, end):
        entry_of_token[token] = i
        if ok[i]:
          position = kv_lens[i] - (end - token)
          is_token[token], positions[token] = True, position
          page, offset = divmod(position, PAGE_SIZE)
          slots[token] = pages[i][page] * PAGE_SIZE + offset
    assert np.asarray(step.is_token).tolist() == is_token
    assert np.asarray(step.positions).tolist() == positions
    assert np.asarray(step.groups[0].slots).tolist() == slots
    assert np.asarray(rows_of_tokens).tolist() == entry_of_token
