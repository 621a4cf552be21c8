"""The files that a new static option touches, from `data/new_option.patch`.

The patch adds `logits_clip`, a bound of the logits, with its test. If code that
it changes has moved, apply it with fuzz and write it again with one line of
context: `git diff -U1`.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCH = ROOT / "tests/data/new_option.patch"
OPS = {"paged_jax/ops/attention.py", "paged_jax/ops/layer.py"}
SPEC = {"pallas_kernels/common/spec.py"}
IMPLEMENTATIONS = {
  "paged_jax/ops/dense.py",  # without a cache
  "paged_jax/ops/xla.py",
  "pallas_kernels/decode/tile.py",
  "pallas_kernels/ragged/problem.py",
}


def test_an_option_touches_the_ops_the_spec_and_one_file_an_implementation():
  changed = set(re.findall(r"^\+\+\+ b/(.*)", PATCH.read_text(), re.M))
  code = {name for name in changed if not name.startswith("tests/")}
  assert code == OPS | SPEC | IMPLEMENTATIONS


@pytest.mark.slow
def test_an_option_that_the_patch_adds_matches_oracle(tmp_path):
  for name in ("paged_jax", "pallas_kernels", "tests", "pyproject.toml"):
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, tmp_path / name)
  apply = ["git", "apply", "-C1", str(PATCH)]
  run = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_logits_clip.py"]
  for command in (apply, run):
    done = subprocess.run(
      command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
  assert "4 passed" in done.stdout
