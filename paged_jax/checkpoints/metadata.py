"""Checked access to the key-value metadata of a model file."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np


class ModelFileError(ValueError):
  """Raised if a model file is damaged, incomplete, or of another kind."""


def damaged(reason: str) -> ModelFileError:
  """Returns the error of a file that ends too early or contradicts itself."""
  return ModelFileError(f"is a truncated or damaged GGUF file: {reason}")


class Strings(Sequence[str]):
  """An array of strings, which are decoded when they are accessed."""

  def __init__(self, file: bytes | memoryview, starts: Sequence[int]):
    self._file = file
    self._starts = starts

  def __len__(self) -> int:
    return len(self._starts)

  @overload
  def __getitem__(self, i: int) -> str: ...
  @overload
  def __getitem__(self, i: slice) -> list[str]: ...
  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    start = self._starts[i]
    (size,) = struct.unpack_from("<Q", self._file, start)
    return decoded(self._file[start + 8 : start + 8 + size])


def decoded(data: bytes | memoryview) -> str:
  """Returns the text of bytes.

  Raises:
    ModelFileError: If they are not UTF-8.
  """
  try:
    return bytes(data).decode("utf-8")
  except UnicodeDecodeError as error:
    raise damaged(f"{bytes(data[:40])!r} is not UTF-8.") from error


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


def strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
  """Returns `metadata[key]`, a sequence of strings.

  Raises:
    ModelFileError: If the key is missing or its value is not one.
  """
  value = require(metadata, key, object)
  if isinstance(value, Strings):  # which are not decoded yet
    return value
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise ModelFileError(f"metadata {key} must be a list of strings.")
  return value


def numbers(metadata: Mapping[str, Any], key: str) -> list[Any] | None:
  """Returns `metadata[key]`, a list of numbers, or None if it is missing.

  Raises:
    ModelFileError: If the value is not an array.
  """
  value = metadata.get(key)
  if isinstance(value, np.ndarray):
    return value.tolist()
  if value is not None and not isinstance(value, list):
    raise ModelFileError(f"metadata {key}={value!r:.80} must be an array.")
  return value
