"""Measures decode attention on a GPU, in microseconds.

  page_sizes  the same tokens in pages of 8 to 256, and the memory that these
              pages waste: for equal lengths that fill them, and for chats
  window      131,072 tokens with a sliding window, compared with as many tokens
              as the window has
  quantised   pages of int8 and float8, compared with bfloat16
  queries     1 to 8 query tokens per sequence, as in speculative decoding
  rows_apart  1,000 steps of growing sequences: one program, no transfer
  batches     1 to 256 sequences, compared with plain JAX and with the Triton
              kernel in JAX

Pages lie at random places of a larger pool, whose unused pages hold NaN.
Successive calls use page tables without common pages, so that no call finds its
keys in the L2 cache. Times are those of a compiled loop, measured on the host,
divided by the number of calls. The run also measures how fast the GPU reads one
large array. The last output of each loop is verified before the loop is timed.

  python -m benchmarks.decode

Results: benchmarks/results/h200/decode.json and decode.svg
"""

import dataclasses
import time
from collections.abc import Iterator

import jax.numpy as jnp

from benchmarks.decode import parts
from benchmarks.decode.parts import MAX_RIVAL_ERROR, RIVAL
from benchmarks.decode.plot import plot
from benchmarks.decode.sizes import FULL, SMALL, Sizes
from benchmarks.harness import command, results
from benchmarks.harness.attention import MAX_ERROR
from benchmarks.harness.batches import DTYPE
from benchmarks.harness.cases import attempt, failures, walk
from benchmarks.harness.table import lines

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "numpy", "matplotlib"]
# The rival comes last, because a fault on the GPU ends the process.
PARTS = (
  parts.loop_alone,
  parts.page_sizes,
  parts.window,
  parts.quantised,
  parts.queries,
  parts.rows_apart,
  parts.batches,
)

COLUMNS = {
  "us": "{[median]:9.1f}",
  "gb_per_s": "{:7.0f}",
  "percent_of_ceiling": "{:7.1f} %",
  "waste_percent": "  waste {:.1f} %",
  "more_than_plain_percent": "  {:+.1f} % time",
  "speedup": "  x {:.2f}",
}


def main() -> None:
  """Times all cases, writes the record and prints a table of the figures."""
  args, environment = command.start_on_gpu("decode", __doc__, PACKAGES)
  record = results.keep(
    "decode", records(SMALL if args.small else FULL), args, environment
  )
  if not args.small:
    path = args.out / "h200" / "decode.svg"
    try:
      print("written to", plot(record, path))
    except ImportError as error:
      print("no picture:", error)
  print(table(record))
  command.finish(failures(record, RIVAL))


def records(sizes: Sizes) -> Iterator[dict]:
  """Yields the record with all figures so far, after each part."""
  record: dict = {
    "settings": settings(sizes),
    "ceiling": attempt(parts.ceiling, sizes),
  }
  reads = [figures.get("gb_per_s", 0) for _, figures in walk(record["ceiling"])]
  record["read_gb_per_s"] = max(reads)
  for part in PARTS:
    begin = time.perf_counter()
    record[part.__name__] = attempt(part, sizes)
    print(f"{part.__name__}: {time.perf_counter() - begin:.1f} s", flush=True)
    for _, figures in walk(record):
      if "gb_per_s" in figures and record["read_gb_per_s"]:
        figures["percent_of_ceiling"] = (
          100 * figures["gb_per_s"] / record["read_gb_per_s"]
        )
    yield record


def settings(sizes: Sizes) -> dict:
  """Returns the description of each figure."""
  return dataclasses.asdict(sizes) | dict(
    meaning=dict(
      us="microseconds of a call: of a loop of steps calls, divided by them",
      gb_per_s="keys and values that are seen, read in the median time",
      read_gb_per_s="the best of ceiling: a maximum over one large array",
      relative_error="of a head's output, at most, to plain JAX",
      waste_percent="slots without a token, of the pages of the sequences",
      more_than_plain_percent="that the window takes, by the medians",
      speedup="of quantised pages over those of bfloat16, by the medians",
      traces="times that the loop was compiled",
    ),
    dtype=jnp.dtype(DTYPE).name,
    max_relative_error=MAX_ERROR,
    max_relative_error_of_rival=MAX_RIVAL_ERROR,
  )


def table(record: dict) -> str:
  """Returns the figures as lines of text."""
  heading = f"{'':64}{'us':>9}{'GB/s':>7}{'ceiling':>9}"
  return f"{heading}\n{lines(record, COLUMNS, width=64)}"


if __name__ == "__main__":
  main()
