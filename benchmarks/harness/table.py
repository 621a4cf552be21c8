"""Figures as lines of text."""

from benchmarks.harness.cases import walk


def line(title: str, side: dict, columns: dict[str, str], *, width: int) -> str:
  """Returns the figures of a case, or its error, after a title.

  Args:
    title: Name of the case.
    side: Figures of the case, or its error.
    columns: Format of each figure to show, by its name.
    width: Width of the title.
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
