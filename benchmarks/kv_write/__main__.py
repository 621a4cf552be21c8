"""Measures writes of K and V to the pool on a GPU, in microseconds.

  write    `kv_pool.write` of 64, 512 and 8,192 tokens to pages of each dtype,
           with the kernel and with XLA's scatter, compared with a copy of as
           many bytes, and with FlashInfer's append if it is installed
  pieces   the kernel with different numbers of 16-byte pieces per thread

Each step of a loop writes to all layers of a pool in order, as a model does.
Pages lie at random places, and tokens begin anywhere in a page. Times are those
of a compiled loop, measured on the host, divided by the number of writes. The
contents of the pool are verified before a loop is timed, and no loop may copy
an array of the size of the pool.

  python -m benchmarks.kv_write

Results: benchmarks/results/h200/kv_write.json
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.harness import command, device_loop, results
from benchmarks.harness.cases import attempt, failures
from benchmarks.harness.table import line
from benchmarks.kv_write import rival
from benchmarks.kv_write.batch import FULL, SMALL, Batch, Sizes, make
from paged_jax.kv import dtypes, layout, quantised
from paged_jax.kv import pool as kv_pool
from pallas_kernels.pages import write as page_write

PACKAGES = [
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "numpy",
  "torch",
  "flashinfer-python",
]
COPY, RIVAL = "plain copy", "flashinfer.append_paged_kv_cache"
# Estimates, to choose the number of steps in a loop.
GUESS = 2e6  # bytes moved in a microsecond
WRITE_COST = 2  # least microseconds of a write
COLUMNS = {
  "us": "{[median]:9.2f}",
  "gb_per_s": "{:7.0f}",
  "percent_of_copy": "{:7.0f} %",
}


def main() -> None:
  """Times all cases, prints the figures and writes the record."""
  args, environment = command.start_on_gpu("kv_write", __doc__, PACKAGES)
  record = results.keep(
    "kv_write", records(SMALL if args.small else FULL), args, environment
  )
  command.finish(failures(record, RIVAL))


def records(sizes: Sizes) -> Iterator[dict]:
  """Yields the record with all figures so far, after each case; prints them."""
  record: dict = {"settings": settings(sizes), "write": {}, "pieces": {}}
  print(f"{'':52}{'us':>9}{'GB/s':>7}{'of copy':>9}")
  for num_seqs, num_new in sizes.batches:
    batch = make(sizes, num_seqs, num_new)
    name = f"{len(batch.slots)} tokens"
    record["write"][name], record["pieces"][name] = {}, {}
    for part, way, measure in ways(sizes):
      figures = attempt(measure, sizes, batch)
      record[part][name][way] = figures
      compare(figures, record["write"][name][COPY])
      title = f"{part}, {name}, {way}"
      print(line(title, figures, COLUMNS, width=52), flush=True)
      yield record


def ways(sizes: Sizes) -> Iterator[tuple[str, str, Callable]]:
  """Yields the cases of a batch: part, name, and function that measures it."""
  yield "write", COPY, plain_copy
  for dtype in sizes.dtypes:
    for way in (sizes.implementation, "xla"):
      measure = functools.partial(write, dtype=dtype, implementation=way)
      yield "write", f"{dtype}, {way or 'chosen'}", measure
  for pieces in sizes.pieces:
    measure = functools.partial(write_pieces, pieces=pieces)
    yield "pieces", str(pieces), measure
  # The rival comes last, because a fault on the GPU ends the process.
  yield "write", RIVAL, rival.append


def settings(sizes: Sizes) -> dict:
  """Returns the description of each figure."""
  return dataclasses.asdict(sizes) | dict(
    meaning=dict(
      us="microseconds of a write: of a loop, divided by its writes",
      steps="of a loop; each writes to every layer",
      gb_per_s="tokens read and rows of the pool written, by the median",
      percent_of_copy="of the speed of the plain copy",
    )
  )


def compare(figures: dict, copy: dict) -> None:
  """Adds the percentage of the plain copy's speed to the figures of a case."""
  if "gb_per_s" in figures and "gb_per_s" in copy:
    figures["percent_of_copy"] = 100 * figures["gb_per_s"] / copy["gb_per_s"]


def plain_copy(sizes: Sizes, batch: Batch) -> dict:
  """Times copies of K and V to successive rows of an array."""
  x = jnp.stack([batch.k, batch.v]).reshape(-1)
  start = jnp.zeros((sizes.num_layers, len(x)), x.dtype)

  def step(_, state, x):
    for layer in range(sizes.num_layers):
      state, x = lax.optimization_barrier((state, x))
      state = lax.dynamic_update_slice(state, x[None], (layer, 0))
    return state

  def verify(state):
    if not bool((state == x[None]).all()):
      raise RuntimeError("the copy is wrong")

  return measured(sizes, step, start, verify, 2 * x.nbytes, inputs=(x,))


def write(
  sizes: Sizes, batch: Batch, dtype: str, implementation: str | None
) -> dict:
  """Times writes to all layers of a pool of the dtype."""

  def write_layer(pool, layer, k, v, slots):
    return kv_pool.write(
      pool, layer, k, v, slots, implementation=implementation
    )

  return written(sizes, batch, dtype, write_layer)


def write_pieces(sizes: Sizes, batch: Batch, pieces: int) -> dict:
  """Times the kernel with the given number of 16-byte pieces per thread."""

  def write_layer(pool, layer, k, v, slots):
    layer = jnp.asarray(layer, jnp.int32)
    return kv_pool.KVPool(
      *page_write.write_tokens(
        (pool.k, pool.v), (k, v), slots, layer, vectors_per_thread=pieces
      )
    )

  return written(sizes, batch, "bfloat16", write_layer)


def written(
  sizes: Sizes, batch: Batch, dtype: str, write_layer: Callable
) -> dict:
  """Times writes to all layers with `write_layer`."""
  layer_shape = sizes.num_kv_heads, sizes.page_size, sizes.head_dim
  start = kv_pool.init(
    batch.num_pages, sizes.num_layers, *layer_shape, jnp.dtype(dtype)
  )
  slots = jnp.asarray(batch.slots)

  def step(_, pool, *tokens):
    for layer in range(sizes.num_layers):
      # Orders the writes, and keeps XLA from sharing work between them.
      pool, tokens = lax.optimization_barrier((pool, tokens))
      pool = write_layer(pool, layer, *tokens)
    return pool

  row = layout.page_bytes(1, sizes.num_kv_heads, 1, sizes.head_dim, dtype)
  figures = measured(
    sizes,
    step,
    start,
    lambda pool: check(batch, pool),
    2 * batch.k.nbytes + row * len(slots),
    inputs=(batch.k, batch.v, slots),
    large=start.k.size,
  )
  device_loop.check_in_place(figures)
  return figures


def measured(
  sizes: Sizes, step, start, verify, num_bytes: int, **options
) -> dict:
  """Returns the figures of a loop whose steps write to every layer."""
  guess = (num_bytes / GUESS + WRITE_COST) * sizes.num_layers
  steps = max(1, round(sizes.loop_us / guess))
  figures = device_loop.measure(
    step, start, steps, sizes.num_loops, verify, **options
  )
  figures["us"] = {
    name: us / sizes.num_layers for name, us in figures["us"].items()
  }
  figures["gb_per_s"] = num_bytes / figures["us"]["median"] / 1e3
  return figures


def check(batch: Batch, pool: kv_pool.KVPool) -> None:
  """Checks that each layer holds the tokens and is 0 elsewhere.

  Raises:
    RuntimeError: If a layer does not.
  """
  for name in ("k", "v"):
    rows, pages = getattr(batch, name), getattr(pool, name)
    pairs = [(rows, pages)]
    if dtypes.is_quantised(pages.dtype):
      rows, scales = jax.jit(quantised.quantise, static_argnums=1)(
        rows, pages.dtype
      )
      pairs = [(rows, pages), (scales, getattr(pool, f"{name}_scales"))]
    for rows, pages in pairs:
      if not bool(_holds(pages, rows, jnp.asarray(batch.slots))):
        raise RuntimeError(f"what is written of {name} is wrong")


@jax.jit
def _holds(pages: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
  page, offset = jnp.divmod(slots, pages.shape[3])
  # Compared as float32: float8 has no comparison on every device.
  got = pages[page, :, :, offset].astype(jnp.float32)
  same = jnp.all(got == rows[:, None].astype(jnp.float32))
  count = lambda x: jnp.count_nonzero(x.astype(jnp.float32))
  return same & (count(pages) == pages.shape[1] * count(rows))


if __name__ == "__main__":
  main()
