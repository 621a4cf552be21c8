"""The picture of the cost of decode attention over the page size."""

import pathlib


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
  parts = record["page_sizes"]
  labels = {"same": "{} x {:,} tokens", "ragged": "{} x {:,} to {:,} tokens"}
  for name, color in (("same", "#1f5fa8"), ("ragged", "#b5482a")):
    sides = {
      int(size): side
      for size, side in parts.get(name, {}).items()
      if "us" in side
    }
    label = labels[name].format(*record["settings"][name])
    us = [side["us"]["median"] for side in sides.values()]
    left.plot(list(sides), us, "o-", color=color, label=label)
    if name == "ragged":
      waste = [side["waste_percent"] for side in sides.values()]
      right.plot(list(sides), waste, "o-", color=color, label=label)
  left.set_title("Time of decode attention")
  left.set_ylabel("time of a call (us)")
  right.set_title("Memory wasted in last pages")
  right.set_ylabel("slots without a token (%)")
  for axes in (left, right):
    ticks = record["settings"]["page_sizes"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xlabel("page size (tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
  return path
