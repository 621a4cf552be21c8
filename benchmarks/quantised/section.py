"""Quantised pages in docs/performance.md."""

from benchmarks.harness.markdown import (
  number,
  origin,
  read,
  section,
  table,
)


def quantised() -> str:
  """Returns the section on the perplexity of quantised pages."""
  record = read("cpu/quantised")
  settings = record["settings"]
  return section(
    "Quantised pages",
    f"""Perplexity of the demo model on {settings["num_tokens"]:,} tokens of a
    book, computed in {settings["dtype"]} on a CPU in chunks of
    {settings["chunk"]}; every key and value is read from a page of the dtype.
    Memory is that of one token in all layers.""",
    table(
      ["pages", "perplexity", "above bfloat16", "bytes a token"],
      [
        [
          dtype,
          f"{figures['perplexity']:.3f}",
          f"{figures['percent_above_bfloat16']:+.2f} %",
          number(figures["bytes_per_token"]),
        ]
        for dtype, figures in record["pages"].items()
      ],
    ),
    origin("cpu/quantised", "benchmarks.quantised"),
  )
