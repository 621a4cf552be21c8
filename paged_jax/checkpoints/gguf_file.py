"""Reads the structure of a GGUF file: its metadata, and where its tensors are.

The file is mapped into memory, and nothing in it is trusted: each length is
compared with the bytes that are left before it is used, and arrays are decoded
on request. So a damaged file is refused at little cost.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import array
import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paged_jax.checkpoints.metadata import (
  ModelFileError,
  Strings,
  damaged,
  decoded,
)
from paged_jax.extras import import_demo

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Codes of `struct` and of NumPy.
_NUMBERS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT = 32
_MAX_DIMS = 4
# More than any model has, and few enough to be listed in a second.
_MAX_KEYS = _MAX_TENSORS = 2**16
_MAX_STRINGS = 2**22


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, which is read when `rows` is accessed.

  Attributes:
    name: Its name.
    shape: Sizes of its axes, the fastest-varying one last.
    type: A `gguf.GGMLQuantizationType`.
  """

  name: str
  shape: tuple[int, ...]
  type: Any
  _file: np.ndarray
  _start: int
  _row_bytes: int

  @property
  def rows(self) -> np.ndarray:
    """u8[num_rows, row_bytes], a view of the mapped file."""
    num_rows = math.prod(self.shape[:-1])
    end = self._start + num_rows * self._row_bytes
    data = self._file[self._start : end]
    return data.reshape(num_rows, self._row_bytes)


class _Cursor:
  """A position in a file; reads what is there, and moves behind it."""

  def __init__(self, file: memoryview):
    self.file = file
    self.at = 0
    self._num_strings = 0

  def skip(self, size: int) -> int:
    """Moves by `size` bytes, and returns the old position.

    Raises:
      ModelFileError: If so many bytes are not left.
    """
    start = self.at
    self.check_left(size)
    self.at = start + size
    return start

  def check_left(self, size: int) -> None:
    """Raises a ModelFileError if so many bytes are not left."""
    start = self.at
    if size > len(self.file) - start:
      raise damaged(
        f"{size} bytes at {start} exceed its {len(self.file)} bytes."
      )

  def number(self, code: str) -> Any:
    """Returns a number of a type of `struct`."""
    start = self.skip(struct.calcsize("<" + code))
    return struct.unpack_from("<" + code, self.file, start)[0]

  def string(self) -> str:
    """Returns a string."""
    size = self.number("Q")
    start = self.skip(size)
    return decoded(self.file[start : self.at])

  def value(self, kind: int) -> Any:
    """Returns a value of metadata: a number, a string or an array."""
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.number(_code(kind))
    kind, count = self.number("I"), self.number("Q")
    if kind == _STRING:
      return self._strings(count)
    if kind == _ARRAY:
      raise NotImplementedError("arrays of arrays are not supported.")
    dtype = np.dtype("<" + _code(kind))
    start = self.skip(count * dtype.itemsize)
    return np.frombuffer(self.file[start : self.at], dtype)

  def _strings(self, count: int) -> Strings:
    self._num_strings += count
    if self._num_strings > _MAX_STRINGS:
      raise ModelFileError(
        f"has {self._num_strings} strings in arrays; {_MAX_STRINGS} is the "
        "limit."
      )
    self.check_left(8 * count)
    starts, unpack = array.array("Q"), struct.Struct("<Q").unpack_from
    at, end = self.at, len(self.file) - 8
    for _ in range(count):
      starts.append(at)
      at = at + 8 + unpack(self.file, at)[0] if at <= end else end + 9
    self.skip(at - self.at)
    return Strings(self.file, starts)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """The structure of a file.

  Attributes:
    metadata: Numbers, strings, NumPy arrays and `Strings`, by their keys.
    tensors: The tensors by their names.
  """

  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]


def read(path: Path) -> GGUFFile:
  """Returns the structure of a GGUF file.

  Args:
    path: The file. It may be deleted meanwhile, but must not be written to.

  Raises:
    FileNotFoundError: If the file does not exist.
    ModelFileError: If it is not a GGUF file, is truncated or damaged.
    NotImplementedError: If it is big-endian, or has arrays of arrays.
    ModuleNotFoundError: If the `demo` extra is not installed.
  """
  import_demo("gguf")
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file.")
  if not path.is_file():
    raise ModelFileError("is not a regular file.")
  with path.open("rb") as file:
    if file.read(len(_MAGIC)) != _MAGIC:
      raise ModelFileError("is not a GGUF file.")
  data = np.memmap(path, np.uint8, "r")
  cursor = _Cursor(memoryview(data))
  cursor.skip(len(_MAGIC))
  version = cursor.number("I")
  if version & 0xFFFF == 0:
    raise NotImplementedError("big-endian GGUF files are not supported.")
  if version not in _VERSIONS:
    raise ModelFileError(f"has {version=}, which must be one of {_VERSIONS}.")
  num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
  for name, count, most in (
    ("tensors", num_tensors, _MAX_TENSORS),
    ("keys", num_keys, _MAX_KEYS),
  ):
    if count > most:
      raise damaged(f"it has {count} {name}, and {most} is the limit.")
  metadata = _unique("key", _metadata(cursor, num_keys))
  infos = [_info(cursor) for _ in range(num_tensors)]
  alignment = _alignment(metadata)
  start = -(-cursor.at // alignment) * alignment
  found = ((info[0], _tensor(data, start, *info)) for info in infos)
  return GGUFFile(metadata, _unique("tensor", found))


def _metadata(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
  for _ in range(count):
    key = cursor.string()
    yield key, cursor.value(cursor.number("I"))


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
  """Returns the name, shape, type and offset of a tensor."""
  name, num_dims = cursor.string(), cursor.number("I")
  if num_dims > _MAX_DIMS:
    raise damaged(f"tensor {name!r:.80} has {num_dims} axes.")
  # The file has the fastest-varying axis first.
  dims = [cursor.number("Q") for _ in range(num_dims)]
  return name, tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")


def _tensor(
  data: np.ndarray,
  start: int,
  name: str,
  shape: tuple[int, ...],
  kind: int,
  offset: int,
) -> Tensor:
  gguf = import_demo("gguf")
  try:
    quantisation = gguf.GGMLQuantizationType(kind)
  except ValueError as error:
    raise damaged(
      f"tensor {name!r:.80} has the unknown type {kind}."
    ) from error
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
  width = shape[-1] if shape else 1
  row_bytes = width // block_size * block_bytes
  end = start + offset + math.prod(shape[:-1]) * row_bytes
  if width % block_size or end > len(data):
    raise damaged(
      f"tensor {name!r:.80} of {shape=} "
      f"and type {quantisation.name} ends at {end}, the file at {len(data)}."
    )
  return Tensor(name, shape, quantisation, data, start + offset, row_bytes)


def _alignment(metadata: Mapping[str, Any]) -> int:
  alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
  if not isinstance(alignment, int) or alignment.bit_count() != 1:
    raise ModelFileError(
      f"metadata {_ALIGNMENT_KEY}={alignment!r:.80} must be a power of two."
    )
  return alignment


def _unique(what: str, pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise damaged(f"{what} {name!r:.80} is there twice.")
    found[name] = value
  return found


def _code(kind: int) -> str:
  if kind not in _NUMBERS:
    raise damaged(f"value of unknown type {kind}.")
  return _NUMBERS[kind]
