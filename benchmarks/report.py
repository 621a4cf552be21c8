"""Writes docs/performance.md, and tables in README.md and docs/support.md.

Every figure comes from a JSON file in benchmarks/results. `SUBJECTS` lists the
functions that return the sections of docs/performance.md.

  python -m benchmarks.report             the texts; needs no package
  python -m benchmarks.report --pictures  the pictures, too; needs matplotlib
"""

import argparse
import pathlib
import re

from benchmarks.cascade.section import cascade
from benchmarks.compare.section import compare
from benchmarks.decode import section as decode
from benchmarks.generate.section import generate
from benchmarks.harness import rivals
from benchmarks.harness.markdown import (
  files,
  number,
  paragraph,
  read,
  section,
  table,
)
from benchmarks.harness.results import RESULTS
from benchmarks.kv_write.section import kv_write
from benchmarks.page_table.section import page_table
from benchmarks.prefill import section as prefill
from benchmarks.quantised.section import quantised
from benchmarks.ragged import section as ragged
from benchmarks.step.section import step
from benchmarks.waste.section import waste

SUBJECTS = (
  decode.beside_rivals,
  decode.by_itself,
  decode.loading,
  prefill.attention,
  ragged.steps,
  cascade,
  kv_write,
  page_table,
  prefill.model,
  step,
  generate,
  quantised,
  waste,
  compare,
)
ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
SUPPORT = ROOT / "docs" / "support.md"
# FlashInfer is slower in some of them, as fast in one, and faster in one.
SPEED = {
  "decode, 64 x 8k": "d_b64_8k",
  "decode, 128 x 128 to 16k": "d_ragged128",
  "decode, 1 x 128k": "d_b1_128k",
  "decode, 64 x 4k, 32 KV heads": "d_b64_4k_mha",
  "prefill, 4 x 4k": "p_b4_4k",
  "prefill, 8 x 512 after 4k": "p_b8_512on4k",
}


def main() -> None:
  """Writes the page and the tables, and with `--pictures` the pictures."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    "--pictures", action="store_true", help="draw the pictures, too"
  )
  if parser.parse_args().pictures:
    draw()
  PAGE.write_text(page(), encoding="utf-8")
  for path, name, block in blocks():
    text = path.read_text(encoding="utf-8")
    path.write_text(with_block(text, name, block), encoding="utf-8")


def page() -> str:
  """Returns docs/performance.md."""
  intro = """`make report`, or `python -m benchmarks.report`, writes this page
  from the files in `benchmarks/results`: change those, not this page. Times are
  medians. Every benchmark verifies its results before it times them, and says
  in its docstring how."""
  sections = [subject() for subject in SUBJECTS]
  parts = ["# Performance", paragraph(intro), *sections]
  parts.append(others("\n".join(parts)))
  return "\n\n".join(filter(None, parts)) + "\n"


def others(text: str) -> str:
  """Returns a section on results without a section; "" if there are none."""
  names = [
    str(path.relative_to(RESULTS).with_suffix(""))
    for path in sorted(RESULTS.glob("*/*.json"))
  ]
  left = [name for name in names if files(name) not in text]
  if not left:
    return ""
  return section(
    "Other results",
    f"`docs/decisions.md` cites results without a table here: {files(*left)}.",
  )


def blocks() -> tuple[tuple[pathlib.Path, str, str], ...]:
  """Returns the blocks of other files: the file, the block's name, its text."""
  return (README, "speed", speed()), (SUPPORT, "plain", decode.plain())


def with_block(text: str, name: str, block: str) -> str:
  """Returns the text of a file with one block replaced.

  Args:
    text: Text of the file.
    name: Name of the block, in the comments before and after it.
    block: The new text of the block.

  Raises:
    ValueError: If the text has not exactly one such block.
  """
  begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
  pattern = re.escape(begin) + ".*?" + re.escape(end)
  new = f"{begin}{block}\n{end}"
  text, count = re.subn(pattern, lambda _: new, text, flags=re.S)
  if count != 1:
    raise ValueError(f"there are {count} blocks from {begin!r} to {end!r}.")
  return text


def speed() -> str:
  """Returns the speed block of README.md: a paragraph and a table."""
  run, longs = rivals.run(rivals.AGAIN), rivals.long_batches()
  rows = []
  for label, case in SPEED.items():
    ours = longs[case]["us"] if case in longs else run.us(case, rivals.OURS)
    theirs = run.us(case, rivals.FLASHINFER)
    rows.append([label, number(ours), number(theirs)])
  text = f"""Microseconds a call on {run.machine()}; {rivals.SHAPE}. FlashInfer
  is the fastest of its kernels in each case, without XQA. All figures, and how
  they were measured: [docs/performance.md](docs/performance.md)."""
  heads = "batch x context", "paged-jax", "FlashInfer, fastest"
  return "\n\n".join([paragraph(text), table(heads, rows)])


def draw() -> None:
  """Draws all pictures from their results."""
  from benchmarks.decode.plot import plot
  from benchmarks.waste import plot as waste_plot

  plot(read("h200/decode"), RESULTS / "h200" / "decode.svg")
  waste_plot.save(read("cpu/waste"), RESULTS / "cpu" / "waste.svg")


if __name__ == "__main__":
  main()
