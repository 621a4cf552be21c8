"""Cascade attention: read a shared prefix once, then merge.

Sequences that were forked, or that found their prompt in a prefix cache, begin
with the same pages:

  seq 0   | 7 2 9 4 | 1 8 |
  seq 1   | 7 2 9 4 | 3 |     pages 7 2 9 4 are attended once, with the queries
  seq 2   | 7 2 9 4 | 5 6 |   of all; 1 8, 3 and 5 6 with one query each

Queries that share keys fill the tensor cores; one by one they would wait for
memory. The outputs of both parts are merged by their log-sum-exp.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Real

from paged_jax import dispatch
from paged_jax.ops import checks
from paged_jax.ops.attention import attend_decode, attend_ragged
from paged_jax.ops.merge import merge_attention
from paged_jax.ops.options import check_arrays, make_spec
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionArrays, check_count


def cascade_attention(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  num_shared_pages: Int[Array, "*num_groups"] | int,
  *,
  cu_group_lens: Int[Array, " num_bounds"] | None = None,
  k_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float32[Array, "num_pages num_kv_heads page_size"] | None = None,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Decodes like `paged_attention`, reading pages that rows share only once.

  The result is that of `paged_attention` on the same arguments, whatever the
  table holds: what is shared decides only how fast it comes. Rows of a group
  whose first `num_shared_pages` pages are the same, and full, attend these
  together, and the rest each on its own. What counts are the pages of the
  group's first row that fills as many; a row that begins with others, or is
  shorter, attends all of its keys on its own.

  It pays where shared keys are many more than own ones, and rows more than a
  few. There are no sliding windows: with one, a row sees the end of its keys
  only, and `paged_attention` reads no more than that.

  Args:
    q: See `paged_attention`.
    k_pages: See `paged_attention`.
    v_pages: See `paged_attention`.
    kv_lens: i32[num_seqs], tokens stored, shared ones included.
    page_indices: See `paged_attention`.
    num_shared_pages: How many pages, from the first, the rows of a group share:
      i32[num_groups], or a number for all groups. Values are not static: they
      compile nothing anew. In an array, those below 0 count as 0; those beyond
      the table count as all of its columns.
    cu_group_lens: i32[num_groups + 1], at which row each group begins, not
      decreasing, and at the end one past the last; other rows attend on their
      own. All rows are one group if None.
    k_scales: See `paged_attention`, as for the other options.
    v_scales: See `paged_attention`.
    scale: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`. What a row gets still depends on how
      many pages it shares, and the kernel's speed suffers more.
    sinks: See `paged_attention`.
    return_lse: See `paged_attention`.
    implementation: Of both parts: see `paged_attention`. None chooses for each.

  Returns:
    See `paged_attention`.

  Raises:
    ValueError: If a shape, dtype or option is wrong.
    NotImplementedError: If `implementation` cannot serve these arguments here.
  """
  kv = PagedKV(
    k_pages, v_pages, k_scales, v_scales, None, kv_lens, page_indices
  )
  checks.check_paged(q, kv)
  checks.check_one_query_each(q, kv_lens)
  dispatch.check_implementation(implementation)
  spec = make_spec(
    q.shape[-1],
    scale,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
  )
  check_arrays(AttentionArrays(sinks=sinks), q, spec)
  counts, groups = _groups(num_shared_pages, cu_group_lens, len(kv_lens))
  num_pages, _, page_size, _ = k_pages.shape
  sizes = dict(page_size=page_size, num_pages=num_pages)
  split = _split(kv_lens, page_indices, counts, groups, **sizes)

  # 1. The shared keys, by all queries of a group.
  shared, shared_lse = attend_ragged(
    q,
    kv._replace(kv_lens=split.shared_lens, page_indices=split.shared_pages),
    groups,
    jnp.int32(len(groups) - 1),
    AttentionArrays(),
    dataclasses.replace(spec, causal=False),
    implementation,
    max_q_len=None,
  )
  # Rows of no group were not written: what they hold must not be merged.
  shared_lse = jnp.where(split.joins[:, None], shared_lse, -jnp.inf)

  # 2. The keys of each row alone.
  own = attend_decode(
    q,
    kv._replace(kv_lens=split.own_lens, page_indices=split.own_pages),
    AttentionArrays(),
    spec,
    implementation,
  )

  # 3. Both.
  out, lse = merge_attention((shared, shared_lse), own, sinks=sinks)
  return (out, lse) if return_lse else out


class _Split(NamedTuple):
  """A batch, cut into the pages that rows share and those of each row."""

  joins: Array  # bool[num_seqs], whether a row shares
  shared_lens: Array  # i32[num_groups]
  shared_pages: Array  # i32[num_groups, pages_per_seq]
  own_lens: Array  # i32[num_seqs]
  own_pages: Array  # i32[num_seqs, pages_per_seq]


@functools.partial(jax.jit, static_argnames=("page_size", "num_pages"))
def _split(kv_lens, page_indices, counts, groups, *, page_size, num_pages):
  """Cuts a batch; see `cascade_attention`.

  Args:
    kv_lens: i32[num_seqs].
    page_indices: i32[num_seqs, pages_per_seq].
    counts: i32[num_groups], how many pages are shared.
    groups: i32[num_groups + 1], where they begin.
    page_size: Tokens in a page.
    num_pages: In the pool: the sentinel.
  """
  num_seqs, pages_per_seq = page_indices.shape
  counts = jnp.clip(counts, 0, pages_per_seq)
  row = jnp.arange(num_seqs, dtype=jnp.int32)
  is_in = (groups[:-1, None] <= row[None]) & (row[None] < groups[1:, None])
  fills = is_in & (kv_lens[None] >= (counts * page_size)[:, None])
  # Nobody shares where no row of the group is long enough.
  leader = jnp.min(jnp.where(fills, row[None], num_seqs), 1, initial=num_seqs)
  first = jnp.full((len(counts), pages_per_seq), num_pages, jnp.int32)
  if num_seqs > 0:
    first = page_indices.at[leader].get(mode="fill", fill_value=num_pages)
  group = jnp.argmax(is_in, axis=0)
  column = jnp.arange(pages_per_seq, dtype=jnp.int32)[None]
  differs = (page_indices != first[group]) & (column < counts[group][:, None])
  joins = fills.any(axis=0) & ~differs.any(axis=1)
  skipped = jnp.where(joins, counts[group], 0)
  is_used = (fills & joins[None]).any(axis=1)
  own_pages = page_indices.at[row[:, None], column + skipped[:, None]].get(
    mode="fill", fill_value=num_pages
  )
  return _Split(
    joins=joins,
    shared_lens=jnp.where(is_used, counts * page_size, 0),
    shared_pages=first,
    own_lens=kv_lens - skipped * page_size,
    own_pages=own_pages,
  )


def _groups(num_shared_pages, cu_group_lens, num_seqs):
  """Checks and returns pages that are shared, and rows where groups begin."""
  if cu_group_lens is None:
    cu_group_lens = np.array([0, num_seqs], np.int32)
  checks.check_ints(cu_group_lens=cu_group_lens)
  if cu_group_lens.ndim != 1 or len(cu_group_lens) < 2:
    raise ValueError(
      f"cu_group_lens.shape={cu_group_lens.shape} must be (num_groups + 1,)."
    )
  num_groups = len(cu_group_lens) - 1
  if isinstance(num_shared_pages, int):
    check_count("num_shared_pages", num_shared_pages, 0)
    num_shared_pages = np.int32(num_shared_pages)
  checks.check_ints(num_shared_pages=num_shared_pages)
  if num_shared_pages.shape not in ((), (num_groups,)):
    raise ValueError(
      f"num_shared_pages.shape={num_shared_pages.shape} must be () or "
      f"({num_groups},): num_groups."
    )
  counts = jnp.broadcast_to(num_shared_pages, (num_groups,))
  return counts, jnp.asarray(cu_group_lens)
