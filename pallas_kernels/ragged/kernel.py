"""Paged attention of many query tokens a sequence, for Hopper.

Prefill, chunks on top of a context, decode, and mixtures: queries of all
sequences lie one after the other on a token axis, and are the last tokens of
their sequences. Persistent programs attend items (`query_tiles`): a tile of
query tokens of one sequence, for one KV head. The rows of a tile are the query
heads of the KV head, token by token, so that K and V are read once for all of
them. A program has a producer warpgroup and several consumers:

  producer  reads page ids from the page table as scalars, and copies Q, into a
            ring of `num_q_stages`, and K and V chunk by chunk (TMA), into rings
            of `num_stages` tiles (`load`); 8-bit numbers take a detour
            (`load_quantised`)
  consumer  64 rows each: S = Q K^T, mask, online softmax in base 2, O += P V
            (wgmma); P V of a tile runs during the softmax of the next

  products of a warpgroup   QK |      | QK, PV | QK, PV | QK, PV | PV
  its softmax                  | soft |   soft |   soft |   soft |

A tile of K is `block_kv` consecutive positions, copied in chunks that never
straddle a page: `chunk = gcd(page_size, block_kv)`. The visited tiles are those
of decode (`kv_tiles`); most of them are seen whole by every row, and need no
mask. With a tree mask, these are the tiles before the first query token
(`tree_bits`).

A key counts if its page is mapped and the query sees its position. Scores of
other keys are set to -inf by a select, and rows of V that no query of the item
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
  """Attends the last tokens of each sequence over pages.

  Args:
    q: Queries of all sequences, one sequence after the other, bfloat16 or
      float16.
    kv: Pages in the dtype of q, or int8 or float8_e4m3fn with scales. Products
      of numbers and scales are rounded to the dtype of q, and clamped to its
      range.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this one on have no queries.
    arrays: Options that are arrays. Slopes need `causal`, and no tree mask.
      With a tree mask and a window, see `tree_bits`.
    spec: Static options. Without `causal`, a query sees all tokens of its
      sequence, and there is no window.
    config: Tile sizes; `default_config` if None.
    interpret: Parameters of the interpreter that stands in for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32; 0 and -inf for tokens that see nothing or are of no
    sequence.

  Raises:
    NotImplementedError: If the kernel does not take these shapes.
    ValueError: If pages differ, scales are missing, have another shape or do
      not belong to the dtype, the config exceeds shared memory or has fewer
      rows than a KV head has queries, or slopes are given without `causal` or
      with a tree mask.
  """
  check_pages(kv)
  if arrays.alibi_slopes is not None and (
    arrays.tree_mask is not None or not spec.causal
  ):
    raise ValueError("alibi_slopes must be None unless causal and not a tree.")
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

  # Back to query heads: without the padding of groups, and LSE by token.
  group = num_q_heads // num_kv_heads
  head = jnp.arange(num_q_heads, dtype=jnp.int32)[None]
  row = places.nth[:, None] * problem.group + lax.rem(head, group)
  lse = lse[places.tile[:, None], lax.div(head, group), row]
  return out[:, :, :group].reshape(q.shape), lse


def _problem(q, kv, spec, config, interpret) -> RaggedProblem:
  """Returns the static facts of a launch, with a config if there is none."""
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
  """Returns what the kernel reads, and where tokens are in the tile list."""
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
  plan = None
  if config.splits:
    # A tile that visits nothing has a share too, to write its output of 0.
    costs = jnp.maximum(tiles.costs, 1)
    plan = schedule.split_evenly(
      costs, problem.num_kv_heads, config.num_programs
    )
  group = q.shape[1] // problem.num_kv_heads
  heads = q.reshape(problem.num_tokens, -1, group, problem.head_dim)
  k, v = kv.flat()
  inputs = Inputs(
    num_items=None if config.splits else tiles.num_items,
    plan=plan,
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
  """Returns f32[num_kv_heads, block_q] of a value for each query head.

  It is 0 for the padding.
  """
  rows = _pad_group(problem, logits.reshape(problem.num_kv_heads, -1), 1)
  return jnp.tile(rows, (1, problem.sizes.tile_tokens))


def _pad_group(problem, x, axis):
  """Pads the axis of the query heads of a KV head, if it is not yet."""
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
  """Runs the kernel, and merges the items that it split."""
  config = problem.config
  # Tiles of 8-bit numbers are widened by all warps together.
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
  if inputs.plan is None:
    return written.out, written.lse
  return output.merge_partials(
    problem, inputs.plan.firsts, inputs.tiles, inputs.sinks, written
  )


def _body(
  problem: RaggedProblem, inputs: Inputs, outputs: Outputs, smem: Scratch
) -> None:
  """Runs a program: its warpgroups over its items."""
  num_wgs = problem.config.num_compute_wgs
  num_registers = ragged_config.registers(
    problem.config, problem.head_dim, problem.is_quantised
  )
  wg = lax.axis_index("warpgroup")
  walk = functools.partial(_for_each_item, problem, inputs, outputs, smem)

  @pl.when(wg < num_wgs)
  def _consumer():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[0], action="increase")
    compute.run(walk)

  @pl.when(wg >= num_wgs)
  def _producer():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[1], action="decrease")
    loader = load_quantised if problem.is_quantised else load
    loader.run(problem, smem, walk)


def _for_each_item(problem, inputs, outputs, smem, step) -> Count:
  """Attends a program's items, or splits of them, and counts them.

  Args:
    problem: The static facts.
    inputs: Arrays that are read.
    outputs: Arrays that are written.
    smem: Shared memory and barriers.
    step: Called with each `Work`.
  """
  num_kv_heads = problem.num_kv_heads
  layer = None if inputs.layer is None else inputs.layer[0]
  given = problem, inputs, outputs, smem, layer

  def visited(tile):
    return problem.visited_tiles(tile.kv_len, tile.num_earlier, tile.num_new)

  def take(nth, tile, head, before):
    tiles = visited(tile)
    item = Item(nth, head, tile, 0, tiles.num_visited, None, None)
    step(Work(*given, item, tiles, before))
    return before.add(item)

  def take_split(split, before):
    tile = query_tiles.load(inputs.tiles, split.seq)
    tile = query_tiles.add_holes(tile, inputs.holes)
    tiles = visited(tile)
    item = Item(
      nth=split.seq,
      head=split.head,
      tile=tile,
      first=split.first,
      num_tiles=jnp.where(tiles.num_visited > 0, split.num_tiles, 0),
      is_whole=split.is_whole,
      kind=jnp.where(split.nth == 0, FIRST, LAST),
    )
    step(Work(*given, item, tiles, before))
    return before.add(item)

  nothing = Count(jnp.int32(0), jnp.int32(0))
  if inputs.plan is not None:
    return schedule.for_each_split(
      inputs.plan, num_kv_heads, nothing, take_split
    )
  return query_tiles.for_each_item(
    inputs.num_items,
    inputs.tiles,
    inputs.holes,
    num_kv_heads,
    problem.config.num_programs,
    nothing,
    take,
  )
