"""Checked access to the key-value metadata of a model file."""

from collections.abc import Mapping
from typing import Any


class ModelFileError(ValueError):
  """A model file that is damaged, incomplete or not what it should be."""


def require[T](metadata: Mapping[str, Any], key: str, kind: type[T]) -> T:
  """Returns `metadata[key]`.

  Raises:
    ModelFileError: if the key is missing or its value is not a `kind`.
  """
  if key not in metadata:
    raise ModelFileError(f"metadata key {key!r} is missing.")
  return optional(metadata, key, metadata[key], kind)


def optional[T, D](
  metadata: Mapping[str, Any], key: str, default: D, kind: type[T]
) -> T | D:
  """Returns `metadata[key]`, or `default` where the file does not state it.

  Raises:
    ModelFileError: if its value is not a `kind`.
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
  """Returns the list of texts `metadata[key]`.

  Raises:
    ModelFileError: if the key is missing or its value is anything else.
  """
  values = require(metadata, key, list)
  if not all(isinstance(value, str) for value in values):
    raise ModelFileError(f"metadata {key} must be a list of texts.")
  return values
