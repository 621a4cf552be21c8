"""The parts of the benchmark of decode attention; each returns its figures."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paged_jax
from benchmarks.decode.sizes import Sizes, chats, log_uniform, same
from benchmarks.harness import device_loop
from benchmarks.harness.attention import (
  decode,
  gb_per_s,
  loop_inputs,
  loop_start,
  loop_step,
  no_attention,
  reference,
  relative_error,
  timed,
)
from benchmarks.harness.batches import (
  DTYPE,
  Batch,
  in_8_bits,
  make,
  random_queries,
  uniform,
)
from benchmarks.harness.cases import attempt
from benchmarks.harness.timing import call_us, spread_p99

RIVAL = "pallas.ops.gpu.paged_attention"  # a module of JAX
MAX_RIVAL_ERROR = 5e-2  # the rival merges in bfloat16


def ceiling(sizes: Sizes) -> dict:
  """Times reading one large array, in several ways."""

  def read(dtype, shape: tuple[int, ...]) -> dict:
    x = jax.jit(
      lambda: (
        uniform(lax.iota(jnp.uint32, sizes.ceiling_elements))
        .astype(dtype)
        .reshape(shape)
      )
    )()
    expected = jnp.max(x, axis=-1)

    # Depends on the previous step, so that XLA cannot hoist it out of the loop.
    def step(_, most, x):
      return jnp.max(jnp.maximum(x, most[..., None]), axis=-1)

    def verify(most):
      if not bool(jnp.array_equal(most, expected)):
        raise RuntimeError("the maximum is wrong")

    figures = device_loop.measure(
      step,
      jnp.full_like(expected, -2),
      sizes.ceiling_steps,
      sizes.num_loops,
      verify,
      inputs=(x,),
    )
    return figures | {"gb_per_s": x.nbytes / figures["us"]["min"] / 1e3}

  rows = sizes.ceiling_elements // 8192, 8192
  return {
    "float32": attempt(read, jnp.float32, (sizes.ceiling_elements,)),
    "float32, rows": attempt(read, jnp.float32, rows),
    "bfloat16, rows": attempt(read, DTYPE, rows),
  }


def loop_alone(sizes: Sizes) -> dict:
  """Times a loop that reads a page table instead of calling attention."""
  lens = same(sizes.same)
  batch = make(sizes, lens)
  figures, _ = timed(sizes, batch, no_attention, lens.sum(), check=None)
  del figures["gb_per_s"]  # it reads no keys
  return figures


def waste_percent(lens: np.ndarray, page_size: int) -> float:
  """Returns the percentage of slots without a token in the sequences' pages."""
  slots = (-(-lens // page_size) * page_size).sum()
  return 100 * (1 - float(lens.sum() / slots))


def page_sizes(sizes: Sizes) -> dict:
  """Times the same tokens in pages of all sizes."""

  def one(lens: np.ndarray, page_size: int, expected: jax.Array) -> dict:
    batch = make(sizes, lens, page_size=page_size)
    check = functools.partial(relative_error, expected)
    return timed(sizes, batch, decode(sizes), lens.sum(), check)[0]

  def all_sizes(lens: np.ndarray) -> dict:
    expected = reference(decode(sizes, "xla"), make(sizes, lens))
    by_size = {}
    for size in sizes.page_sizes:
      figures = attempt(one, lens, size, expected)
      waste = {"waste_percent": waste_percent(lens, size)}
      by_size[str(size)] = figures | waste
    return by_size

  return {
    "same": attempt(all_sizes, same(sizes.same)),
    "ragged": attempt(all_sizes, log_uniform(sizes.ragged)),
    "chats": attempt(all_sizes, chats(sizes.chats)),
  }


def window(sizes: Sizes) -> dict:
  """Times a window of a long context, and a context of the window's length."""
  num_seqs, num_tokens, width = sizes.window
  options = dict(sliding_window=width, num_sink_tokens=sizes.num_sink_tokens)
  short, long = same((num_seqs, width)), same((num_seqs, num_tokens))
  plain = attempt(_verified, sizes, make(sizes, short), short.sum())
  batch = make(sizes, long)
  seen = num_seqs * min(num_tokens, width + sizes.num_sink_tokens)
  windowed = attempt(_verified, sizes, batch, seen, **options)
  if "us" in plain and "us" in windowed:
    ratio = windowed["us"]["median"] / plain["us"]["median"]
    windowed["more_than_plain_percent"] = 100 * (ratio - 1)
  return {
    f"{width} tokens": plain,
    f"window of {num_tokens} tokens": windowed,
    f"{num_tokens} tokens": attempt(_verified, sizes, batch, long.sum()),
  }


def queries(sizes: Sizes) -> dict:
  """Times several query tokens per sequence."""

  def attend(implementation: str, query_len: int) -> Callable:
    def call(q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens):
      pools = k_pages, v_pages, kv_lens, page_indices
      return paged_jax.ragged_paged_attention(
        q,
        *pools,
        cu_q_lens,
        kv_lens.shape[0],
        max_q_len=query_len,
        implementation=implementation,
      )

    return call

  def one(query_len: int) -> dict:
    ends = jnp.arange(len(lens) + 1, dtype=jnp.int32) * query_len
    q = random_queries(sizes, len(lens) * query_len)
    several = dataclasses.replace(batch, q=q, more=(ends,))
    expected = reference(attend("xla", query_len), several)
    return timed(
      sizes,
      several,
      attend(sizes.implementation, query_len),
      lens.sum(),
      functools.partial(relative_error, expected),
    )[0]

  lens = same(sizes.queries)
  batch = make(sizes, lens)
  return {str(count): attempt(one, count) for count in sizes.query_lens}


def quantised(sizes: Sizes) -> dict:
  """Times quantised pages, and pages of bfloat16."""

  def attend(implementation: str) -> Callable:
    def call(q, k_pages, v_pages, kv_lens, page_indices, *scales):
      pools = k_pages, v_pages, kv_lens, page_indices
      names = ("k_scales", "v_scales")[: len(scales)]
      return paged_jax.paged_attention(
        q,
        *pools,
        implementation=implementation,
        **dict(zip(names, scales, strict=True)),
      )

    return call

  def one(dtype: str) -> dict:
    batch = make(sizes, lens)
    if dtype != wide_name:
      batch = in_8_bits(batch, dtype)
    expected = reference(attend("xla"), batch)
    figures, _ = timed(
      sizes,
      batch,
      attend(sizes.implementation),
      lens.sum(),
      functools.partial(relative_error, expected),
    )
    del figures["gb_per_s"]  # counts the bytes of bfloat16
    return figures

  lens = same(sizes.same)
  wide_name = jnp.dtype(DTYPE).name
  names = wide_name, "int8", "float8_e4m3fn"
  by_dtype = {name: attempt(one, name) for name in names}
  wide = by_dtype[wide_name]
  for figures in by_dtype.values():
    if "us" in figures and "us" in wide:
      figures["speedup"] = wide["us"]["median"] / figures["us"]["median"]
  return by_dtype


def rows_apart(sizes: Sizes) -> dict:
  """Times growing sequences of many lengths, in one program."""
  lens, steps = log_uniform(sizes.growing), sizes.growing_steps
  batch = make(sizes, lens, num_new=steps - 1)
  step, traces = loop_step(decode(sizes), batch, steps, grows=True), []

  @jax.jit
  def run(state, inputs):
    traces.append(state)
    return lax.fori_loop(0, steps, lambda i, s: step(i, s, *inputs), state)

  start, inputs = loop_start(batch), loop_inputs(batch)
  grown = dataclasses.replace(batch, kv_lens=batch.kv_lens + (steps - 1))
  error = relative_error(
    reference(decode(sizes, "xla"), grown), run(start, inputs)[1]
  )
  with jax.transfer_guard("disallow"):
    us = call_us(lambda: run(start, inputs), sizes.num_loops, steps)
  if len(traces) != 1:
    raise RuntimeError(f"the loop was compiled {len(traces)} times")
  num_tokens = lens.sum() + len(lens) * (steps - 1) / 2  # mean of all steps
  figures = dict(us=spread_p99(us), steps=steps, calls=len(us))
  return figures | dict(
    gb_per_s=gb_per_s(sizes, num_tokens, figures),
    relative_error=error,
    traces=len(traces),
  )


def batches(sizes: Sizes) -> dict:
  """Times batches of many shapes, and the rivals on the same batches."""

  def one(num_seqs: int, num_tokens: int) -> dict:
    lens = same((num_seqs, num_tokens))
    batch, count = make(sizes, lens), lens.sum()
    xla = decode(sizes, "xla")
    plain, expected = timed(sizes, batch, xla, count, check=None, slow=True)
    check = functools.partial(relative_error, expected)
    ours = attempt(lambda: timed(sizes, batch, decode(sizes), count, check)[0])
    rival = attempt(_rival, sizes, batch, count, expected)
    return {"paged_attention": ours, "xla": plain, RIVAL: rival}

  return {
    f"{n} x {length}": attempt(one, n, length) for n, length in sizes.batches
  }


def _rival(sizes: Sizes, batch: Batch, num_tokens: int, expected) -> dict:
  """Times the unchanged Triton kernel in JAX, on pools in its layout."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import paged_attention as module

    def attend(q, k_pages, v_pages, kv_lens, page_indices):
      scale = jnp.asarray(sizes.head_dim**-0.5, q.dtype)
      return module.paged_attention(
        q * scale, k_pages, v_pages, page_indices, kv_lens
      )

    heads_first = dataclasses.replace(
      batch,
      k_pages=jnp.swapaxes(batch.k_pages, 0, 1),
      v_pages=jnp.swapaxes(batch.v_pages, 0, 1),
    )
    check = functools.partial(relative_error, expected, at_most=MAX_RIVAL_ERROR)
    return timed(sizes, heads_first, attend, num_tokens, check)[0]


def _verified(sizes: Sizes, batch: Batch, num_tokens: int, **options) -> dict:
  expected = reference(decode(sizes, "xla", **options), batch)
  check = functools.partial(relative_error, expected)
  attend = decode(sizes, **options)
  return timed(sizes, batch, attend, num_tokens, check)[0]
