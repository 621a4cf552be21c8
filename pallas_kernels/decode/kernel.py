"""Paged decode attention for Hopper: few query tokens per sequence, split-KV.

A work item is the query heads of one KV head of one sequence. Persistent
programs (CTAs) attend equal ranges of the KV tiles of all items (`schedule`). A
program has two warpgroups:

  producer  reads page ids from the page table as scalars, copies Q, and copies
            K and V chunk by chunk (TMA) into rings of `num_stages` tiles
  consumer  S = K Q^T, mask, online softmax in base 2, O += V^T P   (wgmma)

Usually two programs run on a multiprocessor, so that one computes while the
other waits. The queries are the columns of a tile: the query heads of the KV
head, for each query token (`short_queries`), padded to a multiple of 8. Results
of the padding are not stored. A KV tile is `block_kv` consecutive positions. It
is copied in chunks that never straddle a page:
`chunk = gcd(page_size, block_kv)`.

  positions   0        64       128      192      256      320      384
  tiles       | sink   |        | skipped|        | window |  tail  |
  chunks      |p7|p2|p9|p4|                       |p5|p0|p3|p8|p6|--|
                          pages of 16 tokens, anywhere in the pool

Tiles between the sink tokens and the window are not visited (`kv_tiles`). The
splits of an item write partial softmax states, which a second, small kernel
merges (`partials`). Pages of 8-bit elements have scales (`tile`).

A key is visible if its page is mapped and its position lies below the length
and in the window. A select sets the scores of all other keys to -inf. Rows of V
that no query sees are zeroed in shared memory (0 * NaN is NaN). Such keys do
not change a bit of the output, whatever the memory holds.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.common import (
  base2,
  pdl,
  refs,
  schedule,
  tree_bits,
  warps,
)
from pallas_kernels.common.checks import check_pages
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.problem import sizes_of
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec
from pallas_kernels.decode import compute, fragments, load, partials
from pallas_kernels.decode.config import (
  REDUCTION_BYTES,
  Config,
  default_config,
  unsupported,
)
from pallas_kernels.decode.partials import Partials
from pallas_kernels.decode.problem import (
  DecodeProblem,
  Inputs,
  Outputs,
  Scratch,
  scratch,
)


@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
def paged_decode(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  kv: PagedKV,
  arrays: AttentionArrays,
  *,
  spec: AttentionSpec,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_seqs num_q_heads head_dim"],
  Float[Array, "num_seqs num_q_heads"],
]:
  """Attends one query token per sequence, its last, over paged K and V.

  Args:
    q: Queries, bfloat16 or float16.
    kv: Pages in the dtype of q, or int8 or float8_e4m3fn with scales.
    arrays: Array options; `tree_mask` is ignored.
    spec: Static options.
    config: Tile sizes; `default_config` if None.
    interpret: Parameters of the Pallas interpreter; None compiles for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32; 0 and -inf for a sequence without visible keys.

  Raises:
    NotImplementedError: If the kernel does not support the shapes or dtypes.
    ValueError: If K and V differ in shape or dtype, if scales are missing,
      superfluous or of a wrong shape or dtype, or if the config exceeds shared
      memory.
  """
  num_seqs, num_q_heads, head_dim = q.shape
  num_kv_heads = kv.num_kv_heads
  if reason := unsupported(
    head_dim,
    kv.page_size,
    num_q_heads,
    num_kv_heads,
    q.dtype,
    kv_dtype=kv.k.dtype,
  ):
    raise NotImplementedError(reason)
  out, lse = attend(
    q.reshape(num_seqs, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
    None,
    kv,
    arrays,
    spec=spec,
    config=config,
    interpret=interpret,
  )
  return out.reshape(q.shape), lse.reshape(q.shape[:2])


def attend(
  q: Float[Array, "num_seqs num_kv_heads queries head_dim"],
  q_lens: Int[Array, " num_seqs"] | None,
  kv: PagedKV,
  arrays: AttentionArrays,
  *,
  spec: AttentionSpec,
  config: Config | None,
  interpret: plgpu.InterpretGPUParams | None,
  max_q_len: int = 1,
  tree: tree_bits.Few | None = None,
) -> tuple[
  Float[Array, "num_seqs num_kv_heads queries head_dim"],
  Float[Array, "num_seqs num_kv_heads queries"],
]:
  """Attends queries that are grouped by work item; see `paged_decode`.

  Args:
    q: Queries of each item: the query heads of the KV head for the first query
      token, then for the second, up to `max_q_len` tokens.
    q_lens: Query tokens of each sequence, at most `max_q_len`; None if each
      sequence has one and there is no tree mask.
    kv: See `paged_decode`.
    arrays: See `paged_decode`.
    spec: See `paged_decode`.
    config: See `paged_decode`.
    interpret: See `paged_decode`.
    max_q_len: Query tokens per sequence, at most.
    tree: The query tokens that each query token sees. None: those up to itself,
      or all if not `spec.causal`.

  Returns:
    The output and the natural log-sum-exp; 0 and -inf past `q_lens`.

  Raises:
    ValueError: See `paged_decode`.
  """
  check_pages(kv)
  num_seqs, num_kv_heads, num_queries, head_dim = q.shape
  if 0 in (num_seqs, kv.num_pages, kv.pages_per_seq):
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
  if config is None:
    shape = num_seqs * num_kv_heads, num_queries, head_dim
    config = default_config(*shape, kv.k.dtype)
  problem = DecodeProblem(
    config=config,
    spec=spec,
    dtype=q.dtype,
    kv_dtype=kv.k.dtype,
    group=num_queries // max_q_len,
    max_q_len=max_q_len,
    has_tree=tree is not None,
    interpret=interpret,
    **sizes_of(kv),
  )
  inputs = _inputs(problem, q, q_lens, kv, arrays, tree)
  out, lse = _launch(problem, inputs)
  return out, lse[..., :num_queries]


def _inputs(
  problem: DecodeProblem,
  q: Array,
  q_lens: Array | None,
  kv: PagedKV,
  arrays: AttentionArrays,
  tree: tree_bits.Few | None,
) -> Inputs:
  """Returns the kernel's operands: the schedule, and arrays in its layout."""
  kv_lens = kv.kv_lens.astype(jnp.int32)
  sinks = slopes = None
  if q_lens is not None:
    q_lens = q_lens.astype(jnp.int32)
  if arrays.sinks is not None:
    sinks = _by_query(problem, base2.logits_to_base_2(arrays.sinks))
  if arrays.alibi_slopes is not None:
    slopes = _by_query(problem, base2.slopes_to_base_2(arrays.alibi_slopes))
  of_seqs = None
  if tree is not None:
    of_seqs = tree.of_seqs
    columns = jnp.repeat(tree.of_queries, problem.group, axis=1)
    tree = tree_bits.Few(problem.pad_queries(columns), of_seqs)
  # A sequence without tokens gets one tile as well, whose split writes 0.
  visited = problem.visit(kv_lens, q_lens, of_seqs).num_visited
  k, v = kv.flat()
  return Inputs(
    splits=schedule.split_evenly(
      jnp.maximum(visited, 1),
      problem.num_kv_heads,
      problem.config.num_programs,
      fixed_splits=problem.spec.batch_invariant,
    ),
    page_indices=kv.page_indices.astype(jnp.int32),
    kv_lens=kv_lens,
    layer=kv.layer_operand(),
    q=_rows_of_queries(problem, q),
    k=k,
    v=v,
    q_lens=q_lens,
    tree=tree,
    sinks=sinks,
    alibi_slopes=slopes,
  )


def _by_query(problem, logits):
  """Returns f32[num_kv_heads, num_queries] from one value per query head.

  The padding gets 0.
  """
  logits = logits.reshape(problem.num_kv_heads, problem.group)
  return problem.pad_queries(jnp.tile(logits, (1, problem.max_q_len)))


def _rows_of_queries(problem, q):
  """Returns queries as rows. An item reads `num_queries` of them.

  Unless XLA pads them here, an item has only `num_rows` rows. The rows that it
  reads after those belong to the next items, and their results are not stored.
  """
  if problem.loads_tiles_of_q:
    q = problem.as_operand(q)
    if problem.is_permuted:
      q = fragments.permute(q)
    q = q.reshape(-1, problem.num_rows, problem.head_dim)
    return problem.pad_queries(q).reshape(-1, problem.head_dim)
  rows = q.reshape(-1, problem.head_dim)
  missing = max(problem.num_queries - len(rows), 0)
  return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _launch(problem: DecodeProblem, inputs: Inputs) -> tuple[Array, Array]:
  """Runs the kernel, then merges the items that were split."""
  config, num_queries = problem.config, problem.num_queries
  fixed_splits = problem.spec.batch_invariant
  items = problem.num_seqs, problem.num_kv_heads
  partial_axes = 2, config.num_programs
  if fixed_splits:
    partial_axes = math.prod(items), problem.max_splits
  outputs = Outputs(
    out=refs.output(
      (*items, problem.num_rows, problem.head_dim), problem.dtype
    ),
    lse=refs.output((*items, num_queries), jnp.float32),
    partials=Partials.types(partial_axes, problem.head_dim, num_queries),
  )
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=(outputs,),
    scratch_types={"smem": scratch(problem)},
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
  (written,) = kernel(inputs)
  if fixed_splits and problem.max_splits == 1:
    return written.out, written.lse
  # Few items are cut into many splits each, many items into few.
  are_few = 8 * math.prod(items) < config.num_programs
  return partials.merge_partials(
    inputs.splits,
    written.partials,
    inputs.sinks,
    written.out,
    written.lse,
    fixed_splits=fixed_splits,
    unroll=16 if are_few and not fixed_splits else 4,
    interpret=problem.interpret,
  )


def _body(
  problem: DecodeProblem, inputs: Inputs, outputs: Outputs, smem: Scratch
) -> None:
  """The program: a producer and a consumer warpgroup loop over its splits."""
  # 1. Wait for the previous kernel, which may still write the operands.
  if problem.interpret is None:
    pdl.overlap_with_previous_kernel()

  # 2. Both warpgroups run this loop, each with its own body. They synchronise
  # through the barriers in `smem` alone.
  def for_each_split(carry, step):
    return schedule.for_each_split(
      inputs.splits,
      problem.num_kv_heads,
      carry,
      step,
      fixed_splits=problem.spec.batch_invariant,
    )

  # 3. Warpgroup 0 computes.
  @pl.when(lax.axis_index("warpgroup") == 0)
  def _consumer():
    compute.run(problem, inputs, outputs, smem, for_each_split)

  # 4. Warpgroup 1 copies. (Under the race detector, each warp is a thread.)
  @pl.when(lax.axis_index("warpgroup") > 0)
  def _producer():
    load.run(problem, inputs, smem, for_each_split)
