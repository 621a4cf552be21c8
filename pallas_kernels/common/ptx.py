"""Constants and pointers for PTX that is written by hand."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir

VECTOR_BYTES = 16  # bytes that a thread loads or stores at once, at most


def i32(value: int) -> Any:
  """Returns a 32-bit integer constant."""
  return mgpu.c(value, ir.IntegerType.get_signless(32))


def advance(pointer, num_bytes):
  """Returns a pointer moved by a number of bytes.

  Args:
    pointer: The pointer.
    num_bytes: A Python integer, or an integer in a register.
  """
  return utils.getelementptr(
    pointer, [num_bytes], ir.IntegerType.get_signless(8)
  )
