"""Two checkouts of the project in docs/performance.md."""

from benchmarks.harness.markdown import number, origin, read, section, table

# In the names of loops over layers. Nothing uses the attention of a layer but
# the last, so XLA may remove it: in plain JAX it does.
LAYERS = " layers, "


def compare() -> str:
  """Returns the section on the code before and after it was reorganised."""
  record = read("h200/compare")
  cases = record["cases"]
  num_same = sum(side["same_bits"] for side in cases.values())
  shown = {name: side for name, side in cases.items() if LAYERS not in name}
  return section(
    "Before and after the packages were reorganised",
    f"""The ops of two checkouts, timed in turns in one process: the medians of
    {record["turns"]} loops, in microseconds a call. The results of {num_same}
    of {len(cases)} cases are the same, bit for bit. {len(cases) - len(shown)}
    of these are loops over the layers of a model, whose times are not shown:
    they use the attention of the last layer only, so the compiler may remove
    the others.""",
    table(
      ["case", "before", "after", "after / before"],
      [
        [
          name,
          number(side["before_us"]),
          number(side["after_us"]),
          f"{side['ratio']:.3f}",
        ]
        for name, side in shown.items()
      ],
    ),
    origin("h200/compare", "benchmarks.compare FOLDER"),
  )
