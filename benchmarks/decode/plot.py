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
  import matplotlib as mpl
  from matplotlib.figure import Figure

  # The same picture, byte for byte, from the same figures.
  mpl.rcParams.update({"svg.hashsalt": "decode", "font.size": 10})
  figure = Figure(figsize=(9.6, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2)
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
    ticks = settings["page_sizes"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xlabel("page size (tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
  return path
