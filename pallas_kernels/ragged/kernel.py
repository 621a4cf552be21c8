"""Paged attention of many query tokens per sequence, for Hopper.

It serves prefill, chunked prefill, decode, and mixtures. The queries of all
sequences lie on one flat token axis; they are the last tokens of their
sequences. A work item is a tile of query tokens of one sequence, for one KV
head (`query_tiles`). The rows of a query tile are the query heads of the KV
head, token by token, so that K and V are read once for all of them. Persistent
programs (CTAs) attend the items. A program has one producer warpgroup and up to
three consumer warpgroups:

  producer  reads page ids from the page table as scalars, copies Q into a ring
            of `num_q_stages`, and copies K and V chunk by chunk (TMA) into
            rings of `num_stages` tiles (`load`); it dequantises 8-bit pages on
            the way (`load_quantised`)
  consumer  64 rows each: S = Q K^T, mask, online softmax in base 2, O += P V
            (wgmma); P V of a tile overlaps with the softmax of the next tile

  products of a warpgroup   QK |      | QK, PV | QK, PV | QK, PV | PV
  its softmax                  | soft |   soft |   soft |   soft |

A KV tile is `block_kv` consecutive positions. It is copied in chunks that never
straddle a page: `chunk = gcd(page_size, block_kv)`. The kernel visits the same
tiles as decode (`kv_tiles`). Most of them are visible to every row and need no
mask; with a tree mask, those are the tiles before the first query token.

A key is visible if its page is mapped and the query sees its position. A select
sets the scores of all other keys to -inf. Rows of V that no query of the item
sees are zeroed in shared memory (0 * NaN is NaN).
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.common import base2, schedule, tree_bits, warps
from pallas_kernels.common.checks import check_pages
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.problem import sizes_of
from pallas_kernels.common.schedule import FIRST, LAST
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec
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
  Inputs,
  Item,
  Outputs,
  RaggedProblem,
  Scratch,
  Work,
  scratch,
)
from pallas_kernels.ragged.query_tiles import Places


@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
def attend(
  q: Float[Array, "num_tokens num_q_heads head_dim"],
  kv: PagedKV,
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  arrays: AttentionArrays,
  *,
  spec: AttentionSpec,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_tokens num_q_heads head_dim"],
  Float[Array, "num_tokens num_q_heads"],
]:
  """Attends the last tokens of each sequence over paged K and V.

  Args:
    q: Queries on the flat token axis, one sequence after the other, bfloat16 or
      float16.
    kv: Pages in the dtype of q, or int8 or float8_e4m3fn with scales, which are
      dequantised to the dtype of q (rounded, and clamped to its range).
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this index on have no queries.
    arrays: Array options. `alibi_slopes` need `causal` and no tree mask. For a
      tree mask with a window, see `tree_bits`.
    spec: Static options. Without `causal`, a query sees all tokens of its
      sequence.
    config: Tile sizes; `default_config` if None.
    interpret: Parameters of the Pallas interpreter; None compiles for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32; 0 and -inf for tokens without visible keys and for
    tokens that belong to no sequence.

  Raises:
    NotImplementedError: If the kernel does not support the shapes or dtypes.
    ValueError: If K and V differ in shape or dtype; if scales are missing,
      superfluous or of a wrong shape or dtype; if the config exceeds shared
      memory, or its `block_q` is no multiple of the padded group of query heads
      per KV head; or if slopes are given without `causal` or with a tree mask.
  """
  check_pages(kv)
  if arrays.alibi_slopes is not None and (
    arrays.tree_mask is not None or not spec.causal
  ):
    raise ValueError(
      "alibi_slopes must be None with causal=False or a tree_mask."
    )
  num_tokens, num_q_heads, head_dim = q.shape
  num_kv_heads = kv.num_kv_heads
  shapes = head_dim, kv.page_size, num_q_heads, num_kv_heads, q.dtype
  if reason := ragged_config.unsupported(*shapes, kv_dtype=kv.k.dtype):
    raise NotImplementedError(reason)
  if 0 in (num_tokens, kv.num_seqs, kv.num_pages, kv.pages_per_seq):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  problem = _problem(q, kv, spec, config, interpret)
  cu_q_lens = cu_q_lens.astype(jnp.int32)
  num_active = num_active.astype(jnp.int32)
  inputs, places = _inputs(problem, q, kv, cu_q_lens, num_active, arrays)
  out, lse = _launch(problem, inputs)

  # Remove the padding of the groups, and gather the LSE by token.
  group = num_q_heads // num_kv_heads
  head = jnp.arange(num_q_heads, dtype=jnp.int32)[None]
  row = places.nth[:, None] * problem.group + lax.rem(head, group)
  lse = lse[places.tile[:, None], lax.div(head, group), row]
  return out[:, :, :group].reshape(q.shape), lse


def _problem(q, kv, spec, config, interpret) -> RaggedProblem:
  """Returns the static sizes of a launch, with a default config if None."""
  num_tokens, num_q_heads, head_dim = q.shape
  group = ragged_config.padded_group(num_q_heads, kv.num_kv_heads, head_dim)
  if config is None:
    config = default_config(
      num_tokens,
      kv.num_kv_heads,
      group,
      head_dim,
      is_quantised=kv.k_scales is not None,
    )
    if spec.batch_invariant:
      config = dataclasses.replace(config, splits=False)
  return RaggedProblem(
    config=config,
    spec=spec,
    dtype=q.dtype,
    kv_dtype=kv.k.dtype,
    num_tokens=num_tokens,
    group=group,
    interpret=interpret,
    **sizes_of(kv),
  )


def _inputs(
  problem: RaggedProblem,
  q: Array,
  kv: PagedKV,
  cu_q_lens: Array,
  num_active: Array,
  arrays: AttentionArrays,
) -> tuple[Inputs, Places]:
  """Returns the kernel's operands, and the place of each token in the tiles."""
  config, spec = problem.config, problem.spec
  kv_lens = kv.kv_lens.astype(jnp.int32)
  page_indices = kv.page_indices.astype(jnp.int32)
  tree = tree_num_earlier = sinks = slopes = None
  num_earlier = cu_q_lens[1:] - cu_q_lens[:-1] - 1
  if arrays.tree_mask is not None:
    tree = tree_bits.pack(
      arrays.tree_mask,
      cu_q_lens,
      num_active,
      spec.sliding_window,
      group=problem.group,
      more_rows=config.block_q,
    )
    num_earlier = tree_num_earlier = tree.num_earlier
  if arrays.sinks is not None:
    sinks = _by_row(problem, base2.logits_to_base_2(arrays.sinks))
  if arrays.alibi_slopes is not None:
    slopes = _by_row(problem, base2.slopes_to_base_2(arrays.alibi_slopes))
  cost = lambda *lens: problem.visited_tiles(*lens).num_visited
  tiles, places = query_tiles.list_tiles(
    problem.sizes, kv_lens, cu_q_lens, num_active, cost, tree_num_earlier
  )
  splits = None
  if config.splits:
    # A query tile that visits no KV tile is scheduled too: it writes 0.
    costs = jnp.maximum(tiles.costs, 1)
    splits = schedule.split_evenly(
      costs, problem.num_kv_heads, config.num_programs
    )
  group = q.shape[1] // problem.num_kv_heads
  heads = q.reshape(problem.num_tokens, -1, group, problem.head_dim)
  k, v = kv.flat()
  inputs = Inputs(
    num_items=None if config.splits else tiles.num_items,
    splits=splits,
    tiles=tiles.tiles,
    holes=_has_holes(problem, num_earlier, kv_lens, page_indices),
    page_indices=page_indices,
    layer=kv.layer_operand(),
    q=_pad_group(problem, heads, 2),
    k=k,
    v=v,
    sinks=sinks,
    alibi_slopes=slopes,
    tree=tree,
  )
  return inputs, places


def _by_row(problem, logits):
  """Returns f32[num_kv_heads, block_q] from one value per query head.

  The padding gets 0.
  """
  rows = _pad_group(problem, logits.reshape(problem.num_kv_heads, -1), 1)
  return jnp.tile(rows, (1, problem.sizes.tile_tokens))


def _pad_group(problem, x, axis):
  """Pads an axis of query heads per KV head to `problem.group`."""
  missing = problem.group - x.shape[axis]
  padding = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, padding) if missing else x


def _has_holes(problem, num_earlier, kv_lens, page_indices):
  """Returns i32[num_seqs]: 1 where a query may see an unmapped page."""
  spec = problem.spec
  first = jnp.arange(problem.pages_per_seq, dtype=jnp.int32)
  first = first[None] * problem.page_size
  seen = first < kv_lens[:, None]
  if spec.sliding_window is not None:
    start = kv_lens - num_earlier - spec.sliding_window
    in_window = first + problem.page_size > start[:, None]
    seen &= in_window | (first < spec.num_sink_tokens)
  is_mapped = (page_indices >= 0) & (page_indices < problem.num_pages)
  return jnp.any(seen & ~is_mapped, axis=1).astype(jnp.int32)


def _launch(problem: RaggedProblem, inputs: Inputs) -> tuple[Array, Array]:
  """Runs the kernel, then merges the items that were split."""
  config = problem.config
  # All warps of the producer dequantise 8-bit tiles together.
  num_loaders = (
    1 if problem.is_quantised else warps.num_threads(problem.interpret)
  )
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=(output.types(problem),),
    scratch_types={"smem": scratch(problem)},
    grid=(config.num_programs,),
    grid_names=("program",),
    num_threads=config.num_compute_wgs + num_loaders,
    thread_name="warpgroup",
    compiler_params=COMPILER_PARAMS,
    interpret=problem.interpret,
    kernel_name="ragged_attention",
  )
  (written,) = kernel(inputs)
  if inputs.splits is None:
    return written.out, written.lse
  return output.merge_partials(
    problem, inputs.splits.firsts, inputs.tiles, inputs.sinks, written
  )


def _body(
  problem: RaggedProblem, inputs: Inputs, outputs: Outputs, smem: Scratch
) -> None:
  """The program: its warpgroups loop over its items, or splits of items."""
  # 1. All warpgroups run this loop, each with its own body. They synchronise
  # through the barriers in `smem` alone.
  num_wgs = problem.config.num_compute_wgs
  num_registers = ragged_config.registers(
    problem.config, problem.head_dim, problem.is_quantised
  )
  wg = lax.axis_index("warpgroup")
  for_each_item = functools.partial(
    _for_each_item, problem, inputs, outputs, smem
  )

  # 2. Consumers take registers from the producer, which needs few.
  @pl.when(wg < num_wgs)
  def _consumer():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[0], action="increase")
    compute.run(for_each_item)

  # 3. The last warpgroup copies. (Under the race detector, each of its warps is
  # a thread, unless pages are quantised.)
  @pl.when(wg >= num_wgs)
  def _producer():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[1], action="decrease")
    loader = load_quantised if problem.is_quantised else load
    loader.run(problem, smem, for_each_item)


def _for_each_item(problem, inputs, outputs, smem, step) -> Count:
  """Calls `step(work)` for each item of the program, or split of an item.

  Args:
    problem: The static sizes.
    inputs: Arrays that are read.
    outputs: Arrays that are written.
    smem: Shared memory and barriers.
    step: Called with the `Work` of each.

  Returns:
    How many items and KV tiles there were.
  """
  num_kv_heads = problem.num_kv_heads
  layer = None if inputs.layer is None else inputs.layer[0]
  given = problem, inputs, outputs, smem, layer

  def visited(tile):
    return problem.visited_tiles(tile.kv_len, tile.num_earlier, tile.num_new)

  def visit(nth, tile, head, done):
    tiles = visited(tile)
    item = Item(nth, head, tile, 0, tiles.num_visited, None, None)
    step(Work(*given, item, tiles, done))
    return done.add(item)

  def visit_split(split, done):
    tile = query_tiles.load(inputs.tiles, split.row)
    tile = query_tiles.add_holes(tile, inputs.holes)
    tiles = visited(tile)
    item = Item(
      nth=split.row,
      head=split.head,
      tile=tile,
      first=split.first,
      num_tiles=jnp.where(tiles.num_visited > 0, split.num_tiles, 0),
      is_whole=split.is_whole,
      kind=jnp.where(split.nth == 0, FIRST, LAST),
    )
    step(Work(*given, item, tiles, done))
    return done.add(item)

  zero = Count(jnp.int32(0), jnp.int32(0))
  if inputs.splits is not None:
    return schedule.for_each_split(
      inputs.splits, num_kv_heads, zero, visit_split
    )
  return query_tiles.for_each_item(
    inputs.num_items,
    inputs.tiles,
    inputs.holes,
    num_kv_heads,
    problem.config.num_programs,
    zero,
    visit,
  )
