"""Paged decode attention for Hopper: few query tokens a sequence, split-KV.

Persistent programs attend equal shares of all KV tiles (`schedule`), item by
item: an item is the query heads of one KV head of one sequence. A program has
two warpgroups:

  memory   reads page ids from the page table as scalars, and copies Q, and K
           and V chunk by chunk (TMA) into a ring of `num_stages` tiles
  compute  S = K Q^T, mask, online softmax in base 2, O += V^T P   (wgmma)

Two programs share a multiprocessor, so that one computes while the other
waits. The queries are the columns of a tile: the query heads of a KV head (for
each query token, see `short_queries`), padded to a multiple of 8; what is
computed in the padding is not stored. A tile is `block_kv` consecutive
positions, copied in chunks that never straddle a page: `chunk = gcd(page_size,
block_kv)`.

  positions   0        64       128      192      256      320      384
  tiles       | sink   |        | skipped|        | window |  tail  |
  chunks      |p7|p2|p9|p4|                       |p5|p0|p3|p8|p6|--|
                          pages of 16 tokens, anywhere in the pool

Tiles between the sink tokens and the window are not visited (`kv_tiles`). An
item that lies in several shares leaves partials, which a second, small kernel
merges (`partials`). Pages of 8-bit numbers come with scales (`decode_tile`).

A key counts if its page is mapped and its position lies below the length and
in the window. Scores of other keys are selected away, and in tiles that have
any their rows of V are zeroed in shared memory (0 * NaN is NaN): what a key
holds that no query of the item sees leaves no trace in the output, bit for bit.
"""

import functools
import math
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Real

from pallas_kernels.common import gpu, schedule, tree_bits, warps
from pallas_kernels.common.checks import check_pages
from pallas_kernels.decode import compute, fragments, load, partials, softmax
from pallas_kernels.decode.config import (
  REDUCTION_BYTES,
  Config,
  default_config,
  unsupported,
)
from pallas_kernels.decode.problem import Problem, scratch

OPTIONS = (
  "scale",
  "sliding_window",
  "num_sink_tokens",
  "logits_soft_cap",
  "batch_invariant",
)


@functools.partial(jax.jit, static_argnames=(*OPTIONS, "config", "interpret"))
def paged_decode(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  *,
  scale: float,
  sliding_window: int | None,
  num_sink_tokens: int,
  logits_soft_cap: float | None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None,
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
  k_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_seqs num_q_heads head_dim"],
  Float[Array, "num_seqs num_q_heads"],
]:
  """Attends one query token a sequence, at its last position, over pages.

  Args:
    q: queries, bfloat16 or float16.
    k_pages: the pool of keys, in the dtype of q; or int8 or float8_e4m3fn.
    v_pages: the pool of values, in the dtype of the keys.
    kv_lens: tokens stored of each sequence, the query's own among them.
    page_indices: physical page of each logical page. A page that is not in
      [0, num_pages) is unmapped, and its positions are skipped.
    scale: factor of the scores.
    sliding_window: positions a query sees, its own among them, or None.
    num_sink_tokens: first positions that are seen besides the window.
    logits_soft_cap: scores become cap * tanh(score / cap), or None.
    batch_invariant: whether what a sequence gets must not depend, bit for bit,
      on the others; with the default config.
    sinks: a logit per query head that only the denominator counts, or None.
    alibi_slopes: per query head, what multiplies the position of a key minus
      that of the query, to be added to the score; cut at 2**95; or None.
    k_scales: f32, what multiplies a token's key of 8-bit numbers, else None.
    v_scales: the same of the values.
    config: tile sizes; `default_config` if None.
    interpret: parameters of the interpreter that stands in for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32. A sequence that sees nothing gets 0 and -inf.

  Raises:
    NotImplementedError: if the kernel does not take these shapes and dtypes.
    ValueError: if pages differ, scales are missing, of another shape or not
      asked for, or the config exceeds shared memory.
  """
  num_seqs, num_q_heads, head_dim = q.shape
  num_kv_heads = k_pages.shape[1]
  if reason := unsupported(
    head_dim,
    k_pages.shape[2],
    num_q_heads,
    num_kv_heads,
    q.dtype,
    kv_dtype=k_pages.dtype,
  ):
    raise NotImplementedError(reason)
  out, lse = attend(
    q.reshape(num_seqs, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
    None,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    scale=scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
    sinks=sinks,
    alibi_slopes=alibi_slopes,
    scales=(k_scales, v_scales),
    config=config,
    interpret=interpret,
  )
  return out.reshape(q.shape), lse.reshape(q.shape[:2])


def attend(
  q: Float[Array, "num_seqs num_kv_heads queries head_dim"],
  q_lens: Int[Array, " num_seqs"] | None,
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  *,
  sinks: Float[Array, " num_q_heads"] | None,
  alibi_slopes: Float[Array, " num_q_heads"] | None,
  scales: tuple[Array | None, Array | None],
  config: Config | None,
  max_q_len: int = 1,
  causal: bool = True,
  tree: tree_bits.Few | None = None,
  batch_invariant: bool = False,
  **options,
) -> tuple[
  Float[Array, "num_seqs num_kv_heads queries head_dim"],
  Float[Array, "num_seqs num_kv_heads queries"],
]:
  """Attends the queries of items, over pages; see `paged_decode`.

  Args:
    q: the queries of an item: `max_q_len` tokens of each query head of its KV
      head, token by token.
    q_lens: query tokens of each sequence, its last ones, at most `max_q_len`;
      None where all have one, and there is no tree.
    k_pages: see `paged_decode`.
    v_pages: see `paged_decode`.
    kv_lens: see `paged_decode`.
    page_indices: see `paged_decode`.
    sinks: see `paged_decode`.
    alibi_slopes: see `paged_decode`.
    scales: of keys and of values; see `paged_decode`.
    config: see `paged_decode`.
    max_q_len: most query tokens of a sequence.
    causal: whether a query sees no position past its own.
    tree: what of the query tokens is seen instead, or None.
    batch_invariant: see `paged_decode`.
    options: the other options of `paged_decode`.

  Returns:
    The output, and the natural log-sum-exp; 0 and -inf past `q_lens`.

  Raises:
    ValueError: see `paged_decode`.
  """
  check_pages(k_pages, v_pages, *scales)
  num_seqs, num_kv_heads, num_queries, head_dim = q.shape
  if 0 in (num_seqs, k_pages.shape[0], page_indices.shape[1]):
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
  if config is None:
    shape = num_seqs * num_kv_heads, num_queries, head_dim
    config = default_config(*shape, k_pages.dtype)
  group = num_queries // max_q_len
  problem = Problem(
    config=config,
    dtype=q.dtype,
    kv_dtype=k_pages.dtype,
    num_seqs=num_seqs,
    num_kv_heads=num_kv_heads,
    group=group,
    max_q_len=max_q_len,
    head_dim=head_dim,
    num_pages=k_pages.shape[0],
    page_size=k_pages.shape[2],
    pages_per_seq=page_indices.shape[1],
    has_sinks=sinks is not None,
    has_alibi=alibi_slopes is not None,
    causal=causal,
    has_tree=tree is not None,
    batch_invariant=batch_invariant,
    **options,
  )
  if alibi_slopes is not None:
    alibi_slopes = _by_query(problem, alibi_slopes)
    steepest = softmax.STEEPEST
    alibi_slopes = jnp.clip(alibi_slopes, -steepest, steepest)
  if sinks is not None:
    sinks = _by_query(problem, sinks)
  lens = kv_lens, page_indices, *(() if q_lens is None else (q_lens,))
  lens = [x.astype(jnp.int32) for x in lens]
  columns = ()
  if tree is not None:
    lens.append(tree.of_seqs)
    columns = (problem.pad_queries(jnp.repeat(tree.of_queries, group, axis=1)),)
  pages = k_pages, v_pages, *(x for x in scales if x is not None)
  per_head = sinks, alibi_slopes
  out, lse = _launch(problem, q, pages, per_head, columns, *lens)
  return out, lse[..., :num_queries]


def _by_query(problem, logits):
  """Returns logits of query heads in base 2, for the queries of each KV head.

  They are f32[num_kv_heads, num_queries], 0 for the padding.
  """
  logits = logits.astype(jnp.float32) * softmax.LOG2_E
  logits = logits.reshape(problem.num_kv_heads, problem.group)
  return problem.pad_queries(jnp.tile(logits, (1, problem.max_q_len)))


def _launch(
  problem: Problem, q, pages, per_head, tree, kv_lens, table, *q_lens
):
  """Runs the kernel, and merges what it split."""
  config, num_queries = problem.config, problem.num_queries
  # A sequence without tokens has a tile too, which writes its output of 0.
  tiles = jnp.maximum(problem.visit(kv_lens, *q_lens).num_visited, 1)
  fixed_splits = problem.batch_invariant
  plan = schedule.deal(
    tiles,
    problem.num_kv_heads,
    config.num_programs,
    fixed_splits=fixed_splits,
  )
  items = problem.num_seqs, problem.num_kv_heads
  places = 2, config.num_programs
  if fixed_splits:
    places = math.prod(items), problem.max_splits
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=(
      jax.ShapeDtypeStruct(
        (*items, problem.num_rows, problem.head_dim), problem.dtype
      ),
      jax.ShapeDtypeStruct((*items, num_queries), jnp.float32),
      *partials.shapes(places, problem.head_dim, num_queries),
    ),
    scratch_types=scratch(problem),
    grid=(config.num_programs,),
    grid_names=("program",),
    num_threads=1 + warps.num_threads(problem.interpret),
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=REDUCTION_BYTES,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=problem.interpret,
    kernel_name="paged_decode",
  )
  q = _rows_of_queries(problem, q)
  more = *q_lens, *tree, *(x for x in per_head if x is not None)
  out, lse, *parts = kernel(*plan, table, kv_lens, q, *pages, *more)
  if fixed_splits and problem.max_splits == 1:
    return out, lse
  # Few items are in many parts, many items in few.
  are_few = 8 * math.prod(items) < config.num_programs
  return partials.merge(
    plan,
    partials.Partials(*parts),
    per_head[0],
    out,
    lse,
    fixed_splits=fixed_splits,
    unroll=16 if are_few and not fixed_splits else 4,
    interpret=problem.interpret,
  )


def _rows_of_queries(problem, q):
  """Returns queries as rows; those of an item are `num_queries` from its first.

  The rows past its group belong to others, or are padding.
  """
  if problem.loads_tiles_of_q:
    q = problem.as_operand(q)
    if problem.is_interleaved:
      q = fragments.to_order(q)
    q = q.reshape(-1, problem.num_rows, problem.head_dim)
    return problem.pad_queries(q).reshape(-1, problem.head_dim)
  rows = q.reshape(-1, problem.head_dim)
  missing = max(problem.num_queries - len(rows), 0)
  return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _body(problem, *refs, **smem):
  """Runs a program: two warpgroups over its share of the tiles."""
  names = "starts", "firsts", "table", "lens", "q", "k", "v"
  names += ("k_scales", "v_scales") * problem.is_quantised
  names += ("q_lens",) * problem.has_q_lens
  names += ("tree_of_seqs", "tree") * problem.has_tree
  names += ("sinks",) * problem.has_sinks
  names += ("alibi_slopes",) * problem.has_alibi
  names += "out", "lse", "acc", "m", "l"
  gmem = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  smem = types.SimpleNamespace(**smem)
  plan = schedule.Plan(gmem.starts, gmem.firsts)
  if problem.interpret is None:
    gpu.follow_closely()

  def for_each_piece(carry, step):
    return schedule.for_each_piece(
      plan,
      problem.num_kv_heads,
      carry,
      step,
      fixed_splits=problem.batch_invariant,
    )

  @pl.when(lax.axis_index("warpgroup") == 0)
  def _compute():
    compute.run(problem, gmem, smem, for_each_piece)

  @pl.when(lax.axis_index("warpgroup") > 0)
  def _memory():
    load.run(problem, gmem, smem, for_each_piece)
