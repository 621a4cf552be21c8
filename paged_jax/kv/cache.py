"""The paged KV cache of a model, and the tokens of one step through it.

A step reserves pages for every row at once, outside the layers, and works out
where each of its tokens lives. Every layer then writes its K and V there and
attends through the page table; nothing is allocated twice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from paged_jax import devices, page_table
from paged_jax.kv import pool as kv_pool
from paged_jax.kv.pool import KVPool
from paged_jax.page_table import PageTable
from paged_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """A page table, and the pool whose pages it hands out."""

  table: PageTable
  pool: KVPool
  # Of every op that reads, writes or copies pages; None chooses for each.
  implementation: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """The tokens of one model step, flat, and where each of them lives."""

  ok: Leaf  # bool[num_seqs], rows that had tokens and were given room
  positions: Leaf  # i32[num_tokens], 0 for tokens that have no room
  slots: Leaf  # i32[num_tokens], out of range for tokens that have no room
  cu_q_lens: Leaf  # i32[num_seqs + 1], offsets of the rows' tokens
  kv_lens: Leaf  # i32[num_seqs], 0 for rows that take no part
  # Whether token i is the one new token of row i.
  is_decode: bool = dataclasses.field(metadata=dict(static=True))


def init(
  *,
  num_pages: int,
  page_size: int,
  num_seqs: int,
  pages_per_seq: int,
  num_layers: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: DTypeLike = jnp.bfloat16,
  implementation: str | None = None,
) -> PagedCache:
  """Returns an empty cache; arguments as in `page_table` and `kv_pool`.

  `implementation`, `"mosaic_gpu"` or `"xla"`, holds for every op on the cache:
  attention, writes and page copies. None chooses for each op.

  Raises:
    ValueError: If an argument is out of its range.
  """
  devices.check_implementation(implementation)
  return PagedCache(
    table=page_table.init(num_pages, page_size, num_seqs, pages_per_seq),
    pool=kv_pool.init(
      num_pages, num_layers, num_kv_heads, page_size, head_dim, dtype
    ),
    implementation=implementation,
  )


def begin_step(
  cache: PagedCache,
  q_lens: Int[Array, " num_seqs"],
  num_tokens: int,
  *,
  rows: Bool[Array, " num_seqs"] | None = None,
) -> tuple[PagedCache, Step]:
  """Reserves room for the next tokens of every row: prefill, chunk or mixture.

  The tokens of row `s` are `cu_q_lens[s] : cu_q_lens[s + 1]` of the flat axis.

  Args:
    cache: The cache.
    q_lens: i32[num_seqs], new tokens of each row, 0 for none.
    num_tokens: Length of the flat token axis, at least the sum of `q_lens`.
    rows: bool[num_seqs], rows that take part, all if None. Tokens of the others
      are padding.

  Returns:
    The cache with lengths advanced for the rows that were served, and the
    step. Refused rows keep their state; their tokens are not written and
    attend to nothing.

  Raises:
    ValueError: As `page_table.append`.
  """
  wanted = jnp.asarray(q_lens, jnp.int32)
  if rows is not None:
    page_table.check_rows(cache.table, rows)
    wanted = jnp.where(rows, wanted, 0)
  cache, ok = _append(cache, wanted, num_tokens)
  q_lens = jnp.maximum(jnp.asarray(q_lens, jnp.int32), 0)
  table = cache.table
  takes_part = ok & (wanted > 0)
  kv_lens = jnp.where(takes_part, table.kv_lens, 0)

  ends = jnp.cumsum(q_lens, dtype=jnp.int32)
  cu_q_lens = jnp.pad(ends, (1, 0))
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  seq_ids = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)
  row = jnp.minimum(seq_ids, table.num_seqs - 1)
  written = (seq_ids < table.num_seqs) & takes_part[row]
  positions = kv_lens[row] - (ends[row] - token)
  positions = jnp.where(written, positions, 0)
  # Refused rows have no slot: of them only the old tokens are stored.
  slot_rows = jnp.where(written, seq_ids, table.num_seqs)
  return cache, Step(
    ok=takes_part,
    positions=positions,
    slots=page_table.slots(table, slot_rows, positions),
    cu_q_lens=cu_q_lens,
    kv_lens=kv_lens,
    is_decode=False,
  )


def begin_decode(
  cache: PagedCache, rows: Bool[Array, " num_seqs"]
) -> tuple[PagedCache, Step]:
  """Reserves room for one token of each row marked: token `i` is of row `i`.

  Args:
    cache: The cache.
    rows: bool[num_seqs], the rows that decode.

  Returns:
    As `begin_step`; `step.ok` is False for rows that were left out.

  Raises:
    ValueError: If `rows` is not bool[num_seqs].
  """
  num_seqs = cache.table.num_seqs
  page_table.check_rows(cache.table, rows)
  cache, ok = _append(cache, rows.astype(jnp.int32), 1)
  ok &= rows
  table = cache.table
  row = jnp.arange(num_seqs, dtype=jnp.int32)
  positions = jnp.where(ok, table.kv_lens - 1, 0)
  return cache, Step(
    ok=ok,
    positions=positions,
    slots=page_table.slots(table, jnp.where(ok, row, num_seqs), positions),
    cu_q_lens=jnp.arange(num_seqs + 1, dtype=jnp.int32),
    kv_lens=jnp.where(ok, table.kv_lens, 0),
    is_decode=True,
  )


def release(cache: PagedCache, rows: Bool[Array, " num_seqs"]) -> PagedCache:
  """Returns the cache with `rows` emptied; see `page_table.release`."""
  table = page_table.release(cache.table, rows)
  return dataclasses.replace(cache, table=table)


def _append(
  cache: PagedCache, num_new_tokens: Array, max_new_tokens: int
) -> tuple[PagedCache, Array]:
  """Reserves room, and carries out the copies that this asks for."""
  appended = page_table.append(
    cache.table, num_new_tokens, max_new_tokens=max_new_tokens
  )
  copies = appended.copies
  pool = kv_pool.copy_pages(
    cache.pool, copies.src, copies.dst, implementation=cache.implementation
  )
  cache = dataclasses.replace(cache, table=appended.table, pool=pool)
  return cache, appended.ok
