"""The examples run, are short, and keep the contract of models."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from paged_jax.models import contract

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 60
MODELS = {
  "linen_model": lambda example: example.random_model(),
  "own_model": lambda example: example.OneLayer(nnx.Rngs(0)),
  "two_groups": lambda example: example.TwoGroups(nnx.Rngs(0)),
}

each_example = pytest.mark.parametrize(
  "path", EXAMPLES, ids=[path.stem for path in EXAMPLES]
)


def _module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow(quick=1)
@each_example
def test_an_example_decodes_what_its_model_gives_without_a_cache(path):
  # A separate process, since readers do not have the strict settings of the
  # tests. It ends with an error unless the tokens agree.
  done = subprocess.run(
    [sys.executable, "-W", "error", path],
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      # On a GPU this process has taken most of the memory already.
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 3
  assert all("the same without a cache" in line for line in lines)


@each_example
def test_an_example_is_short(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@each_example
def test_an_example_has_a_model_by_the_contract(path):
  with jax.numpy_dtype_promotion("standard"):
    model = MODELS[path.stem](_module(path))
  assert isinstance(model, contract.DecoderModel)


def test_two_groups_are_two():
  (path,) = (path for path in EXAMPLES if path.stem == "two_groups")
  layers = _module(path).TwoGroups.layers
  assert len({(x.num_kv_heads, x.head_dim) for x in layers}) == 2
  assert [x.sliding_window for x in layers] == [8, None]
