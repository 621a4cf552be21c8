"""The tiers together run every test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/ops/test_cascade.py", "tests/ops/test_tree_mask.py"]


def _collected(tier):
  run = [sys.executable, "-m", "pytest", "--collect-only", "-q", *FILES]
  done = subprocess.run(
    [*run, "--tier", tier],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_quick_tier_and_all_parts_are_all_tests():
  quick, *parts = map(_collected, ("quick", "slow-0", "slow-1", "slow-2"))
  everything = _collected("all")
  assert len(quick) > 20
  assert min(map(len, parts)) > 5
  assert sorted(sum(parts, quick)) == sorted(everything)
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
