"""Figures as lines of text."""

from benchmarks.harness.cases import walk


def line(title: str, side: dict, columns: dict[str, str], *, width: int) -> str:
  """Returns the figures of a case, or its error, after a title.

  Args:
    title: What was timed.
    side: Its figures, or its error.
    columns: How a figure is shown, by its name, for those to show.
    width: Of the title.
  """
  title = f"{title[: width - 1]:{width}}"
  if "error" in side:
    return f"{title} {side['error']}"
  return title + "".join(
    shown.format(side[name]) for name, shown in columns.items() if name in side
  )


def lines(record: dict, columns: dict[str, str], *, width: int) -> str:
  """Returns a line for each case of a record; see `line`."""
  return "\n".join(
    line(", ".join(path), side, columns, width=width)
    for path, side in walk(record)
  )
