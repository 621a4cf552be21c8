"""Two checkouts of the project in docs/performance.md."""

from benchmarks.harness.markdown import number, origin, read, section, table


def compare() -> str:
  """Returns the section on the code before and after it was reorganised."""
  record = read("h200/compare")
  cases = record["cases"]
  num_same = sum(figures["same_bits"] for figures in cases.values())
  return section(
    "Before and after the packages were reorganised",
    f"""The ops of two checkouts, timed in turns in one process: the medians of
    {record["turns"]} loops, in microseconds a call. The results of {num_same}
    of {len(cases)} cases are the same, bit for bit. A case of N layers writes
    and attends in each layer of a model, with the pages of one step.""",
    table(
      ["case", "before", "after", "after / before"],
      [
        [
          name,
          number(figures["before_us"]),
          number(figures["after_us"]),
          f"{figures['ratio']:.3f}",
        ]
        for name, figures in cases.items()
      ],
    ),
    origin("h200/compare", "benchmarks.compare FOLDER"),
  )
