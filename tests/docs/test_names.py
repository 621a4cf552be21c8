"""Names in docs/decisions.md and docs/glossary.md are names of the code."""

import re
from pathlib import Path

import pytest

from benchmarks.harness.results import RESULTS

ROOT = Path(__file__).parents[2]
PAGES = "decisions", "glossary"
CODE = "paged_jax", "pallas_kernels", "benchmarks", "tests"
# Instructions of other GPUs, and a size that only the documents name.
FOREIGN = {"mma", "tcgen05", "ffn"}

each_page = pytest.mark.parametrize("page", PAGES)


def _text(page):
  return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def _quoted(page):
  """Returns the code that a page has in backticks; it does not span lines."""
  return re.findall("`([^`\n]+)`", _text(page))


def _words_of_code():
  files = [path for name in CODE for path in (ROOT / name).rglob("*.py")]
  files = [path for path in files if path != Path(__file__)]
  texts = [path.read_text(encoding="utf-8") for path in files]
  names = [part for path in files for part in path.parts]
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  return set(re.findall(r"\w+", "\n".join([*texts, *names, makefile])))


@each_page
def test_quoted_names_are_in_the_code(page):
  known = _words_of_code() | FOREIGN
  names = [name for name in _quoted(page) if not name.endswith(".json")]
  words = {word for name in names for word in re.findall(r"\w+", name)}
  assert not words - known


@each_page
def test_results_and_links_are_files(page):
  results = [name for name in _quoted(page) if name.endswith(".json")]
  links = re.findall(r"\]\(([^)]+)\)", _text(page))
  assert not [name for name in results if not (RESULTS / name).exists()]
  assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_words_of_the_glossary_are_in_order():
  for section in _text("glossary").split("\n## ")[2:]:  # sizes have their own
    words = re.findall(r"^- \*\*_?([^*,]+)", section, re.M)
    assert words == sorted(words, key=str.lower), section.splitlines()[0]
