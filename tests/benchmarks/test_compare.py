"""The comparison of two checkouts finds what differs."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _compare(folder):
  """Runs the command, as the modules of one name are imported twice."""
  args = [sys.executable, "-m", "benchmarks.compare", folder, "--small"]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    args, cwd=ROOT, env=env, capture_output=True, text=True, check=False
  )


@pytest.mark.slow
def test_a_checkout_is_like_itself_and_unlike_a_changed_one(tmp_path):
  for name in ("paged_jax", "pallas_kernels"):
    shutil.copytree(ROOT / name, tmp_path / name)
  same = _compare(tmp_path)
  assert same.returncode == 0, same.stderr
  names = [line.split()[0] for line in same.stdout.splitlines()]
  assert names[1:] == ["decode", "prefill", "write", "layers"]
  plain = tmp_path / "paged_jax/ops/xla.py"
  text = plain.read_text()
  assert "jnp.exp(" in text
  plain.write_text(text.replace("jnp.exp(", "jnp.exp2("))
  changed = _compare(tmp_path)
  expected = [f"other bits: {name}" for name in ("decode", "prefill", "layers")]
  assert changed.stderr.splitlines()[-1] == f"failed: {'; '.join(expected)}"
