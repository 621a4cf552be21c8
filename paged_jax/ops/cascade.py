"""Cascade attention: reads a shared prefix once, then merges.

Forked sequences, and sequences whose prompts hit a prefix cache, start with
the same pages:

  seq 0   | 7 2 9 4 | 1 8 |
  seq 1   | 7 2 9 4 | 3 |       pages 7 2 9 4 are read once, for the queries
  seq 2   | 7 2 9 4 | 5 6 |     of all; 1 8, 3 and 5 6 for one query each

Many queries against the same keys fill the tensor cores, where one query at a
time is limited by memory bandwidth. The outputs of the two parts are merged by
their log-sum-exp (`merge_attention`).
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
  """Computes `paged_attention`, reading pages that sequences share only once.

  The result is that of `paged_attention` with the same arguments, whatever the
  table holds; the groups and `num_shared_pages` only affect the speed. All
  sequences of a group that start with the same `num_shared_pages` full pages
  attend to them together, and each attends to its other pages alone. The first
  sequence of the group that is long enough determines these pages. A sequence
  that starts with other pages, or is shorter, attends to all of its keys alone.

  This is faster than `paged_attention` if the shared keys outnumber the others
  by far and groups have more than a few sequences. There is no sliding window:
  it would hide the prefix, and `paged_attention` skips pages before the window.

  Args:
    q: See `paged_attention`.
    k_pages: See `paged_attention`.
    v_pages: See `paged_attention`.
    kv_lens: i32[num_seqs], tokens stored, including those in shared pages.
    page_indices: See `paged_attention`.
    num_shared_pages: Number of first pages that the sequences of a group share:
      i32[num_groups], or an integer for all groups. Its values are not static
      and cause no recompilation. Values of an array are clamped to
      `[0, pages_per_seq]`; an integer must be at least 0.
    cu_group_lens: i32[num_groups + 1], not decreasing: group `g` has the rows
      `cu_group_lens[g] : cu_group_lens[g + 1]`. Other rows attend alone. If
      None, all rows form one group.
    k_scales: See `paged_attention`.
    v_scales: See `paged_attention`.
    scale: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`. The output of a sequence still
      depends on the number of its shared pages, and the slowdown is larger.
    sinks: See `paged_attention`.
    return_lse: See `paged_attention`.
    implementation: See `paged_attention`. It applies to both parts; None
      chooses for each.

  Returns:
    See `paged_attention`.

  Raises:
    ValueError: See `paged_attention`; also if `num_shared_pages` or
      `cu_group_lens` has the wrong shape, dtype or range.
    NotImplementedError: If `implementation` cannot serve these arguments here;
      the message says why. If it is differentiated: a model trains without a
      cache.
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

  # 1. All queries of a group attend to the shared keys.
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
  # Rows that share nothing were not written, so their output is arbitrary.
  shared_lse = jnp.where(split.joins[:, None], shared_lse, -jnp.inf)

  # 2. The query of each row attends to the other keys of its row.
  own = attend_decode(
    q,
    kv._replace(kv_lens=split.own_lens, page_indices=split.own_pages),
    AttentionArrays(),
    spec,
    implementation,
  )

  # 3. Merge.
  out, lse = merge_attention((shared, shared_lse), own, sinks=sinks)
  return (out, lse) if return_lse else out


class _Split(NamedTuple):
  """A batch, split into the pages that rows share and all others."""

  joins: Array  # bool[num_seqs], whether a row shares its group's pages
  shared_lens: Array  # i32[num_groups]
  shared_pages: Array  # i32[num_groups, pages_per_seq]
  own_lens: Array  # i32[num_seqs]
  own_pages: Array  # i32[num_seqs, pages_per_seq]


@functools.partial(jax.jit, static_argnames=("page_size", "num_pages"))
def _split(kv_lens, page_indices, counts, groups, *, page_size, num_pages):
  """Splits a batch; see `cascade_attention`.

  Args:
    kv_lens: i32[num_seqs].
    page_indices: i32[num_seqs, pages_per_seq].
    counts: i32[num_groups], number of shared pages.
    groups: i32[num_groups + 1], first row of each group.
    page_size: Tokens per page.
    num_pages: Number of pages of the pool, which means no page.
  """
  num_seqs, pages_per_seq = page_indices.shape
  counts = jnp.clip(counts, 0, pages_per_seq)
  row = jnp.arange(num_seqs, dtype=jnp.int32)
  is_in = (groups[:-1, None] <= row[None]) & (row[None] < groups[1:, None])
  fills = is_in & (kv_lens[None] >= (counts * page_size)[:, None])
  # If no row of a group is long enough, none shares.
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
  """Checks the arguments, and returns the counts and the rows of groups."""
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
  return counts, jnp.clip(jnp.asarray(cu_group_lens), 0, num_seqs)
