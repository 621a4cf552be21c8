"""A page table with a real pool, compared with the plain model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from page_model import PageModel

from paged_jax import page_table
from paged_jax.kv import pool as kv_pool

MOST_NEW = 72  # most new tokens of a row in one step


@functools.partial(jax.jit, static_argnames="most", donate_argnums=(0, 1))
def _append_and_write(table, pool, counts, tokens, order=None, most=None):
  """Runs a model step that writes a token's number as its K and V."""
  before = table.kv_lens
  result = page_table.append(table, counts, order=order, max_new_tokens=most)
  pool = kv_pool.copy_pages(pool, result.copies.src, result.copies.dst)
  row, nth = jnp.indices(tokens.shape, dtype=jnp.int32)
  position = before[row] + nth
  fresh = result.ok[row] & (nth < counts[row])
  slots = page_table.slots(
    result.table,
    jnp.where(fresh, row, table.num_seqs).reshape(-1),
    position.reshape(-1),
  )
  for layer in range(2):
    k = tokens.reshape(-1, 1, 1) + layer / 2
    pool = kv_pool.write(pool, layer, k, -k, slots)
  return result.table, pool, result.ok, result.copies


@functools.partial(jax.jit, static_argnames="max_copies", donate_argnums=(0, 1))
def compact(table, pool, max_copies):
  result = page_table.compact(table, max_copies)
  pool = kv_pool.copy_pages(pool, result.copies.src, result.copies.dst)
  return result.table, pool, result.copies


@functools.partial(jax.jit, static_argnames="num_pages")
def resize(table, pool, num_pages):
  result = page_table.resize(table, num_pages)
  return result.table, kv_pool.resize(pool, num_pages), result.ok


jitted = {
  name: jax.jit(getattr(page_table, name), donate_argnums=0)
  for name in (
    "adopt",
    "assign",
    "drop",
    "fork",
    "hold",
    "permute",
    "release",
    "release_outside_window",
    "truncate",
  )
}
is_valid = jax.jit(lambda table: page_table.check(table).valid)


class PagesAndModel:
  """Applies each transition to both, and compares them."""

  def _start(self, shape):
    self.model = PageModel(**shape)
    self.num_seqs, self.num_pages = shape["num_seqs"], shape["num_pages"]
    self.table = page_table.init(
      shape["num_pages"],
      shape["page_size"],
      shape["num_seqs"],
      shape["width"],
      tenants=shape.get("tenants"),
      quotas=shape.get("quotas"),
    )
    self.pool = kv_pool.init(
      shape["num_pages"], 2, 1, shape["page_size"], 1, jnp.float32
    )
    self.next_token = 1
    self.cached = []  # (pages, tokens) of each prefix that the cache holds

  def _token(self, counts):
    """Returns a number for each new token of this step."""
    tokens = np.zeros((self.num_seqs, MOST_NEW), np.float32)
    for seq, count in enumerate(counts):
      for nth in range(min(max(count, 0), MOST_NEW)):
        tokens[seq, nth] = self.next_token
        self.next_token += 1
    return tokens

  def _append(self, counts, order=None, most=None):
    counts = counts[: self.num_seqs]
    tokens = self._token(counts)
    ok, copies = self.model.plan_append(counts, order, most)
    free = set(range(self.num_pages)) - self.model.used()
    self.table, self.pool, served, done = _append_and_write(
      self.table,
      self.pool,
      np.asarray(counts, np.int32),
      tokens,
      None if order is None else np.asarray(order, np.int32),
      most=most,
    )
    assert np.asarray(served).tolist() == ok
    src = [
      row.pages[-1] if seq in copies else self.num_pages
      for seq, row in enumerate(self.model.rows)
    ]
    assert np.asarray(done.src).tolist() == src
    copied = np.asarray(done.dst) != self.num_pages
    assert set(np.flatnonzero(copied)) == copies
    by_row = [iter(row) for row in tokens.tolist()]
    entries = np.asarray(self.table.page_indices).tolist()
    taken = self.model.append(
      counts, ok, copies, entries, lambda seq: next(by_row[seq])
    )
    assert len(set(taken)) == len(taken)
    assert set(taken) <= free
    self._agree()

  def _change(self, name, *args):
    result = jitted[name](self.table, *args)
    self.table = result.table
    return np.asarray(result.ok).tolist()

  def _fork(self, pairs):
    src, dst = np.asarray(pairs, np.int32).T.clip(-1, self.num_seqs)
    ok = self._change("fork", src, dst)
    assert ok == self.model.fork(src.tolist(), dst.tolist())
    self._agree()

  def _hold(self, pages):
    padded = pages + [self.num_pages] * (self.model.width + 3 - len(pages))
    ok = self._change("hold", np.asarray(padded, np.int32))
    assert ok == self.model.hold(padded)

  def _agree(self):
    """Compares the table, and all tokens that can be read through it."""
    model, table = self.model, self.table
    assert bool(is_valid(table))
    num_pages, page_size = self.num_pages, model.page_size
    lens = np.asarray(table.kv_lens).tolist()
    assert lens == [len(row.tokens) for row in model.rows]
    floors = np.asarray(table.min_lens).tolist()
    assert floors == [row.floor for row in model.rows]
    assert np.asarray(table.tenants).tolist() == [r.tenant for r in model.rows]
    entries = np.full(table.page_indices.shape, num_pages)
    counts, holds = np.zeros((2, num_pages), int)
    for seq, row in enumerate(model.rows):
      for column, page in enumerate(row.pages):
        if page is not None:
          entries[seq, column] = page
          counts[page] += 1
    for page, times in model.holds.items():
      holds[page] = times
    assert np.array_equal(table.page_indices, entries)
    assert np.array_equal(table.holds, holds)
    assert np.array_equal(table.ref_counts, counts + holds)
    num_free = int(table.num_free)
    free = np.asarray(table.free_pages)[:num_free].tolist()
    assert sorted(free) == np.flatnonzero(counts + holds == 0).tolist()

    k, v = np.asarray(self.pool.k), np.asarray(self.pool.v)
    read = [(row.pages, row.tokens) for row in model.rows] + self.cached
    for pages, tokens in read:
      position = np.arange(len(tokens))
      page = np.asarray([num_pages if p is None else p for p in pages], int)
      page = page[position // page_size]
      kept = page < num_pages
      page, offset = page[kept], position[kept] % page_size
      expected = np.asarray(tokens, np.float32)[kept]
      for layer in range(2):
        here = (page, layer, 0, offset, 0)
        assert np.array_equal(k[here], expected + layer / 2)
        assert np.array_equal(v[here], -expected - layer / 2)
