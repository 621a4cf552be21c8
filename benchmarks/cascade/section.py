"""Cascade attention in docs/performance.md."""

from benchmarks.harness.markdown import (
  number,
  origin,
  read,
  section,
  table,
  us,
)


def cascade() -> str:
  """Returns the section on attention to shared prefixes."""
  record = read("h200/cascade")
  roof = record["roof"]
  sides = "cascade", "shared part", "own part", "paged", "FlashInfer"
  heads = ["batch", "cascade_attention", "shared part alone", "own part alone"]
  heads += ["paged_attention", "FlashInfer's cascade", "lower bound"]
  return section(
    "Cascade attention",
    f"""Sequences that share a prefix (sequences x shared + own tokens, 8 KV
    heads unless the case says otherwise), in microseconds a call:
    `cascade_attention` and its two parts alone, `paged_attention` over the same
    table, and FlashInfer's cascade. The lower bound reads every key once at
    {roof["bytes_per_us"] / 1e3:,.0f} GB/s and computes the shared part at
    {roof["flop_per_us"] / 1e6:,.0f} TFLOP/s.""",
    table(
      heads,
      [
        [
          label,
          *(us(case["sides"][side]) for side in sides),
          number(case["at_least_us"]["cascade"]),
        ]
        for label, case in record["cases"].items()
      ],
    ),
    origin("h200/cascade", "benchmarks.cascade"),
  )
