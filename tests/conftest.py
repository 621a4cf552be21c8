"""Settings of JAX, tiers, and fixtures for all tests."""

import collections
import os

# Most of the time goes into compiling programs that run once.
if os.environ.get("JAX_PLATFORMS") == "cpu":
  flags = "--xla_backend_optimization_level=0"
  flags += " --xla_llvm_disable_expensive_passes=true"
  flags += " --xla_cpu_parallel_codegen_split_count=1"
  os.environ.setdefault("XLA_FLAGS", flags)

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

from paged_jax import devices
from paged_jax.checkpoints import demo

# Interpreted warpgroups wait for each other. XLA has a thread for each core,
# and a machine may have fewer cores than a kernel has warpgroups.
os.environ.setdefault("NPROC", "8")
# Several processes that run tests share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# On a GPU the default multiplies float32 in TF32.
jax.config.update("jax_default_matmul_precision", "highest")


# The slow tests are divided into this many parts; each commit runs one.
NUM_PARTS = 3


def pytest_addoption(parser):
  parts = [f"slow-{i}" for i in range(NUM_PARTS)]
  parser.addoption(
    "--tier",
    choices=["quick", "all", *parts],
    default="quick",
    help="quick: all but slow tests; slow-N: every third slow test, from the "
    "N-th on",
  )


def pytest_collection_modifyitems(config, items):
  """Selects the tests of the tier that this machine can run."""
  tier = config.getoption("--tier")
  if devices.why_not_hopper() is not None:
    select(config, items, lambda item: not item.get_closest_marker("gpu"))
  slow = slow_tests(items)
  if tier == "quick":
    select(config, items, lambda item: item not in set(slow))
  elif tier != "all":
    part = set(slow[int(tier.removeprefix("slow-")) :: NUM_PARTS])
    select(config, items, part.__contains__)


def slow_tests(items):
  """Returns the items that are not in the quick tier, in order.

  The mark `slow(quick=n)`, n = 0 by default, leaves the first n cases of a
  function in the quick tier. If a test also has the mark `quick`, the closest
  of the two marks counts.
  """
  cases, slow = collections.Counter(), []
  for item in items:
    marks = (m for m in item.iter_markers() if m.name in ("slow", "quick"))
    mark = next(marks, None)
    if mark is None or mark.name == "quick":
      continue
    function = item.nodeid.partition("[")[0]
    cases[function] += 1
    if cases[function] > mark.kwargs.get("quick", 0):
      slow.append(item)
  return slow


def select(config, items, runs):
  """Deselects the items for which `runs` is False."""
  config.hook.pytest_deselected(items=[x for x in items if not runs(x)])
  items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Frees the compiled programs of a file and turns off the cache on disk.

  The `paged-jax` command turns that cache on for the rest of the process. XLA
  for CPUs has crashed when it wrote a program of another file to it.
  """
  yield
  jax.clear_caches()
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()


@pytest.fixture
def unchecked_shapes():
  """Turns off the tests' own shape checks, to reach the library's errors."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def demo_path():
  """The demo model's file, downloaded the first time."""
  return demo.fetch()
