"""Makes sections, paragraphs and tables of a page from results.

Imports nothing but the standard library.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence

from benchmarks.harness.results import RESULTS

_SPACE = "\0"  # replaces spaces in code while lines are wrapped


def read(name: str) -> dict:
  """Returns a record by its name, such as `h200/decode`."""
  return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def section(title: str, *blocks: str) -> str:
  """Returns a section; wraps its text, but not tables and pictures."""
  kept = [
    block if block.startswith(("|", "!")) else paragraph(block)
    for block in blocks
  ]
  return "\n\n".join([f"## {title}", *kept])


def paragraph(text: str) -> str:
  """Returns text in lines of at most 80 columns; code stays on one line."""
  text = " ".join(text.split())
  text = re.sub("`[^`]*`", lambda code: code[0].replace(" ", _SPACE), text)
  filled = textwrap.fill(
    text, 80, break_long_words=False, break_on_hyphens=False
  )
  return filled.replace(_SPACE, " ")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table; the first column is left-aligned, the others right."""
  rule = ["---", *["---:"] * (len(heads) - 1)]
  return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def picture(name: str, caption: str) -> str:
  """Returns a link to the picture of a result, by the result's name."""
  return f"![{caption}](../benchmarks/results/{name}.svg)"


def number(value: float | None) -> str:
  """Returns a number with three digits or more; a dash for None."""
  if value is None:
    return "-"
  digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
  return f"{value:,.{digits}f}"


def us(figures: dict) -> str:
  """Returns the median time of a case, in microseconds."""
  return number(figures["us"]["median"])


def span(values: Sequence[float], digits: int = 0) -> str:
  """Returns the range of some numbers, as text."""
  return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"


def machine(environment: dict) -> str:
  """Returns a device, its driver and the versions, as one phrase."""
  device = environment["device"]
  if device.startswith("NVIDIA"):
    device = device.replace(", ", ", driver ")
  versions = environment["versions"].items()
  return ", ".join(
    [device, *(f"{name} {version}" for name, version in versions)]
  )


def files(*names: str) -> str:
  """Returns links to results, from the folder of the documentation."""
  paths = [f"benchmarks/results/{name}.json" for name in names]
  return " and ".join(f"[`{path}`](../{path})" for path in paths)


def origin(name: str, command: str) -> str:
  """Returns the origin of a result: device, versions, command and file."""
  where = machine(read(name)["environment"])
  return f"{where}. `python -m {command}` writes {files(name)}."
