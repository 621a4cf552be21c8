"""A plain model of the page table: lists, sets and dicts, one row at a time.

It follows the documentation of `paged_jax.page_table`, imports nothing of it,
and keeps, besides the pages, the tokens that each row should read. Which free
pages a row gets is given by the caller.
"""

import dataclasses


@dataclasses.dataclass
class Row:
  """One sequence: its pages (None for a hole), and its tokens."""

  tenant: int = 0
  pages: list = dataclasses.field(default_factory=list)
  tokens: list = dataclasses.field(default_factory=list)
  floor: int = 0  # shortest length to truncate to

  def clear(self):
    self.pages, self.tokens, self.floor = [], [], 0

  def become(self, other):
    self.pages, self.tokens = list(other.pages), list(other.tokens)
    self.floor = other.floor

  @property
  def num_mapped(self):
    return sum(page is not None for page in self.pages)


class PageModel:
  """Rows and the pages that a prefix cache holds; all other pages are free."""

  def __init__(
    self, num_pages, page_size, num_seqs, width, tenants=None, quotas=None
  ):
    self.num_pages, self.page_size, self.width = num_pages, page_size, width
    self.rows = [Row(t) for t in tenants or [0] * num_seqs]
    self.quotas = quotas  # None: nothing is limited
    self.holds = {}  # page -> times, never 0

  def count(self, page):
    """Returns how many rows name the page, plus its holds."""
    named = sum(row.pages.count(page) for row in self.rows)
    return named + self.holds.get(page, 0)

  def used(self):
    """Returns the pages that are not free."""
    named = {p for row in self.rows for p in row.pages if p is not None}
    return named | set(self.holds)

  def num_free(self):
    return self.num_pages - len(self.used())

  def pages_for(self, num_tokens):
    return -(-num_tokens // self.page_size)

  def room(self):
    """Returns how many pages each tenant may still take; None: no limits."""
    if self.quotas is None:
      return None
    room = list(self.quotas)
    for row in self.rows:
      room[row.tenant] -= row.num_mapped
    return room

  def exists(self, seq):
    return 0 <= seq < len(self.rows)

  # -- append

  def plan_append(self, counts, order=None, most=None):
    """Returns which rows are served, and which of them copy their last page."""
    seqs = range(len(self.rows))
    order = self._serving_order(order)
    need = self._needs(counts, order, most)
    writers = {}  # page -> rows that write it, in serving order
    for seq in order:
      row = self.rows[seq]
      if need[seq] is not None and counts[seq] and self._partial(row):
        writers.setdefault(row.pages[-1], []).append(seq)
    spared = {g[-1] for p, g in writers.items() if len(g) == self.count(p)}
    group = {seq: g for g in writers.values() for seq in g}

    free, blocked, served = self.num_free(), False, set()
    for seq in order:
      if need[seq] is None:
        continue
      pages = need[seq] + (seq in group and seq not in spared)
      if pages and (blocked or pages > free):
        blocked = True
        continue
      if seq in spared and any(s not in served for s in group[seq][:-1]):
        continue
      free -= pages
      served.add(seq)

    copies = set()
    for page, members in writers.items():
      done = [seq for seq in members if seq in served]
      whole = done == members and len(members) == self.count(page)
      copies |= set(done[1:] if whole else done)
    return [seq in served for seq in seqs], copies

  def append(self, counts, ok, copies, entries, new_token):
    """Adds tokens to the rows that are `ok`; `entries[seq]` are their pages.

    Returns the pages that were handed out.
    """
    taken = []
    for seq, row in enumerate(self.rows):
      if not ok[seq]:
        continue
      kept = len(row.pages) - (seq in copies)
      length = len(row.tokens) + counts[seq]
      fresh = list(entries[seq][kept : self.pages_for(length)])
      taken += fresh
      row.pages[kept:] = fresh
      row.tokens += [new_token(seq) for _ in range(counts[seq])]
    return taken

  def _partial(self, row):
    return len(row.tokens) % self.page_size != 0

  def _serving_order(self, order):
    order = [s for s in (order or []) if self.exists(s)]
    return list(dict.fromkeys(order + list(range(len(self.rows)))))

  def _needs(self, counts, order, most):
    """Returns the new pages of each row; None if it is refused by itself."""
    need, room, blocked = [None] * len(self.rows), self.room(), set()
    for seq in order:
      row, count = self.rows[seq], counts[seq]
      length = len(row.tokens) + count
      if count < 0 or (most is not None and count > most):
        continue
      if length > self.width * self.page_size:
        continue
      pages = self.pages_for(length) - len(row.pages)
      if room is not None and pages:
        if row.tenant in blocked or pages > room[row.tenant]:
          blocked.add(row.tenant)
          continue
        room[row.tenant] -= pages
      need[seq] = pages
    return need

  # -- the other transitions; each returns the expected `ok`

  def release(self, seqs):
    for seq in seqs:
      self.rows[seq].clear()

  def truncate(self, seqs, lengths):
    ok, named = [], set()
    for seq, length in zip(seqs, lengths, strict=True):
      if seq == len(self.rows):
        ok.append(True)
        continue
      ok.append(
        self.exists(seq)
        and seq not in named
        and self.rows[seq].floor <= length <= len(self.rows[seq].tokens)
      )
      named.add(seq)
      if ok[-1]:
        row = self.rows[seq]
        del row.tokens[length:], row.pages[self.pages_for(length) :]
    return ok

  def release_outside_window(self, window, sinks):
    for row in self.rows:
      left = max(0, len(row.tokens) - window) // self.page_size
      gone = [
        column
        for column in range(left)
        if column * self.page_size >= sinks and row.pages[column] is not None
      ]
      for column in gone:
        row.pages[column] = None
      if gone:
        row.floor = max(row.floor, left * self.page_size + window)

  def fork(self, srcs, dsts):
    before = [dataclasses.replace(row) for row in self.rows]
    wants = [before[src] if self.exists(src) else None for src in srcs]
    return self._start(dsts, wants, srcs)

  def adopt(self, seqs, pages, lengths, floors, tokens):
    requests = zip(pages, lengths, floors, tokens, strict=True)
    wants = [self._wanted(*request) for request in requests]
    return self._start(seqs, wants, [0] * len(seqs))

  def _wanted(self, entries, length, floor, tokens):
    """Returns the row that a cache hit describes; None if it is invalid."""
    num = self.pages_for(max(length, 0))
    row = [None if p == self.num_pages else p for p in entries[:num]]
    named = [page for page in row if page is not None]
    holes = [column for column, page in enumerate(row) if page is None]
    good = (
      0 <= length <= self.width * self.page_size
      and 0 <= floor <= length
      and set(named) <= self.used()
      and len(set(named)) == len(named)
      and all(page == self.num_pages for page in entries[num:])
      and all((hole + 1) * self.page_size < floor for hole in holes)
    )
    return Row(0, row, tokens, floor if holes else 0) if good else None

  def _start(self, dsts, wants, srcs):
    """Fills the empty rows `dsts` with the rows `wants`; refuses None."""
    nobody, ok, named, blocked = len(self.rows), [], set(), set()
    room = self.room()
    was_empty = [not row.tokens for row in self.rows]
    for dst, want, src in zip(dsts, wants, srcs, strict=True):
      if nobody in (dst, src):
        ok.append(True)
        continue
      first = dst not in named
      named.add(dst)
      if not (self.exists(dst) and was_empty[dst] and first and want):
        ok.append(False)
        continue
      row = self.rows[dst]
      if room is not None and want.num_mapped:
        if row.tenant in blocked or want.num_mapped > room[row.tenant]:
          blocked.add(row.tenant)
          ok.append(False)
          continue
        room[row.tenant] -= want.num_mapped
      row.become(want)
      ok.append(True)
    return ok

  def permute(self, parents):
    if not all(0 <= parent <= len(self.rows) for parent in parents):
      return False
    before, room = [dataclasses.replace(row) for row in self.rows], self.room()
    for row, parent in zip(self.rows, parents, strict=True):
      row.become(before[parent] if parent < len(before) else Row())
    later = self.room()
    if room is not None and any(
      after < 0 and after < was for was, after in zip(room, later, strict=True)
    ):
      self.rows = before
      return False
    return True

  def hold(self, pages):
    used = self.used()
    for page in pages:
      if page in used:
        self.holds[page] = self.holds.get(page, 0) + 1
    return [page in used or page == self.num_pages for page in pages]

  def drop(self, pages):
    ok = []
    for page in pages:
      ok.append(page == self.num_pages or page in self.holds)
      if page in self.holds:
        self.holds[page] -= 1
        if not self.holds[page]:
          del self.holds[page]
    return ok

  def assign(self, seqs, tenants):
    ok, named = [], set()
    for seq, tenant in zip(seqs, tenants, strict=True):
      known = 0 <= tenant < (1 if self.quotas is None else len(self.quotas))
      good = self.exists(seq) and seq not in named and known
      good = good and not self.rows[seq].tokens
      named.add(seq)
      if good:
        self.rows[seq].tenant = tenant
      ok.append(good or seq == len(self.rows))
    return ok

  def compact(self, max_copies):
    """Returns the copies (source, target), the highest source first."""
    used = self.used()
    gaps = [p for p in range(len(used)) if p not in used]
    strays = sorted((p for p in used if p >= len(used)), reverse=True)
    moves = list(zip(strays, gaps, strict=True))[:max_copies]
    renamed = dict(moves)
    for row in self.rows:
      row.pages = [renamed.get(page, page) for page in row.pages]
    self.holds = {renamed.get(p, p): n for p, n in self.holds.items()}
    return moves
