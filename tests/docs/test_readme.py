"""Examples in README.md and docs/guide.md run; names in README exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paged_jax import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
MOST_LINES = 150
DOCS = [path.name for path in (ROOT / "docs").glob("*.md")]


def _blocks(language, text=TEXT):
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


EXAMPLES = _blocks("python") + _blocks("python", GUIDE)


def _param(code):
  marks = [pytest.mark.model, pytest.mark.slow] if "demo" in code else []
  return pytest.param(code, marks=marks, id=str(EXAMPLES.index(code)))


def _commands(program):
  """Returns the arguments of each call of `program` in README's shell code."""
  lines = "\n".join(_blocks("sh")).splitlines()
  calls = [shlex.split(line, comments=True) for line in lines]
  return [call[1:] for call in calls if call[:1] == [program]]


def _run(*args):
  # A separate process, since readers do not have the tests' strict settings.
  done = subprocess.run(
    [sys.executable, "-W", "error", *args],
    cwd=ROOT,
    # On a GPU this process has taken most of the memory already.
    env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("code", [_param(code) for code in EXAMPLES])
def test_python_examples_run(code):
  _run("-c", code)


def test_all_python_examples_are_found():
  assert len(EXAMPLES) == 5


def test_the_readme_is_short():
  assert len(TEXT.splitlines()) <= MOST_LINES


def test_links_lead_to_files():
  for folder, pages in ((ROOT, ["README.md"]), (ROOT / "docs", DOCS)):
    for page in pages:
      text = (folder / page).read_text(encoding="utf-8")
      for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (folder / target).exists(), (page, target)


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
  named = {call[0] for call in _commands("make")}
  named |= set(re.findall(r"`make ([a-z-]+)", TEXT))
  assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("call", _commands(".venv/bin/paged-jax"), ids=" ".join)
def test_command_options_exist(call, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([call[0], "--help"])
  assert end.value.code == 0
  known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
  assert {word for word in call if word.startswith("--")} <= known


def test_files_that_the_readme_names_exist():
  named = re.findall(r"`(\w+/[\w./]*)`", TEXT)
  assert "pallas_kernels/" in named
  assert not [path for path in named if not (ROOT / path).exists()]
