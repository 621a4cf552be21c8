"""The page table in docs/performance.md."""

from benchmarks.harness.markdown import (
  number,
  origin,
  read,
  section,
  table,
  us,
)


def page_table() -> str:
  """Returns the section on transitions of the page table."""
  record = read("h200/page_table")
  settings = record["settings"]
  pools = record["append"]
  _, page_heads, page_size, width = settings["kv_page"]
  return section(
    "The page table",
    f"""Transitions in a compiled loop, in microseconds a step. First, `append`
    of one token for each of {settings["num_seqs"]} rows, by the number of pages
    in the pool, beside the ways in which other projects find free pages, and a
    loop that only counts tokens (lengths alone).""",
    table(
      ["way", *(f"{int(pool):,} pages" for pool in pools)],
      [
        [way, *(us(pool[way]) for pool in pools.values())]
        for way in next(iter(pools.values()))
      ],
    ),
    f"""The other transitions in the smallest pool, for {settings["num_seqs"]}
    rows unless the name says otherwise:""",
    table(
      ["transition", "median", "maximum"],
      [
        [name, us(figures), number(figures["us"]["max"])]
        for name, figures in record["transitions"].items()
      ],
    ),
    f"""Copies of shared pages, of the {settings["num_slots"]} that a step could
    ask for; a page holds K and V of {settings["kv_page"][0]} layers,
    {page_heads} KV heads, {page_size} tokens and width {width}:""",
    table(
      ["copies", "us", "GB/s"],
      [
        [name, us(figures), number(figures.get("gb_per_s"))]
        for name, figures in record["copies"].items()
      ],
    ),
    origin("h200/page_table", "benchmarks.page_table"),
  )
