import os
import zlib

# Most of the time goes into compiling programs that run once.
if os.environ.get("JAX_PLATFORMS") == "cpu":
  flags = "--xla_backend_optimization_level=0"
  flags += " --xla_llvm_disable_expensive_passes=true"
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


def pytest_collection_modifyitems(config, items):
  """Leaves out what this machine cannot run, rather than skipping it.

  Without a GPU kernels are interpreted, or lowered, which takes seconds a case:
  of their files it takes a quarter, always the same, unless PAGED_JAX_ALL=1,
  and what is the only test of its kind.
  """
  if devices.why_not_hopper() is None:
    return
  runs_all = os.environ.get("PAGED_JAX_ALL") == "1"

  def runs(item):
    if item.get_closest_marker("gpu"):
      return False
    if runs_all or item.get_closest_marker("always"):
      return True
    if not item.get_closest_marker("sampled"):
      return True
    return zlib.crc32(item.nodeid.encode()) % 4 == 0

  config.hook.pytest_deselected(items=[x for x in items if not runs(x)])
  items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Frees the programs of a file, and turns off the cache on disk.

  The command turns it on for the rest of the process. XLA for CPUs has crashed
  writing a program of another file to it.
  """
  yield
  jax.clear_caches()
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()


@pytest.fixture
def unchecked_shapes():
  """Turns the tests' own shape checks off, to reach the library's errors."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def demo_path():
  """The demo model's file, downloaded the first time."""
  return demo.fetch()
