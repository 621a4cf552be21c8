"""Draws the time of decode attention over the page size."""

import pathlib

import numpy as np

# Colour, marker and label of each batch in `page_sizes`.
BATCHES = {
  "same": ("#1f5fa8", "o", "{} x {:,} tokens"),
  "ragged": ("#b5482a", "s", "{} x {:,} to {:,} tokens"),
  "chats": ("#3d7d3d", "D", "{} chats"),
}


def plot(record: dict, path: pathlib.Path) -> pathlib.Path:
  """Draws time and waste over the page size, and returns the path.

  Raises:
    ImportError: If matplotlib is not installed.
  """
  from benchmarks.harness import picture

  figure, left, right = picture.two_axes("decode")
  settings, parts = record["settings"], record["page_sizes"]
  for name, (color, marker, label) in BATCHES.items():
    by_size = {
      int(size): figures
      for size, figures in parts.get(name, {}).items()
      if "us" in figures
    }
    if not by_size:
      continue
    us = [figures["us"]["median"] for figures in by_size.values()]
    waste = [figures["waste_percent"] for figures in by_size.values()]
    label = label.format(*np.atleast_1d(settings[name]).tolist())
    label += f": {min(us):.0f} to {max(us):.0f} us"
    # Hollow markers keep lines that meet distinct.
    style = dict(color=color, marker=marker, markerfacecolor="white")
    left.plot(list(by_size), us, label=label, **style)
    right.plot(list(by_size), waste, **style)
  left.set_title("Time of decode attention")
  left.set_ylabel("time of a call (us)")
  right.set_title("Memory wasted in last pages")
  right.set_ylabel("slots without a token (%)")
  for axes in (left, right):
    picture.over_page_size(axes, settings["page_sizes"])
    axes.set_ylim(bottom=0)
  # Below both halves: a legend inside would lie on the lines.
  figure.legend(loc="outside lower center", ncols=3, frameon=False)
  return picture.save(figure, path)
