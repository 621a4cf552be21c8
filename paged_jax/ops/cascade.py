"""Attention of sequences that begin alike, and the merging of its parts.

Sequences that were forked, or that found their prompt in a prefix cache, name
the same pages first:

  seq 0   | 7 2 9 4 | 1 8 |
  seq 1   | 7 2 9 4 | 3 |     pages 7 2 9 4 are attended once, with the queries
  seq 2   | 7 2 9 4 | 5 6 |   of all; 1 8, 3 and 5 6 with one query each

Queries that share keys fill the tensor cores, where one by one they would wait
for the memory. What they get from both parts is merged by its log-sum-exp.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Real

from paged_jax import devices
from paged_jax.kv import pool as kv_pool
from paged_jax.ops import checks as attention_checks
from paged_jax.ops.attention import paged_attention, ragged_paged_attention
from paged_jax.ops.options import ArrayOptions, Options


def merge_attention(
  *parts: tuple[
    Float[Array, "num_tokens num_q_heads head_dim"],
    Float32[Array, "num_tokens num_q_heads"],
  ],
  sinks: Float[Array, " num_q_heads"] | None = None,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float32[Array, "num_tokens num_q_heads"],
]:
  """Merges what the same queries got from different keys.

  Of keys that were cut into parts, whatever the cut, it gives what attention
  over all of them would: `merge_attention(part, part)`, where each part is what
  an op returns with `return_lse=True`.

  Args:
    parts: One or more pairs of an output [num_tokens, num_q_heads, head_dim],
      all in one dtype, and its log-sum-exp f32[num_tokens, num_q_heads], a
      natural logarithm. A part with -inf counts for nothing, whatever its
      output holds; if it is all but one, that one is returned as it is (but
      for -0, which becomes 0).
    sinks: [num_q_heads], one more logit per head in the denominator. Attend
      the parts without sinks and give them here: they must count once.

  Returns:
    The output in the dtype of the parts, and its log-sum-exp, sinks included.
    Tokens that saw nothing in any part give 0 and -inf.

  Raises:
    ValueError: If a shape or dtype is wrong.
  """
  _check_parts(parts)
  if sinks is not None:
    attention_checks.check_per_head(parts[0][0], sinks=sinks)
  return _merge(parts, sinks)


@jax.jit
def _merge(parts, sinks):
  """Merges in float32; see `merge_attention`."""
  outs, lses = zip(*parts, strict=True)
  top = functools.reduce(jnp.maximum, lses)
  empty = top == -jnp.inf
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)[None]
    top = jnp.maximum(top, sinks)
  shift = jnp.where(empty, 0.0, top)
  weights = [jnp.exp(lse - shift) for lse in lses]
  total = functools.reduce(jnp.add, weights)
  if sinks is not None:
    total += jnp.exp(sinks - shift)
  total = jnp.where(empty, 1.0, total)
  out = jnp.zeros(outs[0].shape, jnp.float32)
  for part, lse, weight in zip(outs, lses, weights, strict=True):
    # Of a part that saw nothing, not even NaN is left.
    weight = (weight / total)[..., None]
    seen = (lse != -jnp.inf)[..., None]
    out += jnp.where(seen, part.astype(jnp.float32) * weight, 0.0)
  lse = jnp.where(empty, -jnp.inf, shift + jnp.log(total))
  return out.astype(outs[0].dtype), lse


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
  attention_checks.check_pools(q, k_pages, v_pages, kv_lens, page_indices)
  attention_checks.check_one_query_each(q, kv_lens)
  devices.check_implementation(implementation)
  Options(
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    sliding_window=None,
    num_sink_tokens=0,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
  )
  ArrayOptions(k_scales, v_scales, sinks, None).check(q, k_pages)
  counts, groups = _groups(num_shared_pages, cu_group_lens, len(kv_lens))
  options = dict(
    k_scales=k_scales,
    v_scales=v_scales,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    return_lse=True,
    implementation=implementation,
  )
  num_pages, _, page_size, _ = k_pages.shape
  sizes = dict(page_size=page_size, num_pages=num_pages)
  split = _split(kv_lens, page_indices, counts, groups, **sizes)
  shared, shared_lse = ragged_paged_attention(
    q,
    k_pages,
    v_pages,
    split.shared_lens,
    split.shared_pages,
    groups,
    len(groups) - 1,
    causal=False,
    **options,
  )
  # Rows of no group were not written: what they hold must not be merged.
  shared_lse = jnp.where(split.joins[:, None], shared_lse, -jnp.inf)
  own, own_lse = paged_attention(
    q, k_pages, v_pages, split.own_lens, split.own_pages, **options
  )
  out, lse = merge_attention((shared, shared_lse), (own, own_lse), sinks=sinks)
  return (out, lse) if return_lse else out


class _Split(NamedTuple):
  """A batch, cut into what its rows share and what they have for their own."""

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
  attention_checks.check_ints(cu_group_lens=cu_group_lens)
  if cu_group_lens.ndim != 1 or len(cu_group_lens) < 2:
    raise ValueError(
      f"cu_group_lens.shape={cu_group_lens.shape} must be (num_groups + 1,)."
    )
  num_groups = len(cu_group_lens) - 1
  if isinstance(num_shared_pages, int):
    attention_checks.check_count("num_shared_pages", num_shared_pages, 0)
    num_shared_pages = np.int32(num_shared_pages)
  attention_checks.check_ints(num_shared_pages=num_shared_pages)
  if num_shared_pages.shape not in ((), (num_groups,)):
    raise ValueError(
      f"num_shared_pages.shape={num_shared_pages.shape} must be () or "
      f"({num_groups},): num_groups."
    )
  counts = jnp.broadcast_to(num_shared_pages, (num_groups,))
  return counts, jnp.asarray(cu_group_lens)


def _check_parts(parts) -> None:
  """Raises a ValueError if parts cannot be merged."""
  if not parts:
    raise ValueError("parts is empty: there is nothing to merge.")
  for i, (out, lse) in enumerate(parts):
    name = f"parts[{i}]"
    attention_checks.check_arrays(**{f"{name}[0]": out, f"{name}[1]": lse})
    first = parts[0][0]
    if out.dtype not in kv_pool.FLOAT_DTYPES or out.dtype != first.dtype:
      raise ValueError(
        f"{name}[0].dtype={out.dtype} must be float32, bfloat16 or float16, "
        "and the same in all parts."
      )
    if out.ndim != 3 or out.shape != first.shape:
      raise ValueError(
        f"{name}[0].shape={out.shape} must have 3 axes, and be the same in all "
        "parts."
      )
    if lse.dtype != jnp.float32:
      raise ValueError(f"{name}[1].dtype={lse.dtype} must be float32.")
    if lse.shape != out.shape[:2]:
      raise ValueError(f"{name}[1].shape={lse.shape} must be {out.shape[:2]}.")
