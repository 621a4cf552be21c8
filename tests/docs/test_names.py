"""Names in docs/decisions.md and docs/glossary.md are names of the code."""

import ast
import collections
import functools
import re
from pathlib import Path

import jax
import pytest

from benchmarks.harness.results import RESULTS

ROOT = Path(__file__).parents[2]
PAGES = "decisions", "glossary"
CODE = "paged_jax", "pallas_kernels", "benchmarks", "tests"
# Instructions of other GPUs, and a size that only the documents name.
FOREIGN = {"mma", "tcgen05", "ffn"}
# Modules of other libraries that the documents name.
LIBRARIES = {"lax": jax.lax}

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


def _bound(body, with_imports=False):
  """Yields the names that the statements of a module or class define."""
  for node in body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      names = [x for x in ast.walk(node) if isinstance(x, ast.Name)]
      yield from (x.id for x in names if isinstance(x.ctx, ast.Store))
    elif with_imports and isinstance(node, ast.ImportFrom):
      yield from (alias.asname or alias.name for alias in node.names)


@functools.cache
def _members():
  """Returns what packages, modules and classes define, by path of names."""
  members = collections.defaultdict(set)
  files = [path for name in CODE[:3] for path in (ROOT / name).rglob("*.py")]
  for path in files:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    parts = parts[:-1] if is_package else parts
    members[parts[:-1]].add(parts[-1])
    body = ast.parse(path.read_text(encoding="utf-8")).body
    members[parts] |= set(_bound(body, with_imports=is_package))
    for node in body:
      if isinstance(node, ast.ClassDef):
        members[*parts, node.name] |= set(_bound(node.body))
  return members


def _is_defined(name):
  """Tells if `owner.name` is defined in a module or class called `owner`."""
  *owner, last = name.split(".")
  if owner[0] in LIBRARIES:
    return hasattr(LIBRARIES[owner[0]], last)
  return any(
    last in names
    for parts, names in _members().items()
    if parts[-len(owner) :] == tuple(owner)
  )


@each_page
def test_dotted_names_are_defined_where_they_say(page):
  names = [name for name in _quoted(page) if re.fullmatch(r"\w+(\.\w+)+", name)]
  names = [name for name in names if not name.endswith((".py", ".json"))]
  assert names
  assert not [name for name in names if not _is_defined(name)]


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
