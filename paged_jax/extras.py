"""Packages of the optional `demo` extra, imported where they are needed."""

import importlib
import types


def import_demo(name: str) -> types.ModuleType:
  """Returns the module `name`, which the `demo` extra installs.

  Raises:
    ModuleNotFoundError: if it is not installed, saying what to install.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{name!r} is needed to read model files and is not installed: "
      "pip install 'paged-jax[demo]'",
      name=name,
    ) from error
