"""Measures the transitions of the page table on a GPU, in microseconds.

  append       one token for each of 256 rows, with pages of 16 tokens, in pools
               of 65,536 to 1,048,576 pages that are free in random order;
               compared with the methods of other projects (`rivals`) and with a
               loop that only counts
  transitions  all other transitions, and `append` if all rows copy a shared
               page, in the smallest pool
  sums         sums over the preceding rows: masked, as in `append`, and
               cumulative
  copies       `kv_pool.copy_pages` with room for 256 copies, compared with a
               copy of one array

Each benchmark is a loop that is compiled as one program and donates its state.
Times are those of a call, measured on the host, divided by the steps of the
loop; their spread is over calls. The result of each loop is verified before it
is timed. If a loop of `append` copies an array of the size of the pool, or
needs temporary memory that grows with the pool, no results are written.

  python -m benchmarks.page_table

Results: benchmarks/results/h200/page_table.json
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import command, device_loop, results
from benchmarks.harness.table import lines
from benchmarks.page_table import parts, rivals
from benchmarks.page_table.workload import FULL, SMALL, Sizes, check, filled
from paged_jax import page_table

OURS = ("append", "append, max_new_tokens unknown")
COLUMNS = {
  "us": "{0[min]:10.2f}{0[median]:10.2f}{0[p99]:10.2f}{0[max]:10.2f}",
  "gb_per_s": "{:8.0f} GB/s",
}
PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "numpy"]


def main() -> None:
  """Times all cases, prints a table of the figures and writes the record."""
  args, environment = command.start_on_gpu("page_table", __doc__, PACKAGES)
  record = run(SMALL if args.small else FULL)
  check_memory(record)
  if not args.small:
    record["environment"] = environment
    path = results.save("h200", "page_table", record, args.out)
    print("written to", path)


def run(sizes: Sizes) -> dict:
  """Returns the record, and prints the figures of each part."""
  record: dict = {"settings": settings(sizes), "append": {}}
  heads = f"{'min':>10}{'median':>10}{'p99':>10}{'max':>10}"
  print(f"{'us of a step':60}{heads}")
  for num_pages in sizes.pools:
    sides = append(sizes, num_pages)
    record["append"][str(num_pages)] = sides
    print(table(f"{num_pages} pages", sides), flush=True)
  for part in (parts.transitions, parts.sums, parts.copies):
    record[part.__name__] = part(sizes)
    print(table(part.__name__, record[part.__name__]), flush=True)
  return record


def settings(sizes: Sizes) -> dict:
  """Returns the description of each figure."""
  return dataclasses.asdict(sizes) | dict(
    us="microseconds of a step: of a call of the loop, divided by its steps",
    temp_bytes="temporary memory of the loop, beside its state",
    large_copies="instructions that copy an array as large as the pool's",
    gb_per_s="bytes read and written, by the median",
  )


def append(sizes: Sizes, num_pages: int) -> dict[str, dict]:
  """Times one new token for every row, in all ways, from the same table."""
  start = filled(sizes, num_pages)
  before, page_size = start.table, sizes.page_size
  large = min(num_pages, before.page_indices.size)
  often = sizes.num_steps, sizes.append_calls
  search = sizes.search_steps, sizes.slow_calls
  slow = sizes.slow_steps, sizes.slow_calls
  one = jnp.ones(sizes.num_seqs, jnp.int32)

  def ours(limit: int | None) -> dict:
    def step(_, state: page_table.Appended, num_new: jax.Array):
      return page_table.append(state.table, num_new, max_new_tokens=limit)

    def verify(end: page_table.Appended) -> None:
      rivals.verify(before, end.table, sizes.num_steps)
      check(end.table, np.asarray(before.kv_lens) + sizes.num_steps)

    return device_loop.measure(
      step, start, *often, verify, inputs=(one,), large=large
    )

  def theirs(serve, state, num_steps: int, num_calls: int) -> dict:
    return device_loop.measure(
      lambda _, state: serve(state, page_size),
      state,
      num_steps,
      num_calls,
      lambda end: rivals.verify(before, end, num_steps),
      large=large,
    )

  stack, bitmap = rivals.stacked(before), rivals.bitmap(before)
  return {
    OURS[0]: ours(1),
    OURS[1]: ours(None),
    "pop, row by row": theirs(rivals.pop_each, stack, *slow),
    "bitmap argmax, row by row": theirs(rivals.search_each, bitmap, *slow),
    "bitmap argmax, rows that need it": theirs(
      rivals.search_if_needed, bitmap, *slow
    ),
    "bitmap nonzero, all rows": theirs(rivals.search_once, bitmap, *search),
    "lengths alone": device_loop.measure(
      lambda _, lens, num_new: lens + num_new,
      before.kv_lens,
      *often,
      lambda end: rivals.verify_lens(before, end, sizes.num_steps),
      inputs=(one,),
    ),
  }


def check_memory(record: dict) -> None:
  """Checks that our loops update their table or pool in place.

  Raises:
    RuntimeError: If a loop copies a large array of its state, or needs
      temporary memory that grows with the pool.
  """
  pools = record["append"]
  smallest, *_, largest = pools
  for name in OURS:
    for sides in pools.values():
      device_loop.check_in_place(sides[name])
    small, large = (pools[n][name]["temp_bytes"] for n in (smallest, largest))
    if large - small >= int(largest) - int(smallest):  # a byte a page
      raise RuntimeError(f"{name}: {small} bytes of memory became {large}.")
  for name, figures in record["copies"].items():
    if name.startswith("copy_pages"):
      device_loop.check_in_place(figures)


def table(part: str, cases: dict[str, dict]) -> str:
  """Returns the figures of a part as lines of text."""
  return lines({part: cases}, COLUMNS, width=60)


if __name__ == "__main__":
  main()
