"""Paged decode attention for Hopper: one query token a sequence, split-KV.

Program (split, kv_head, seq) attends the query heads of one KV head over its
share of the sequence's KV tiles. It has two warpgroups:

  memory   reads page ids from the page table as scalars, and copies K and V
           chunk by chunk (TMA) into a ring of `num_stages` tiles
  compute  S = Q K^T, mask, online softmax in base 2, O += P V   (wgmma)

The query heads of a KV head are rows of one 64-row wgmma tile; the rows past
the group are not loaded, and what is computed in them never leaves the SM. A
tile is `block_kv` consecutive positions, copied in chunks that never straddle
a page: `chunk = gcd(page_size, block_kv)`.

  positions   0        64       128      192      256      320      384
  tiles       | sink   |        | skipped|        | window |  tail  |
  chunks      |p7|p2|p9|p4|                       |p5|p0|p3|p8|p6|--|
                          pages of 16 tokens, anywhere in the pool

Tiles between the sink tokens and the window are not visited. What is visited
is dealt evenly to the splits. Each split stores a normalised f32 partial and
its base-2 log-sum-exp; XLA merges them (`split_kv.merge`).

A key counts if its page is mapped and its position lies below the length and
in the window. Scores of other keys are selected away, and in tiles that have
any their rows of V are zeroed in shared memory (0 * NaN is NaN): what a masked
key holds leaves no trace in the output, bit for bit.

P goes to the second wgmma through shared memory: with the left operand in
registers, ptxas before 13.3 may overwrite them while the tensor core reads.
"""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import online_softmax, split_kv
from pallas_kernels.online_softmax import ROWS

SMEM_LIMIT = 232_448  # bytes a program may have on Hopper
NUM_SMS = 132  # of an H100 or H200
_SWIZZLE = 128  # bytes: the width of a tile in shared memory
_COLUMNS = 64  # of V that are rewritten at once, to spare registers
_ALLOCATION = 1024  # bytes: shared memory is handed out in these
_OPTIONS = ("scale", "sliding_window", "num_sink_tokens", "logits_soft_cap")


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the kernel."""

  block_kv: int  # positions in a tile
  num_stages: int  # tiles in flight
  num_splits: int  # programs that share a sequence

  def __post_init__(self):
    if self.block_kv not in (64, 128):
      raise ValueError(f"{self.block_kv=} must be 64 or 128.")
    if self.num_stages < 2:
      raise ValueError(f"{self.num_stages=} must be at least 2.")
    if self.num_splits < 1:
      raise ValueError(f"{self.num_splits=} must be at least 1.")


def default_config(
  num_seqs: int,
  num_kv_heads: int,
  head_dim: int,
  page_size: int,
  pages_per_seq: int,
  *,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  num_sms: int = NUM_SMS,
) -> Config:
  """Returns a good Config for these shapes; it does not depend on lengths.

  Args:
    num_seqs: rows of the batch.
    num_kv_heads: KV heads.
    head_dim: width of a head.
    page_size: tokens of a page.
    pages_per_seq: width of the page table.
    sliding_window: positions that are visible, if limited.
    num_sink_tokens: first positions that are visible besides.
    num_sms: multiprocessors of the device.
  """
  block_kv = 128 if head_dim <= 64 else 64
  num_stages = 3 if head_dim <= 128 else 2
  max_tiles = split_kv.max_tiles(
    pages_per_seq * page_size, block_kv, sliding_window, num_sink_tokens
  )
  num_splits = split_kv.num_splits(num_seqs * num_kv_heads, max_tiles, num_sms)
  return Config(block_kv, num_stages, num_splits)


def smem_bytes(config: Config, head_dim: int, dtype: DTypeLike) -> int:
  """Returns the bytes of shared memory that one program takes."""
  itemsize = jnp.dtype(dtype).itemsize
  tile = config.num_stages * config.block_kv * head_dim * itemsize
  buffers = (
    ROWS * head_dim * 4,  # O in f32, and before it Q
    tile,  # K
    tile,  # V
    ROWS * config.block_kv * itemsize,  # P
    ROWS * 4,  # log-sum-exp
  )
  barriers = 8 * (1 + 4 * config.num_stages)
  return sum(pl.cdiv(b, _ALLOCATION) * _ALLOCATION for b in buffers) + barriers


def unsupported(
  head_dim: int,
  page_size: int,
  num_q_heads: int,
  num_kv_heads: int,
  dtype: DTypeLike,
) -> str | None:
  """Returns why the kernel does not take these shapes, or None if it does."""
  if jnp.dtype(dtype) not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
    return f"dtype={jnp.dtype(dtype).name} is not bfloat16 or float16."
  if head_dim not in (64, 128, 192, 256):
    return f"{head_dim=} is not 64, 128, 192 or 256."
  if head_dim == 256 and jax.__version_info__ >= (0, 12):
    # Its search for layouts does not end (0.12.0.1).
    return f"{head_dim=} does not compile with JAX {jax.__version__}."
  if page_size < 1 or page_size % 8:
    return f"{page_size=} is not a multiple of 8."
  if num_q_heads % num_kv_heads:
    return f"{num_q_heads=} is not a multiple of {num_kv_heads=}."
  if (group := num_q_heads // num_kv_heads) > ROWS:
    return f"{group=} query heads a KV head are more than {ROWS}."
  return None


@functools.partial(jax.jit, static_argnames=(*_OPTIONS, "config", "interpret"))
def paged_decode(
  q: Float[Array, "num_seqs num_q_heads head_dim"],
  k_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  kv_lens: Int[Array, " num_seqs"],
  page_indices: Int[Array, "num_seqs pages_per_seq"],
  *,
  scale: float,
  sliding_window: int | None,
  num_sink_tokens: int,
  logits_soft_cap: float | None,
  sinks: Float[Array, " num_q_heads"] | None,
  config: Config | None = None,
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[
  Float[Array, "num_seqs num_q_heads head_dim"],
  Float[Array, "num_seqs num_q_heads"],
]:
  """Attends one query token a sequence, at its last position, over pages.

  Args:
    q: queries, bfloat16 or float16.
    k_pages: the pool of keys, in the dtype of q.
    v_pages: the pool of values, in the dtype of q.
    kv_lens: tokens stored of each sequence, the query's own among them.
    page_indices: physical page of each logical page. A page that is not in
      [0, num_pages) is unmapped, and its positions are skipped.
    scale: factor of the scores.
    sliding_window: positions a query sees, its own among them, or None.
    num_sink_tokens: first positions that are seen besides the window.
    logits_soft_cap: scores become cap * tanh(score / cap), or None.
    sinks: a logit per query head that only the denominator counts, or None.
    config: tile sizes; `default_config` if None.
    interpret: parameters of the interpreter that stands in for a GPU.

  Returns:
    The output in the dtype of q, and the natural log-sum-exp of the scores,
    sinks included, in f32. A sequence that sees nothing gets 0 and -inf.

  Raises:
    NotImplementedError: if the kernel does not take these shapes.
    ValueError: if dtypes differ, or the config exceeds shared memory.
  """
  num_seqs, num_q_heads, head_dim = q.shape
  num_pages, num_kv_heads, page_size, _ = k_pages.shape
  pages_per_seq = page_indices.shape[1]
  if reason := unsupported(
    head_dim, page_size, num_q_heads, num_kv_heads, k_pages.dtype
  ):
    raise NotImplementedError(reason)
  if not q.dtype == k_pages.dtype == v_pages.dtype:
    raise ValueError(
      f"{q.dtype=}, {k_pages.dtype=} and {v_pages.dtype=} must be the same."
    )
  if 0 in (num_seqs, num_pages, pages_per_seq):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  config = config or default_config(
    *(num_seqs, num_kv_heads, head_dim, page_size, pages_per_seq),
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
  )
  problem = _Problem(
    config=config,
    dtype=q.dtype,
    group=num_q_heads // num_kv_heads,
    head_dim=head_dim,
    num_pages=num_pages,
    page_size=page_size,
    pages_per_seq=pages_per_seq,
    scale=scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    interpret=interpret,
  )
  partials, lses = _launch(problem, q, k_pages, v_pages, kv_lens, page_indices)
  out, lse = split_kv.merge(partials, lses, sinks)
  return out.astype(q.dtype), lse


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
  """What is static about a launch."""

  config: Config
  dtype: DTypeLike
  group: int  # query heads of a KV head
  head_dim: int
  num_pages: int
  page_size: int
  pages_per_seq: int
  scale: float
  sliding_window: int | None
  num_sink_tokens: int
  logits_soft_cap: float | None
  interpret: plgpu.InterpretGPUParams | None

  def __post_init__(self):
    needed = smem_bytes(self.config, self.head_dim, self.dtype)
    if needed > SMEM_LIMIT:
      raise ValueError(f"{self.config=} takes {needed} bytes > {SMEM_LIMIT=}.")

  @property
  def chunk(self) -> int:  # positions of a tile that one copy brings
    return math.gcd(self.page_size, self.config.block_kv)

  @property
  def num_chunks(self) -> int:
    return self.config.block_kv // self.chunk

  @property
  def padded_group(self) -> int:  # tiles in shared memory have 8 rows
    return pl.cdiv(self.group, 8) * 8


def _scratch(problem: _Problem) -> dict[str, Any]:
  """Returns the shared memory and the barriers of a program."""
  config, dtype, head_dim = problem.config, problem.dtype, problem.head_dim
  tile = 8, _SWIZZLE // jnp.dtype(dtype).itemsize
  transforms = plgpu.TilingTransform(tile), plgpu.SwizzleTransform(_SWIZZLE)
  swizzled = lambda *s: plgpu.SMEM(s, dtype, transforms=transforms)
  barriers = functools.partial(plgpu.Barrier, num_barriers=config.num_stages)
  o_smem = plgpu.SMEM((ROWS, head_dim), jnp.float32)
  return {
    # O takes the place of Q, which was read for the last time by then.
    "qo_smem": plgpu.RefUnion(swizzled(ROWS, head_dim), o_smem),
    "k_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "v_smem": swizzled(config.num_stages, config.block_kv, head_dim),
    "p_smem": swizzled(ROWS, config.block_kv),
    "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
    "q_loaded": plgpu.Barrier(),
    "k_loaded": barriers(num_arrivals=problem.num_chunks),
    "v_loaded": barriers(num_arrivals=problem.num_chunks),
    "k_consumed": barriers(),
    "v_consumed": barriers(),
  }


def _launch(problem: _Problem, q, k_pages, v_pages, kv_lens, page_indices):
  """Runs the kernel: partials and base-2 log-sum-exps of the splits."""
  group, padded_group = problem.group, problem.padded_group
  num_seqs, num_kv_heads = len(q), k_pages.shape[1]
  num_splits = problem.config.num_splits
  out_shape = num_seqs, num_splits, num_kv_heads
  partials_shape = *out_shape, group, problem.head_dim
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=(
      jax.ShapeDtypeStruct(partials_shape, jnp.float32),
      jax.ShapeDtypeStruct((*out_shape, padded_group), jnp.float32),
    ),
    scratch_types=_scratch(problem),
    grid=(num_splits, num_kv_heads, num_seqs),
    grid_names=("split", "kv_head", "seq"),
    num_threads=2,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,  # rows of a wgmma tile reduce within a warp
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=problem.interpret,
    kernel_name="paged_decode",
  )
  table, lens = page_indices.astype(jnp.int32), kv_lens.astype(jnp.int32)
  q = q.reshape(num_seqs, num_kv_heads, group, problem.head_dim)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, padded_group - group), (0, 0)))
  partials, lses = kernel(table, lens, q, k_pages, v_pages)
  lses = lses[..., :group].reshape(num_seqs, num_splits, -1)
  return partials.reshape(*lses.shape, -1), lses


def _body(problem, table_gmem, lens_gmem, q_gmem, k_gmem, v_gmem, *out, **refs):
  """Runs a program: two warpgroups over its share of a sequence's tiles."""
  partials_gmem, lses_gmem = out
  scratch = types.SimpleNamespace(**refs)
  split = lax.axis_index("split")
  head = lax.axis_index("kv_head")
  seq = lax.axis_index("seq")
  share = split_kv.share_of(
    split,
    lens_gmem[seq],
    num_splits=problem.config.num_splits,
    capacity=problem.pages_per_seq * problem.page_size,
    block_kv=problem.config.block_kv,
    sliding_window=problem.sliding_window,
    num_sink_tokens=problem.num_sink_tokens,
  )

  def page_at(position):  # past the table's end: any page, it will be masked
    column = lax.div(position, jnp.int32(problem.page_size))
    return table_gmem[seq, jnp.minimum(column, problem.pages_per_seq - 1)]

  @pl.when(lax.axis_index("warpgroup") == 0)
  def _compute():
    q_smem, o_smem = scratch.qo_smem
    rows = pl.ds(0, problem.padded_group)
    plgpu.copy_gmem_to_smem(
      q_gmem.at[seq, head], q_smem.at[rows], scratch.q_loaded
    )
    plgpu.barrier_wait(scratch.q_loaded)
    state = lax.fori_loop(
      0,
      share.num_tiles,
      functools.partial(_fold_tile, problem, share, page_at, scratch),
      online_softmax.init(problem.head_dim),
    )
    o_smem[...], scratch.lse_smem[...] = online_softmax.finish(state)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      o_smem.at[pl.ds(0, problem.group)], partials_gmem.at[seq, split, head]
    )
    plgpu.copy_smem_to_gmem(
      scratch.lse_smem.at[rows], lses_gmem.at[seq, split, head]
    )
    plgpu.wait_smem_to_gmem(0)

  @pl.when(lax.axis_index("warpgroup") == 1)
  def _memory():
    k = k_gmem, scratch.k_smem, scratch.k_loaded, scratch.k_consumed
    v = v_gmem, scratch.v_smem, scratch.v_loaded, scratch.v_consumed
    num_stages = problem.config.num_stages

    @pl.loop(0, share.num_tiles)
    def _(i):
      _load_tile(problem, share.base(i), i, head, page_at, (k, v))

    # No barrier may be left with a completion that nobody waited for.
    @pl.loop(jnp.maximum(share.num_tiles - num_stages, 0), share.num_tiles)
    def _(i):
      slot = lax.rem(i, jnp.int32(num_stages))
      plgpu.barrier_wait(scratch.k_consumed.at[slot])
      plgpu.barrier_wait(scratch.v_consumed.at[slot])


def _load_tile(problem, base, i, head, page_at, streams):
  """Copies the i-th tile of K and of V into their rings."""
  chunk, num_stages = problem.chunk, problem.config.num_stages
  slot = lax.rem(i, jnp.int32(num_stages))
  starts = [base + j * chunk for j in range(problem.num_chunks)]
  pages = [jnp.clip(page_at(s), 0, problem.num_pages - 1) for s in starts]
  for gmem, smem, loaded, consumed in streams:

    @pl.when(i >= num_stages)
    def _(consumed=consumed):
      plgpu.barrier_wait(consumed.at[slot])

    for j, (start, page) in enumerate(zip(starts, pages, strict=True)):
      source = gmem.at[page, head]
      if chunk < problem.page_size:
        row = lax.rem(start, jnp.int32(problem.page_size))
        source = gmem.at[page, head, pl.ds(row, chunk)]
      rows = pl.ds(j * chunk, chunk)
      plgpu.copy_gmem_to_smem(source, smem.at[slot, rows], loaded.at[slot])


def _fold_tile(problem, share, page_at, scratch, i, state):
  """Folds the i-th tile into the softmax."""
  slot = lax.rem(i, jnp.int32(problem.config.num_stages))
  base = share.base(i)
  mapped = _mapped_chunks(problem, base, page_at)
  q_smem, _ = scratch.qo_smem
  v_smem = scratch.v_smem.at[slot]

  def visible(shape, axis):
    """Tells which elements may be seen; positions run along the axis."""
    ids = plgpu.broadcasted_iota(
      jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
    )
    chunks = ids >> int(math.log2(problem.chunk))  # which is a power of two
    is_mapped = (lax.broadcast_in_dim(mapped, shape, []) >> chunks) & 1
    return share.sees(base + ids) & (is_mapped != 0)

  plgpu.barrier_wait(scratch.k_loaded.at[slot])
  s = online_softmax.matmul(q_smem, scratch.k_smem.at[slot].T)
  plgpu.barrier_arrive(scratch.k_consumed.at[slot])
  s = online_softmax.to_base_2(s, problem.scale, problem.logits_soft_cap)
  s = jnp.where(visible(s.shape, 1), s, -jnp.inf)
  (acc, m, l), p = online_softmax.fold(state, s)
  scratch.p_smem[...] = p.astype(problem.dtype)
  plgpu.barrier_wait(scratch.v_loaded.at[slot])
  all_mapped = mapped == (1 << problem.num_chunks) - 1

  @pl.when(jnp.logical_not(share.sees_all(base) & all_mapped))
  def _zero_masked_rows():
    for column in range(0, problem.head_dim, _COLUMNS):
      v = v_smem.at[:, pl.ds(column, _COLUMNS)]
      v[...] = jnp.where(visible(v.shape, 0), v[...], 0.0)

  plgpu.commit_smem()
  acc = online_softmax.accumulate(
    acc, scratch.p_smem, v_smem, interpreted=problem.interpret is not None
  )
  plgpu.barrier_arrive(scratch.v_consumed.at[slot])
  return online_softmax.State(acc, m, l)


def _mapped_chunks(problem, base, page_at):
  """Returns a bit per chunk of a tile: whether its page is mapped."""
  starts = (base + j * problem.chunk for j in range(problem.num_chunks))
  pages = [page_at(start) for start in starts]
  mapped = [(page >= 0) & (page < problem.num_pages) for page in pages]
  return sum(bit.astype(jnp.int32) << j for j, bit in enumerate(mapped))
