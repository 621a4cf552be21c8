"""Draws the memory that pages waste, and the pages that sharing saves."""

import pathlib

from benchmarks.harness import picture

PAGED, BUFFERS, SAMPLES, BEAMS = "#1f5fa8", "#b5482a", "#2c7a4b", "#7a4b9a"


def save(record: dict, path: pathlib.Path) -> pathlib.Path:
  """Draws the figures of a record, and returns the path."""
  figure, left, right = picture.two_axes("waste")
  _waste(left, record)
  _saved(right, record)
  for axes in (left, right):
    sizes = [int(size) for size in record["batching"]["page_sizes"]]
    picture.over_page_size(axes, sizes)
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    axes.set_ylim(0, 100)
  return picture.save(figure, path)


def _waste(axes, record):
  batching, settings = record["batching"], record["settings"]
  paged = _series(batching, "waste_percent")
  buffers = batching["contiguous"]["waste_percent"]
  axes.axhline(buffers, color=BUFFERS, linestyle="--")
  axes.annotate(
    f"buffers of {settings['buffer_len']:,} tokens: {buffers:.0f} %",
    (8, buffers),
    (0, 5),
    textcoords="offset points",
    color=BUFFERS,
  )
  axes.plot(*paged, "o-", color=PAGED)
  for size, value in zip(*paged, strict=True):
    axes.annotate(
      f"{value:.1f} %",
      (size, value),
      (0, 8),
      textcoords="offset points",
      ha="center",
      color=PAGED,
    )
  axes.set_title("Memory wasted, continuous batching")
  axes.set_ylabel("slots without a token (%)")


def _saved(axes, record):
  for name, label, color in (
    ("beams", "beam search, width 4", BEAMS),
    ("sampling", "4 samples of a prompt", SAMPLES),
  ):
    axes.plot(
      *_series(record[name], "saved_percent"), "o-", color=color, label=label
    )
  axes.set_title("Pages saved by sharing")
  axes.set_ylabel("pages saved, of those unshared (%)")
  axes.legend(frameon=False)


def _series(figures, name):
  sizes = figures["page_sizes"]
  return [int(size) for size in sizes], [each[name] for each in sizes.values()]
