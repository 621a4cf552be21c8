"""Paged attention of many query tokens a sequence, for Hopper.

Prefill, chunks on top of a context, decode, and mixtures: queries of all
sequences lie one after the other on a token axis, and are the last tokens of
their sequences. Persistent programs attend items (`ragged_schedule`): a tile of
query tokens of one sequence, for one KV head. The rows of a tile are the query
heads of the KV head, token by token, so that K and V are read once for all of
them. A program has a warpgroup for memory and others that compute:

  memory   reads page ids from the page table as scalars, and copies Q, and K
           and V chunk by chunk (TMA) into a ring of `num_stages` tiles
  compute  64 rows each: S = Q K^T, mask, online softmax in base 2, O += P V
           (wgmma); two take turns, so that one multiplies while the other
           exponentiates

  turn        |    |    |    |    |    |    |
  compute 0   QK   soft PV,QK soft PV,QK soft
  compute 1        QK   soft PV,QK soft PV,QK

A tile of K is `block_kv` consecutive positions, copied in chunks that never
straddle a page: `chunk = gcd(page_size, block_kv)`. Which tiles are visited is
as in decode (`kv_tiles`); most of them are seen whole by every row, and need no
mask.

A key counts if its page is mapped and the query sees its position. Scores of
other keys are selected away, and rows of V that no query of the item sees are
zeroed in shared memory (0 * NaN is NaN).
"""

import dataclasses
import functools
import math
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import (
  online_softmax,
  partials,
  ragged_config,
  ragged_output,
  ragged_schedule,
  ragged_softmax,
  schedule,
)
from pallas_kernels.ragged_config import ROWS, Config, default_config
from pallas_kernels.ragged_problem import COMPILER_PARAMS, Problem, scratch

_COLUMNS = 64  # of V that are rewritten at once, to spare registers
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
  k_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
  v_pages: Float[Array, "num_pages num_kv_heads page_size head_dim"],
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
  causal: bool = True,
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
    k_pages: the pool of keys, in the dtype of q.
    v_pages: the pool of values, in the dtype of q.
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
    causal: whether a query sees no position past its own; if not, it sees all
      tokens of its sequence.
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
    ValueError: if dtypes differ, the config exceeds shared memory or has fewer
      rows than a KV head has queries, or there is a window that is not causal.
  """
  if not q.dtype == k_pages.dtype == v_pages.dtype:
    raise ValueError(
      f"{q.dtype=}, {k_pages.dtype=} and {v_pages.dtype=} must be the same."
    )
  if not causal and sliding_window is not None:
    raise ValueError(f"{sliding_window=} must be None with {causal=}.")
  num_tokens, num_q_heads, head_dim = q.shape
  num_pages, num_kv_heads, page_size, _ = k_pages.shape
  if reason := ragged_config.unsupported(
    head_dim, page_size, num_q_heads, num_kv_heads, k_pages.dtype
  ):
    raise NotImplementedError(reason)
  num_seqs, pages_per_seq = page_indices.shape
  if 0 in (num_tokens, num_seqs, num_pages, pages_per_seq):
    return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  group = ragged_config.padded_group(num_q_heads, num_kv_heads, head_dim)
  if config is None:
    config = default_config(num_tokens, num_kv_heads, group, head_dim)
    if batch_invariant:
      config = dataclasses.replace(config, splits=False)
  problem = Problem(
    config=config,
    dtype=q.dtype,
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
    causal=causal,
    interpret=interpret,
  )
  ints = [
    x.astype(jnp.int32) for x in (cu_q_lens, kv_lens, num_active, page_indices)
  ]
  return _launch(problem, q, k_pages, v_pages, sinks, *ints)


def _launch(
  problem: Problem, q, k_pages, v_pages, sinks, cu_q_lens, kv_lens, active, ids
):
  """Lists the items, runs the kernel, and merges what it split."""
  sizes, config = problem.sizes, problem.config
  group = q.shape[1] // problem.num_kv_heads
  holes = _has_holes(problem, cu_q_lens, kv_lens, ids)
  cost = lambda *lens: problem.visit(*lens).num_visited
  plan, places = ragged_schedule.plan(
    sizes, kv_lens, cu_q_lens, active, holes, cost
  )
  dealt: tuple[Array, ...] = (plan.num_items,)
  if config.splits:
    # What visits nothing has a share too, to write its output of 0.
    costs = jnp.maximum(plan.costs, 1)
    dealt = schedule.deal(costs, problem.num_kv_heads, config.num_programs)
  heads = q.reshape(problem.num_tokens, -1, group, problem.head_dim)
  more = ()
  if sinks is not None:
    sinks = sinks.astype(jnp.float32) * online_softmax.LOG2_E
    rows = _pad_group(problem, sinks.reshape(problem.num_kv_heads, group), 1)
    more = (jnp.tile(rows, (1, sizes.tile_tokens)),)
  kernel = plgpu.kernel(
    functools.partial(_body, problem),
    out_type=ragged_output.shapes(problem),
    scratch_types=scratch(problem),
    grid=(config.num_programs,),
    grid_names=("program",),
    num_threads=config.num_compute_wgs + 1,
    thread_name="warpgroup",
    compiler_params=COMPILER_PARAMS,
    interpret=problem.interpret,
    kernel_name="ragged_attention",
  )
  out, lse, *parts = kernel(
    *dealt,
    plan.tiles,
    ids,
    _pad_group(problem, heads, 2),
    k_pages,
    v_pages,
    *more,
  )
  if config.splits:
    out, lse = ragged_output.merge(
      problem, dealt[-1], plan.tiles, parts, more, out, lse
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


def _has_holes(problem, cu_q_lens, kv_lens, ids):
  """Tells, 0 or 1, of which sequences a query may see an unmapped page."""
  first = jnp.arange(problem.pages_per_seq, dtype=jnp.int32)
  first = first[None] * problem.page_size
  seen = first < kv_lens[:, None]
  if problem.sliding_window is not None:
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    start = kv_lens - q_lens + 1 - problem.sliding_window
    in_window = first + problem.page_size > start[:, None]
    seen &= in_window | (first < problem.num_sink_tokens)
  is_hole = seen & ((ids < 0) | (ids >= problem.num_pages))
  return jnp.any(is_hole, axis=1).astype(jnp.int32)


def _body(problem, *refs, **smem):
  """Runs a program: its warpgroups over its items."""
  names = ("starts", "firsts") if problem.config.splits else ("num_items",)
  names += "tiles", "table", "q", "k", "v"
  names += ("sinks",) * problem.has_sinks + ("out", "lse")
  names += ("acc", "m", "l") * problem.config.splits
  gmem = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  smem = types.SimpleNamespace(**smem)
  num_wgs = problem.config.num_compute_wgs
  num_registers = ragged_config.registers(problem.config, problem.head_dim)
  wg = lax.axis_index("warpgroup")

  @pl.when(wg < num_wgs)
  def _compute():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[0], action="increase")
      pl.when(wg > 0)(lambda: _take_turns(problem, smem))
    _for_each_item(
      problem,
      gmem,
      jnp.int32(0),
      functools.partial(_attend_item, problem, gmem, smem),
    )
    if num_wgs > 1:
      pl.when(wg == 0)(lambda: _take_turns(problem, smem))
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == num_wgs)
  def _memory():
    if num_wgs > 1:
      plgpu.set_max_registers(num_registers[1], action="decrease")
    num_tiles = _for_each_item(
      problem,
      gmem,
      jnp.int32(0),
      functools.partial(_load_item, problem, gmem, smem),
    )
    num_stages = problem.config.num_stages

    # No barrier may be left with a completion that nobody waited for.
    @pl.when(num_tiles > 0)
    def _():
      plgpu.barrier_wait(smem.q_consumed)

    @pl.loop(jnp.maximum(num_tiles - num_stages, 0), num_tiles)
    def _(i):
      slot = lax.rem(i, jnp.int32(num_stages))
      plgpu.barrier_wait(smem.k_consumed.at[slot])
      plgpu.barrier_wait(smem.v_consumed.at[slot])


def _take_turns(problem, smem, before=lambda: None):
  """Waits until the other warpgroup is done with its half of a step.

  Args:
    problem: what is static.
    smem: the barrier.
    before: what to do before waiting.
  """
  takes_turns = problem.config.num_compute_wgs > 1
  if takes_turns:
    plgpu.barrier_arrive(smem.turn)
  before()
  if takes_turns:
    plgpu.barrier_wait(smem.turn)


def _for_each_item(problem, gmem, carry, step):
  """Folds `step(item, tiles, carry)` over a program's items, or parts of them.

  An item has the fields of its tile of queries and its place `nth` in the list,
  its KV head, and which of `tiles`, those of K, to attend: `num_tiles` from
  `first`. A part has `is_whole`, and `kind`: where its partial goes.
  """
  num_kv_heads = problem.num_kv_heads

  def visited(tile):
    return problem.visit(tile.kv_len, tile.num_earlier)

  def take(nth, tile, head, carry):
    tiles = visited(tile)
    item = dict(nth=nth, head=head, first=0, num_tiles=tiles.num_visited)
    return step(types.SimpleNamespace(**item, **tile._asdict()), tiles, carry)

  def take_piece(piece, carry):
    tile = ragged_schedule.load(gmem.tiles, piece.seq)
    tiles = visited(tile)
    item = types.SimpleNamespace(
      nth=piece.seq,
      head=piece.head,
      first=piece.first,
      num_tiles=jnp.where(tiles.num_visited > 0, piece.num_tiles, 0),
      is_whole=piece.is_whole,
      kind=jnp.where(piece.nth == 0, partials.FIRST, partials.LAST),
      **tile._asdict(),
    )
    return step(item, tiles, carry)

  if problem.config.splits:
    plan = schedule.Plan(gmem.starts, gmem.firsts)
    return schedule.for_each_piece(plan, num_kv_heads, carry, take_piece)
  return ragged_schedule.for_each_item(
    gmem.num_items,
    gmem.tiles,
    num_kv_heads,
    problem.config.num_programs,
    carry,
    take,
  )


def _page_ids(problem, gmem, seq, base):
  """Returns the page of each chunk of the tile at a position.

  Past the table's end, it is any page: it will be masked.
  """
  starts = (base + j * problem.chunk for j in range(problem.num_chunks))
  columns = [lax.div(start, jnp.int32(problem.page_size)) for start in starts]
  last = problem.pages_per_seq - 1
  return [gmem.table[seq, jnp.minimum(column, last)] for column in columns]


def _load_item(problem, gmem, smem, item, tiles, num_before):
  """Copies Q, and the tiles of K and V into their rings."""

  @pl.when(item.num_tiles > 0)
  def _():
    pl.when(num_before > 0)(lambda: plgpu.barrier_wait(smem.q_consumed))
    by_token, _ = smem.q_smem
    for wg in range(by_token.shape[0]):
      first, heads = problem.rows_of(wg)
      tokens = pl.ds(item.token + first, problem.wg_tokens)
      for i in range(by_token.shape[1]):
        columns = pl.ds(i * problem.columns, problem.columns)
        source = gmem.q.at[tokens, item.head, heads, columns]
        plgpu.copy_gmem_to_smem(source, by_token.at[wg, i], smem.q_loaded)

  # The page ids of the next tile are on their way while this one waits.
  def load(i, ids):
    base, next_base = tiles.base(item.first + i), tiles.base(item.first + i + 1)
    next_ids = _page_ids(problem, gmem, item.seq, next_base)
    _load_tile(problem, gmem, smem, item.head, num_before + i, base, ids)
    return next_ids

  ids = _page_ids(problem, gmem, item.seq, tiles.base(item.first))
  lax.fori_loop(0, item.num_tiles, load, ids)
  return num_before + item.num_tiles


def _load_tile(problem, gmem, smem, head, nth, base, ids):
  """Copies the program's nth tile of K and of V into their rings."""
  chunk, num_stages = problem.chunk, problem.config.num_stages
  slot = lax.rem(nth, jnp.int32(num_stages))
  pages = [jnp.clip(page, 0, problem.num_pages - 1) for page in ids]
  for source, ring, loaded, consumed in (
    (gmem.k, smem.k_smem, smem.k_loaded, smem.k_consumed),
    (gmem.v, smem.v_smem, smem.v_loaded, smem.v_consumed),
  ):

    @pl.when(nth >= num_stages)
    def _(consumed=consumed):
      plgpu.barrier_wait(consumed.at[slot])

    for j, page in enumerate(pages):
      rows = source.at[page, head]
      if chunk < problem.page_size:
        row = lax.rem(base + j * chunk, jnp.int32(problem.page_size))
        rows = source.at[page, head, pl.ds(row, chunk)]
      place = ring.at[slot, pl.ds(j * chunk, chunk)]
      plgpu.copy_gmem_to_smem(rows, place, loaded.at[slot])


def _attend_item(problem, gmem, smem, item, tiles, num_before):
  """Attends the tiles of an item, and writes its output or its partial."""
  by_token, by_row = (x.at[lax.axis_index("warpgroup")] for x in smem.q_smem)

  @pl.when(item.num_tiles > 0)
  def _():
    plgpu.barrier_wait(smem.q_loaded)
    problem.reinterpret(by_token, by_row)

  def fold(i, state):
    slot = lax.rem(num_before + i, jnp.int32(problem.config.num_stages))
    plgpu.barrier_wait(smem.k_loaded.at[slot])
    k_smem = smem.k_smem.at[slot]
    columns = [
      (
        by_row.at[j],
        k_smem.at[:, pl.ds(j * problem.columns, problem.columns)].T,
      )
      for j in range(by_row.shape[0])
    ]
    s = ragged_softmax.matmul(columns, lambda: _take_turns(problem, smem))
    plgpu.barrier_arrive(smem.k_consumed.at[slot])

    # Not later: the other warpgroup may need the next Q to end its turn.
    @pl.when(i == item.num_tiles - 1)
    def _():
      plgpu.barrier_arrive(smem.q_consumed)

    base = tiles.base(item.first + i)
    return _fold_scores(problem, gmem, smem, item, tiles, slot, base, s, state)

  state = ragged_softmax.init(ROWS, problem.head_dim)
  state = lax.fori_loop(0, item.num_tiles, fold, state)
  ragged_output.write(problem, gmem, smem, item, state)
  return num_before + item.num_tiles


def _fold_scores(problem, gmem, smem, item, tiles, slot, base, qk, state):
  """Folds the tile at base into the softmax."""
  sees_all = tiles.sees_all(base) & (item.has_holes == 0)
  s = lax.cond(
    sees_all,
    lambda s: s,
    lambda s: _mask_scores(problem, gmem, item, tiles, base, s),
    problem.scores(qk),
  )
  (acc, m, l), p = ragged_softmax.fold(state, s, problem.factor)
  p, v_smem = p.astype(problem.dtype), smem.v_smem.at[slot]
  own_p_smem = None
  if problem.p_in_smem:
    own_p_smem = smem.p_smem.at[lax.axis_index("warpgroup")]
    own_p_smem[...] = p
    plgpu.commit_smem()
  # All of the softmax belongs to this half of the step.
  acc, m, l, p = lax.optimization_barrier((acc, m, l, p))

  def await_values():
    plgpu.barrier_wait(smem.v_loaded.at[slot])
    _clean_values(problem, gmem, smem, item, tiles, slot, base)

  _take_turns(problem, smem, await_values)
  if own_p_smem is None:
    acc = ragged_softmax.accumulate(acc, p, v_smem)
  else:
    interpreted = problem.interpret is not None
    acc = online_softmax.accumulate(
      acc, own_p_smem, v_smem, interpreted=interpreted
    )
  plgpu.barrier_arrive(smem.v_consumed.at[slot])
  return ragged_softmax.State(acc, m, l)


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _mask_scores(problem, gmem, item, tiles, base, s):
  """Returns the scores, -inf where the key of a column is not seen."""
  column = _iota(s.shape, 1)
  before = 0
  if problem.causal:
    first_row = lax.axis_index("warpgroup") * ROWS
    token = (_iota(s.shape, 0) + first_row) >> _log2(problem.group)
    before = item.num_earlier - token
  sees = tiles.sees(base + column, before)
  sees &= _are_mapped(problem, gmem, item, base, column)
  return jnp.where(sees, s, -jnp.inf)


def _are_mapped(problem, gmem, item, base, positions):
  """Tells of which positions of the tile at base the page is mapped."""
  ids = _page_ids(problem, gmem, item.seq, base)
  mapped = [(page >= 0) & (page < problem.num_pages) for page in ids]
  bits = sum(bit.astype(jnp.int32) << j for j, bit in enumerate(mapped))
  bits = lax.broadcast_in_dim(bits, positions.shape, [])
  return ((bits >> (positions >> _log2(problem.chunk))) & 1) != 0


def _log2(power: int) -> int:
  return int(math.log2(power))


def _clean_values(problem, gmem, smem, item, tiles, slot, base):
  """Zeroes the rows of V that no query of the item sees."""
  wg = lax.axis_index("warpgroup")
  last = jnp.minimum(base + problem.config.block_kv, tiles.kv_end) - 1
  is_clean = base + problem.config.block_kv <= tiles.kv_end
  if problem.sliding_window is not None:
    # What is seen of a tile without its ends is seen with them.
    is_clean &= tiles.are_seen(base) & tiles.are_seen(last)
  is_clean &= item.has_holes == 0

  @pl.when(jnp.logical_not(is_clean))
  def _():
    @pl.when(wg == 0)
    def _():
      v_smem = smem.v_smem.at[slot]
      for column in range(0, problem.head_dim, _COLUMNS):
        size = min(_COLUMNS, problem.head_dim - column)
        v = v_smem.at[:, pl.ds(column, size)]
        rows = _iota(v.shape, 0)
        sees = tiles.are_seen(base + rows)
        sees &= _are_mapped(problem, gmem, item, base, rows)
        v[...] = jnp.where(sees, v[...], 0.0)
      plgpu.commit_smem()

    if problem.config.num_compute_wgs > 1:
      pl.when(wg == 0)(lambda: plgpu.barrier_arrive(smem.v_cleaned))
      pl.when(wg > 0)(lambda: plgpu.barrier_wait(smem.v_cleaned))
