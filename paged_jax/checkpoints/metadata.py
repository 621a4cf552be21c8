"""Checked access to the key-value metadata of a model file."""

from collections.abc import Mapping
from typing import Any


class ModelFileError(ValueError):
  """Raised if a model file is damaged, incomplete, or of another kind."""


def require[T](metadata: Mapping[str, Any], key: str, kind: type[T]) -> T:
  """Returns `metadata[key]`.

  Raises:
    ModelFileError: If the key is missing or its value is not a `kind`.
  """
  if key not in metadata:
    raise ModelFileError(f"metadata key {key!r} is missing.")
  return optional(metadata, key, metadata[key], kind)


def optional[T, D](
  metadata: Mapping[str, Any], key: str, default: D, kind: type[T]
) -> T | D:
  """Returns `metadata[key]`, or `default` if the key is missing.

  Raises:
    ModelFileError: If the value is not a `kind`.
  """
  if key not in metadata:
    return default
  value = metadata[key]
  if not isinstance(value, kind):
    raise ModelFileError(
      f"metadata {key}={value!r:.80} must be of type {kind.__name__}."
    )
  return value


def require_texts(metadata: Mapping[str, Any], key: str) -> list[str]:
  """Returns `metadata[key]`, a list of strings.

  Raises:
    ModelFileError: If the key is missing or its value is not a list of strings.
  """
  values = require(metadata, key, list)
  if not all(isinstance(value, str) for value in values):
    raise ModelFileError(f"metadata {key} must be a list of strings.")
  return values
