"""Variants of the ragged kernel in docs/performance.md."""

from benchmarks.harness.markdown import (
  files,
  machine,
  number,
  read,
  section,
  table,
)

CASES = "1 x 4k", "4 x 4k", "1 x 16k", "8 x 1k", "8 x 512 on 4k"
# For each run, its variants: the name in the record, and a label that refers
# only to the variant above.
RUNS = (
  {
    "warpgroups meet before and after they start P V and Q K^T": (
      "all warpgroups wait before and after they issue P V and Q K^T"
    ),
    "the same, Q K^T before P V": "the same, Q K^T first",
  },
  {
    "one starts after the other, Q K^T before P V": (
      "warpgroups issue in turn, Q K^T first"
    ),
    "the same, softmax behind the wait for P V": (
      "the same, softmax after the wait for P V"
    ),
  },
  {
    "and the sum of Q K^T is not zeroed": (
      "in turn, and Q K^T starts without a zeroed accumulator"
    )
  },
  {
    "and sums of P once an item": "and P is summed over threads once an item",
    "the same, without turns": "the same, without turns",
  },
  {
    "the warpgroup copies": "the whole warpgroup issues each copy",
    "each warp copies its share, in a loop of its own": (
      "each warp has its own loop and copies a part"
    ),
    "and acc is multiplied where a maximum grew by 2^8": (
      "and acc is rescaled only where a maximum grew by more than 2^8"
    ),
    "and a warpgroup without queries passes tiles on": (
      "and a warpgroup without queries only releases the tiles"
    ),
  },
  {
    "and Q has two buffers": "and Q has two buffers",
    "the same again": "the same again",
    "and the first Q K^T of an item goes on beside the last P V of the one "
    "before (not kept)": (
      "and the first Q K^T of an item overlaps the last P V of the item before "
      "(not kept)"
    ),
  },
  {
    "as before": "as before",
    "and holes of an item are asked for when its sequence is known": (
      "and the holes of an item are loaded when it begins"
    ),
    "and P V leaves out rows past the last tile's end, and page ids are looked "
    "up where there are holes only (not kept)": (
      "and P V skips rows past the end, and page ids are loaded only where "
      "there are holes (not kept)"
    ),
  },
  {
    "as before": "as before",
    "and holes of an item are asked for when its sequence is known": (
      "and the holes of an item are loaded when it begins"
    ),
    "and P V leaves out rows past the last tile's end (not kept)": (
      "and P V skips rows past the end (not kept)"
    ),
  },
)


def steps() -> str:
  """Returns the section on the gain of each change of the kernel."""
  record = read("h200/ragged_steps")
  rows = []
  for nth, (run, variants) in enumerate(
    zip(record["runs"], RUNS, strict=True), 1
  ):
    for name, words in variants.items():
      figures = (number(run[name].get(case)) for case in CASES)
      rows.append([words, str(nth), *figures])
  return section(
    "Steps towards the prefill kernel",
    """TFLOP/s of the ragged kernel after each change: prompts as above, 8 KV
    heads. Compare only the rows of one run: runs differ in GPU, clock and the
    loop around the kernel. A row adds its change to the row above, unless that
    was not kept.""",
    table(["variant", "run", *CASES], rows),
    f"""{machine(record["environment"])}. The loops that timed them are not part
    of this repository; they wrote {files("h200/ragged_steps")}.""",
  )
