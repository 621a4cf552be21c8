"""Paged attention of many query tokens a sequence, for Hopper.

Prefill, chunks on top of a context, decode, and mixtures: queries of all
sequences lie one after the other on a token axis, and are the last tokens of
their sequences. Persistent programs attend items (`ragged_schedule`): a tile of
query tokens of one sequence, for one KV head. The rows of a tile are the query
heads of the KV head, token by token, so that K and V are read once for all of
them. A program has a warpgroup for memory and others that compute:

  memory   reads page ids from the page table as scalars, and copies Q, into a
           ring of `num_q_stages`, and K and V chunk by chunk (TMA), into rings
           of `num_stages` tiles (`ragged_load`); 8-bit numbers take a detour
           (`ragged_widen`)
  compute  64 rows each: S = Q K^T, mask, online softmax in base 2, O += P V
           (wgmma); P V of a tile goes on during the softmax of the next

  products of a warpgroup   QK |      | QK, PV | QK, PV | QK, PV | PV
  its softmax                  | soft |   soft |   soft |   soft |

A tile of K is `block_kv` consecutive positions, copied in chunks that never
straddle a page: `chunk = gcd(page_size, block_kv)`. Which tiles are visited is
as in decode (`kv_tiles`); most of them are seen whole by every row, and need no
mask. Where a mask tells what is seen of the query tokens, these are the tiles
before the first of them (`tree_bits`).

A key counts if its page is mapped and the query sees its position. Scores of
other keys are selected away, and rows of V that no query of the item sees are
zeroed in shared memory (0 * NaN is NaN).
"""

import dataclasses
import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from pallas_kernels.common import schedule, tree_bits, warps
from pallas_kernels.common.checks import check_pages
from pallas_kernels.decode import partials
from pallas_kernels.decode import softmax as decode_softmax
from pallas_kernels.decode.config import is_quantised
from pallas_kernels.ragged import (
  compute,
  load,
  load_quantised,
  output,
  query_tiles,
)
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged.config import Config, default_config
from pallas_kernels.ragged.problem import (
  COMPILER_PARAMS,
  Count,
  Item,
  Problem,
  Work,
  scratch,
)

OPTIONS = (
  "scale",
  "sliding_window",
  "num_sink_tokens",
  "logits_soft_cap",
  "causal",
  "batch_invariant",
)


@functools.partial(jax.jit, static_argnames=(*OPTIONS, "config", "interpret"))
def attend(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  k_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Real[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  cu_q_lens: Int[Array, " num_seqs+1"],
  num_active: Int[Array, ""],
  *,
  scale: float,
  sliding_window: int | None,
  num_sink_tokens: int,
  logits_soft_cap: float | None,
  sinks: Float[Array, " num_q_heads"] | None,
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
  k_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  v_scales: Float[Array, "num_pages num_kv_heads page_size"] | None = None,
  causal: bool = True,
  tree_mask: Bool[Array, "num_tokens max_new"] | None = None,
  batch_invariant: bool = False,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float[Array, "num_tokens num_q_heads"],
]:
  """Attends the last tokens of each sequence over pages.

  Args:
    q: queries of all sequences, one sequence after the other, bfloat16 or
      float16.
    k_pages: the pool of keys, in the dtype of q, or int8 or float8_e4m3fn with
      scales.
    v_pages: the pool of values, in the dtype of k_pages.
    kv_lens: tokens stored of each sequence, the queries' own among them.
    page_indices: physical page of each logical page. A page that is not in
      [0, num_pages) is unmapped, and its positions are skipped.
    cu_q_lens: offsets of the sequences on the token axis.
    num_active: sequences from this one on have no queries.
    scale: factor of the scores.
    sliding_window: positions a query sees, its own among them, or None.
    num_sink_tokens: first positions that are seen besides the window.
    logits_soft_cap: scores become cap * tanh(score / cap), or None.
    sinks: a logit per query head that only the denominator counts, or None.
    alibi_slopes: per query head, what multiplies the position of a key minus
      that of the query, to be added to the score; cut at 2**95; or None. Only
      if `causal`, and without a mask.
    k_scales: f32, what multiplies a token's key of 8-bit numbers, else None.
      The products are rounded to the dtype of q, and cut where they leave it.
    v_scales: the same of the values.
    causal: whether a query sees no position past its own; if not, it sees all
      tokens of its sequence.
    tree_mask: which of the query tokens of its sequence a token sees, instead;
      or None. With a window, see `tree_bits`.
    batch_invariant: whether what a sequence gets must not depend, bit for bit,
      on the others; with the default config.
    config: tile sizes; `default_config` if None.
    interpret: parameters of the interpreter that stands in for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32; 0 and -inf for tokens that see nothing or are of no
    sequence.

  Raises:
    NotImplementedError: if the kernel does not take these shapes.
    ValueError: if pages differ, scales are missing, of another shape or not
      wanted, the config exceeds shared memory or has fewer rows than a KV head
      has queries, or there is a window that is not causal, or slopes are not
      wanted.
  """
  check_pages(k_pages, v_pages, k_scales, v_scales)
  if not causal and sliding_window is not None:
    raise ValueError(f"{sliding_window=} must be None with {causal=}.")
  if alibi_slopes is not None and (tree_mask is not None or not causal):
    raise ValueError("alibi_slopes must be None unless causal and not a tree.")
  num_tokens, num_q_heads, head_dim = q.shape
  num_pages, num_kv_heads, page_size, _ = k_pages.shape
  shapes = head_dim, page_size, num_q_heads, num_kv_heads, q.dtype
  if reason := ragged_config.unsupported(*shapes, kv_dtype=k_pages.dtype):
    raise NotImplementedError(reason)
  num_seqs, pages_per_seq = page_indices.shape
  if 0 in (num_tokens, num_seqs, num_pages, pages_per_seq):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  group = ragged_config.padded_group(num_q_heads, num_kv_heads, head_dim)
  if config is None:
    config = default_config(
      num_tokens,
      num_kv_heads,
      group,
      head_dim,
      is_quantised=is_quantised(k_pages.dtype),
    )
    if batch_invariant:
      config = dataclasses.replace(config, splits=False)
  problem = Problem(
    config=config,
    dtype=q.dtype,
    kv_dtype=k_pages.dtype,
    num_tokens=num_tokens,
    num_seqs=num_seqs,
    num_kv_heads=num_kv_heads,
    group=group,
    head_dim=head_dim,
    num_pages=num_pages,
    page_size=page_size,
    pages_per_seq=pages_per_seq,
    scale=scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    has_sinks=sinks is not None,
    has_alibi=alibi_slopes is not None,
    causal=causal,
    has_tree=tree_mask is not None,
    interpret=interpret,
  )
  ints = [
    x.astype(jnp.int32) for x in (cu_q_lens, kv_lens, num_active, page_indices)
  ]
  tree = None
  if tree_mask is not None:
    rows = dict(group=group, more_rows=config.block_q)
    tree = tree_bits.pack(tree_mask, ints[0], ints[2], sliding_window, **rows)
  pages = k_pages, v_pages
  if k_scales is not None:
    pages += k_scales, v_scales
  if sinks is not None:
    sinks = _by_row(problem, sinks)
  if alibi_slopes is not None:
    steepest = decode_softmax.STEEPEST
    alibi_slopes = _by_row(problem, alibi_slopes)
    alibi_slopes = jnp.clip(alibi_slopes, -steepest, steepest)
  return _launch(problem, q, pages, (sinks, alibi_slopes), tree, *ints)


def _by_row(problem, logits):
  """Returns logits of query heads in base 2, for the rows of each KV head.

  They are f32[num_kv_heads, block_q], 0 for the padding.
  """
  logits = logits.astype(jnp.float32) * decode_softmax.LOG2_E
  rows = _pad_group(problem, logits.reshape(problem.num_kv_heads, -1), 1)
  return jnp.tile(rows, (1, problem.sizes.tile_tokens))


def _launch(
  problem: Problem, q, pages, per_head, tree, cu_q_lens, kv_lens, active, ids
):
  """Lists the items, runs the kernel, and merges what it split."""
  sizes, config = problem.sizes, problem.config
  group = q.shape[1] // problem.num_kv_heads
  of_tree = None if tree is None else tree.num_earlier
  num_earlier = cu_q_lens[1:] - cu_q_lens[:-1] - 1
  if of_tree is not None:
    num_earlier = of_tree
  holes = _has_holes(problem, num_earlier, kv_lens, ids)
  cost = lambda *lens: problem.visit(*lens).num_visited
  plan, places = query_tiles.plan(
    sizes, kv_lens, cu_q_lens, active, cost, of_tree
  )
  dealt: tuple[Array, ...] = (plan.num_items,)
  if config.splits:
    # What visits nothing has a share too, to write its output of 0.
    costs = jnp.maximum(plan.costs, 1)
    dealt = schedule.deal(costs, problem.num_kv_heads, config.num_programs)
  heads = q.reshape(problem.num_tokens, -1, group, problem.head_dim)
  # Tiles of 8-bit numbers are widened by all warps together.
  num_loaders = (
    1 if problem.is_quantised else warps.num_threads(problem.interpret)
  )
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=output.shapes(problem),
    scratch_types=scratch(problem),
    grid=(config.num_programs,),
    grid_names=("program",),
    num_threads=config.num_compute_wgs + num_loaders,
    thread_name="warpgroup",
    compiler_params=COMPILER_PARAMS,
    interpret=problem.interpret,
    kernel_name="ragged_attention",
  )
  out, lse, *parts = kernel(
    *dealt,
    plan.tiles,
    holes,
    ids,
    _pad_group(problem, heads, 2),
    *pages,
    *(x for x in per_head if x is not None),
    *(() if tree is None else (tree.of_seqs, tree.of_rows)),
  )
  if config.splits:
    out, lse = output.merge(
      problem, dealt[-1], plan.tiles, parts, per_head[0], out, lse
    )
  head = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  row = places.nth[:, None] * problem.group + lax.rem(head, group)
  lse = lse[places.tile[:, None], lax.div(head, group), row]
  return out[:, :, :group].reshape(q.shape), lse


def _pad_group(problem, x, axis):
  """Pads the axis of the query heads of a KV head, if it is not yet."""
  missing = problem.group - x.shape[axis]
  padding = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, padding) if missing else x


def _has_holes(problem, num_earlier, kv_lens, ids):
  """Tells, 0 or 1, of which sequences a query may see an unmapped page."""
  first = jnp.arange(problem.pages_per_seq, dtype=jnp.int32)
  first = first[None] * problem.page_size
  seen = first < kv_lens[:, None]
  if problem.sliding_window is not None:
    start = kv_lens - num_earlier - problem.sliding_window
    in_window = first + problem.page_size > start[:, None]
    seen &= in_window | (first < problem.num_sink_tokens)
  is_hole = seen & ((ids < 0) | (ids >= problem.num_pages))
  return jnp.any(is_hole, axis=1).astype(jnp.int32)


def _body(problem, *refs, **smem):
  """Runs a program: its warpgroups over its items."""
  names = ("starts", "firsts") if problem.config.splits else ("num_items",)
  names += "tiles", "holes", "table", "q", "k", "v"
  names += ("k_scales", "v_scales") * problem.is_quantised
  names += ("sinks",) * problem.has_sinks
  names += ("alibi_slopes",) * problem.has_alibi
  names += ("tree_of_seqs", "tree") * problem.has_tree + ("out", "lse")
  names += ("acc", "m", "l") * problem.config.splits
  gmem = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  smem = types.SimpleNamespace(**smem)
  num_wgs = problem.config.num_compute_wgs
  num_registers = ragged_config.registers(
    problem.config, problem.head_dim, problem.is_quantised
  )
  wg = lax.axis_index("warpgroup")
  walk = functools.partial(_for_each_item, problem, gmem, smem)

  @pl.when(wg < num_wgs)
  def _compute():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[0], action="increase")
    compute.run(problem, smem, walk)

  @pl.when(wg >= num_wgs)
  def _memory():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[1], action="decrease")
    loader = load_quantised if problem.is_quantised else load
    loader.run(problem, smem, walk)


def _for_each_item(problem, gmem, smem, step):
  """Attends a program's items, or parts of them, and counts them.

  Args:
    problem: what is static.
    gmem: arrays in memory of the GPU.
    smem: shared memory and barriers.
    step: called with each `Work`.
  """
  num_kv_heads = problem.num_kv_heads

  def visited(tile):
    return problem.visit(tile.kv_len, tile.num_earlier, tile.num_new)

  def take(nth, tile, head, before):
    tiles = visited(tile)
    item = Item(nth, head, tile, 0, tiles.num_visited, None, None)
    step(Work(problem, gmem, smem, item, tiles, before))
    return before.add(item)

  def take_piece(piece, before):
    tile = query_tiles.load(gmem.tiles, piece.seq)
    tile = query_tiles.add_holes(tile, gmem.holes)
    tiles = visited(tile)
    item = Item(
      nth=piece.seq,
      head=piece.head,
      tile=tile,
      first=piece.first,
      num_tiles=jnp.where(tiles.num_visited > 0, piece.num_tiles, 0),
      is_whole=piece.is_whole,
      kind=jnp.where(piece.nth == 0, partials.FIRST, partials.LAST),
    )
    step(Work(problem, gmem, smem, item, tiles, before))
    return before.add(item)

  nothing = Count(jnp.int32(0), jnp.int32(0))
  if problem.config.splits:
    plan = schedule.Plan(gmem.starts, gmem.firsts)
    return schedule.for_each_piece(plan, num_kv_heads, nothing, take_piece)
  return query_tiles.for_each_item(
    gmem.num_items,
    gmem.tiles,
    gmem.holes,
    num_kv_heads,
    problem.config.num_programs,
    nothing,
    take,
  )
