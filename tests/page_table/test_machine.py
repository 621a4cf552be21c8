"""Random programs of all transitions, compared with the plain model.

`PAGED_JAX_PROGRAMS=100000 pytest tests/page_table/test_machine.py` runs
100000 programs.
"""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
  RuleBasedStateMachine,
  initialize,
  invariant,
  rule,
  run_state_machine_as_test,
)
from page_pair import MOST_NEW, PagesAndModel, compact, is_valid, jitted, resize

from paged_jax import page_table

PROGRAMS = int(os.environ.get("PAGED_JAX_PROGRAMS", "2000"))

MOST_ROWS = 8
# Pages that are left free before each step, in turn.
LEAVE = (0, 0, 1, 0, 0, 2, 0)
# Pools that a few rows can fill.
SHAPES = (
  dict(num_pages=1, page_size=8, num_seqs=2, width=2),
  dict(num_pages=4, page_size=8, num_seqs=5, width=3),
  dict(
    num_pages=12,
    page_size=8,
    num_seqs=6,
    width=4,
    tenants=[0, 1, 0, 1, 0, 2],
    quotas=[6, page_table.NO_QUOTA, 3],
  ),
  dict(num_pages=64, page_size=8, num_seqs=8, width=12),
)


_seq = st.integers(-1, MOST_ROWS + 1)
_page = st.integers(-1, 65)


def _few(*elements):
  return st.lists(st.tuples(*elements), min_size=3, max_size=3)


def _each_row(elements):
  return st.lists(elements, min_size=MOST_ROWS, max_size=MOST_ROWS)


class Pages(PagesAndModel, RuleBasedStateMachine):
  @initialize(
    shape=st.sampled_from(SHAPES),
    prompts=_each_row(st.sampled_from([20, 0, 12, 20, MOST_NEW])),
  )
  def start(self, shape, prompts):
    self._start(shape)
    self._append(prompts)
    self.num_steps = 0

  @invariant()
  def the_pool_is_nearly_full(self):
    """Gives rows all pages that are free, except one or two at times."""
    left = self.model.num_free() - LEAVE[self.num_steps % len(LEAVE)]
    self.num_steps += 1
    counts, page_size = [], self.model.page_size
    for row in self.model.rows:
      pages = max(0, min(left, self.model.width - len(row.pages)))
      pages = min(pages, MOST_NEW // page_size - 1)
      # Lengths start and end at varying offsets in a page.
      some = self.num_steps * 5 % page_size
      room = len(row.pages) * page_size - len(row.tokens)
      counts.append(room + pages * page_size - some if pages else 0)
      left -= pages
    if any(counts):
      self._append(counts)

  @rule(
    counts=_each_row(
      st.sampled_from([0, 1, 3, 7, 8, 9, 20, MOST_NEW, -1, 2**31 - 1])
    )
  )
  def append(self, counts):
    self._append(counts)

  @rule(
    counts=_each_row(st.sampled_from([0, 1, 5, 8, 20])),
    order=_each_row(_seq),
  )
  def append_in_order(self, counts, order):
    self._append(counts, order[: self.num_seqs])

  @rule(counts=_each_row(st.sampled_from([0, 1, 1, 1, 1, 2])))
  def decode(self, counts):
    self._append(counts, most=1)

  @rule(count=st.sampled_from([1, 1, 3, 9]), out=_seq)
  def grow_all_but_one(self, count, out):
    self._append([count * (seq != out) for seq in range(self.num_seqs)])

  @rule(src=_seq, out=_seq, order=_each_row(_seq))
  def fork_and_diverge(self, src, out, order):
    src = min(max(src, 0), self.num_seqs - 1)
    empty = [s for s, row in enumerate(self.model.rows) if not row.tokens]
    forks = [(src, dst) for dst in empty[:3]]
    self._fork((forks + [(0, MOST_ROWS)] * 3)[:3])
    shared = self.model.rows[src].pages
    self._append(
      [
        int(bool(shared) and seq != out and row.pages == shared)
        for seq, row in enumerate(self.model.rows)
      ],
      order[: self.num_seqs],
    )

  @rule(pairs=_few(_seq, _seq))
  def fork(self, pairs):
    self._fork(pairs)

  @rule(
    parents=_each_row(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 8, 9])),
    valid=st.sampled_from([True] * 7 + [False]),
  )
  def permute(self, parents, valid):
    parents = np.asarray(parents[: self.num_seqs], np.int32)
    if valid:
      parents = parents.clip(0, self.num_seqs)
    ok = self._change("permute", parents)
    assert ok == self.model.permute(parents.tolist())
    self._agree()

  @rule(pairs=_few(_seq, st.integers(-1, 40)))
  def truncate(self, pairs):
    seqs = [min(seq, self.num_seqs) for seq, _ in pairs]
    lens = [len(row.tokens) for row in self.model.rows]
    lengths = [
      lens[min(max(seq, 0), self.num_seqs - 1)] - cut
      for seq, (_, cut) in zip(seqs, pairs, strict=True)
    ]
    ok = self._change(
      "truncate", np.asarray(seqs, np.int32), np.asarray(lengths, np.int32)
    )
    assert ok == self.model.truncate(seqs, lengths)
    self._agree()

  @rule(rows=_each_row(st.sampled_from([False] * 4 + [True])))
  def release(self, rows):
    rows = np.asarray(rows[: self.num_seqs])
    self.table = jitted["release"](self.table, rows)
    self.model.release(np.flatnonzero(rows))
    self._agree()

  @rule(
    window=st.sampled_from([1, 3, 8, 9, 20]),
    sinks=st.sampled_from([0, 0, 1, 8, 9]),
  )
  def release_outside_window(self, window, sinks):
    self.table = jitted["release_outside_window"](
      self.table, np.int32(window), np.int32(sinks)
    )
    self.model.release_outside_window(window, sinks)
    self._agree()

  @rule(seq=_seq)
  def hold_a_row(self, seq):
    row = self.model.rows[min(max(seq, 0), self.num_seqs - 1)]
    pages = [page for page in row.pages if page is not None]
    self._hold(pages)
    if pages and len(pages) == len(row.pages):
      self.cached.append((pages, list(row.tokens)))
    self._agree()

  @rule(pages=_few(_page))
  def hold(self, pages):
    self._hold([min(page, self.num_pages + 1) for (page,) in pages])
    self._agree()

  @rule(pages=_few(_page), whole=st.booleans())
  def drop(self, pages, whole):
    pages = [min(page, self.num_pages + 1) for (page,) in pages]
    if whole and self.cached:
      named = self.cached[0][0]
      pages = [*named, *named[:2]]  # some pages twice
    padded = pages + [self.num_pages] * (self.model.width + 3 - len(pages))
    ok = self._change("drop", np.asarray(padded, np.int32))
    assert ok == self.model.drop(padded)
    self.cached = [
      (named, tokens)
      for named, tokens in self.cached
      if set(named) <= set(self.model.holds)
    ]
    self._agree()

  @rule(
    seqs=_few(_seq, st.integers(0, 40)),
    fault=st.sampled_from(
      [None] * 5 + ["more", "fewer", "twice", "free", "low"]
    ),
  )
  def adopt(self, seqs, fault):
    known = [(*hit, 0) for hit in self.cached[:3]] + [
      (row.pages, row.tokens, row.floor) for row in self.model.rows if row.pages
    ]
    if not known:
      known = [([], [], 0)]
    rows, pages, lens, floors, read = [], [], [], [], []
    for nth, (seq, cut) in enumerate(seqs):
      named, tokens, floor = known[(nth + cut) % len(known)]
      length = max(len(tokens) - cut, 0)
      nothing = self.num_pages
      named = [nothing if page is None else page for page in named]
      named = named[: self.model.pages_for(length)]
      if named and fault == "more":
        length += len(named) * self.model.page_size
      elif named and fault == "fewer":
        length = 0
      elif named and fault == "twice":
        named[0] = named[-1]
      elif named and fault == "free":
        named[-1] = max(set(range(self.num_pages + 2)) - self.model.used())
      rows.append(min(seq, self.num_seqs))
      blank = [self.num_pages] * (self.model.width - len(named))
      pages.append(named + blank)
      lens.append(length)
      floors.append(floor - (fault == "low"))
      read.append(tokens[:length])
    request = rows, pages, lens, floors
    ok = self._change("adopt", *(np.asarray(x, np.int32) for x in request))
    assert ok == self.model.adopt(*request, read)
    self._agree()

  @rule(pairs=_few(_seq, st.integers(-1, 3)))
  def assign(self, pairs):
    seqs, tenants = np.asarray(pairs, np.int32).T.clip(-1, self.num_seqs)
    ok = self._change("assign", seqs, tenants)
    assert ok == self.model.assign(seqs.tolist(), tenants.tolist())
    self._agree()

  @rule(max_copies=st.sampled_from([None, 2]))
  def compact(self, max_copies):
    self.table, self.pool, copies = compact(
      self.table, self.pool, max_copies=max_copies
    )
    moves = self.model.compact(max_copies)
    src, dst = np.asarray(copies.src), np.asarray(copies.dst)
    moved = zip(src.tolist(), dst.tolist(), strict=True)
    nowhere = (self.num_pages, self.num_pages)
    assert [move for move in moved if move != nowhere] == moves
    renamed = dict(moves)
    self.cached = [
      ([renamed.get(page, page) for page in pages], tokens)
      for pages, tokens in self.cached
    ]
    self._agree()

  @rule(change=st.sampled_from([3, -1]))
  def resize_there_and_back(self, change):
    other = self.num_pages + change
    if not other:
      return
    table, pool, ok = resize(self.table, self.pool, other)
    assert bool(ok) == all(page < other for page in self.model.used())
    assert bool(is_valid(table))
    if ok:
      self.table, self.pool, ok = resize(table, pool, self.num_pages)
      assert bool(ok)
    self._agree()


@pytest.mark.slow
def test_random_programs_agree_with_the_model():
  run_state_machine_as_test(
    Pages,
    settings=settings(
      max_examples=PROGRAMS,
      stateful_step_count=14,
      deadline=None,
      suppress_health_check=list(HealthCheck),
    ),
  )
