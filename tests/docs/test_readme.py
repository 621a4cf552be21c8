"""The README's examples run, and the commands it names exist."""

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


def _blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def _param(code):
  marks = [pytest.mark.model] if "demo" in code else []
  return pytest.param(code, marks=marks, id=code.splitlines()[0])


def _commands(program):
  """Arguments of every call of `program` in the README's shell blocks."""
  lines = "\n".join(_blocks("sh")).splitlines()
  calls = [shlex.split(line, comments=True) for line in lines]
  return [call[1:] for call in calls if call[:1] == [program]]


def _run(*args):
  # A process of its own: the strict settings of the tests are not a reader's.
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


@pytest.mark.parametrize("code", [_param(code) for code in _blocks("python")])
def test_python_examples_run(code):
  _run("-c", code)


def test_all_python_examples_are_found():
  assert len(_blocks("python")) == 3


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
  named = {call[0] for call in _commands("make")}
  named |= set(re.findall(r"`make ([a-z]+)", TEXT))
  assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("call", _commands("paged-jax"), ids=" ".join)
def test_command_options_exist(call, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([call[0], "--help"])
  assert end.value.code == 0
  known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
  assert {word for word in call if word.startswith("--")} <= known


def test_files_named_in_the_layout_exist():
  (layout,) = _blocks("text")
  folder = Path()
  for line in layout.splitlines():
    name = line.split()[0]
    if not line.startswith(" "):
      folder = Path(name)
    path = Path(name) if not line.startswith(" ") else folder / name
    assert (ROOT / path).exists(), path
