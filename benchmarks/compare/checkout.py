"""Imports another checkout of this project beside the current one."""

import contextlib
import importlib
import pathlib
import sys
import types
from collections.abc import Callable, Generator

import jax

PACKAGES = ("paged_jax", "pallas_kernels")


class Checkout:
  """The packages of a folder, imported beside those of the current one.

  Modules of both have the same names, so `sys.modules` holds the modules of one
  folder at a time: import and trace only inside `active`.
  """

  def __init__(self, folder: str | None = None):
    """Imports the packages.

    Args:
      folder: Folder of the other checkout; None for the current one.
    """
    self._path = None if folder is None else str(pathlib.Path(folder).resolve())
    self._modules: dict[str, types.ModuleType] = {}
    with self.active():
      self.paged_jax = importlib.import_module("paged_jax")

  @contextlib.contextmanager
  def active(self) -> Generator[None]:
    """Lets `sys.modules` hold the modules of this checkout."""
    if self._path is None:
      yield
      return
    outer = _pop_modules()
    sys.modules.update(self._modules)
    sys.path.insert(0, self._path)
    try:
      yield
    finally:
      sys.path.remove(self._path)
      self._modules = _pop_modules()
      sys.modules.update(outer)

  def module(self, *names: str) -> types.ModuleType:
    """Returns the first of the modules that exists in the checkout."""
    with self.active():
      for name in names:
        with contextlib.suppress(ModuleNotFoundError):
          return importlib.import_module(name)
    raise ModuleNotFoundError(f"the checkout has none of {names}.")

  def compile(self, run: Callable, *args, **options) -> jax.stages.Compiled:
    """Compiles a function that calls the checkout's ops, with jit's options."""
    with self.active():
      return jax.jit(run, **options).lower(*args).compile()


def _pop_modules() -> dict[str, types.ModuleType]:
  """Removes the packages' modules from `sys.modules`, and returns them."""
  names = [n for n in sys.modules if n.split(".")[0] in PACKAGES]
  return {name: sys.modules.pop(name) for name in names}
