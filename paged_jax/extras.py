"""Imports packages of the optional `demo` extra when they are needed."""

import importlib
import types


def import_demo(name: str) -> types.ModuleType:
  """Imports and returns the module `name`, which the `demo` extra installs.

  Raises:
    ModuleNotFoundError: If it is not installed; the message says what to
      install.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{name!r} is needed to read model files and is not installed: "
      "pip install 'paged-jax[demo]'",
      name=name,
    ) from error
