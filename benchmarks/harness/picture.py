"""Pictures of two plots over the page size."""

import pathlib
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def two_axes(name: str) -> tuple[Figure, Axes, Axes]:
  """Returns a picture, and its left and right axes.

  The same figures give the same file, byte for byte.

  Args:
    name: Name of the benchmark.
  """
  mpl.rcParams.update({"svg.hashsalt": name, "font.size": 10})
  figure = Figure(figsize=(9.6, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2)
  return figure, left, right


def over_page_size(axes: Axes, page_sizes: Sequence[int]) -> None:
  """Sets the horizontal axis to page sizes."""
  axes.set_xscale("log", base=2)
  axes.set_xticks(page_sizes, [str(size) for size in page_sizes])
  axes.set_xlabel("page size (tokens)")
  axes.grid(axis="y", color="0.9")
  axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a picture, and returns the path."""
  figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
  return path
