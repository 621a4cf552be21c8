"""Figures as lines of text."""

from benchmarks.harness.cases import walk


def line(
  title: str, figures: dict, columns: dict[str, str], *, width: int
) -> str:
  """Returns the figures of a case, or its error, after a title.

  Args:
    title: Name of the case.
    figures: Figures of the case, or its error.
    columns: Format of each figure to show, by its name.
    width: Width of the title.
  """
  title = f"{title[: width - 1]:{width}}"
  if "error" in figures:
    return f"{title} {figures['error']}"
  return title + "".join(
    shown.format(figures[name])
    for name, shown in columns.items()
    if name in figures
  )


def lines(record: dict, columns: dict[str, str], *, width: int) -> str:
  """Returns a line for each case of a record; see `line`."""
  return "\n".join(
    line(", ".join(path), figures, columns, width=width)
    for path, figures in walk(record)
  )
