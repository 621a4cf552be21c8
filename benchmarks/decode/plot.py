"""The picture of the cost of decode attention over the page size."""

import pathlib

import numpy as np

# Of page_sizes: colour and name.
BATCHES = {
  "same": ("#1f5fa8", "{} x {:,} tokens"),
  "ragged": ("#b5482a", "{} x {:,} to {:,} tokens"),
  "chats": ("#3d7d3d", "{} chats"),
}


def plot(record: dict, path: pathlib.Path) -> pathlib.Path:
  """Draws time and waste over the page size, and returns the path.

  Raises:
    ImportError: If matplotlib is not installed.
  """
  from benchmarks.harness import picture

  figure, left, right = picture.two_axes("decode")
  settings, parts = record["settings"], record["page_sizes"]
  for name, (color, label) in BATCHES.items():
    sides = {
      int(size): side
      for size, side in parts.get(name, {}).items()
      if "us" in side
    }
    if not sides:
      continue
    us = {size: side["us"]["median"] for size, side in sides.items()}
    best = min(us.values())
    label = label.format(*np.atleast_1d(settings[name]).tolist())
    more = [100 * (time / best - 1) for time in us.values()]
    waste = [side["waste_percent"] for side in sides.values()]
    fastest = f"{label}: {best:.0f} us"
    left.plot(list(sides), more, "o-", color=color, label=fastest)
    right.plot(list(sides), waste, "o-", color=color, label=label)
  left.set_title("Time of decode attention")
  left.set_ylabel("more than the shortest time (%)")
  right.set_title("Memory wasted in last pages")
  right.set_ylabel("slots without a token (%)")
  for axes in (left, right):
    picture.over_page_size(axes, settings["page_sizes"])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
  return picture.save(figure, path)
