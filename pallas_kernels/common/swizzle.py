"""Widths of swizzled tiles in shared memory. Imports no Pallas.

TMA and wgmma swizzle tiles of 8 rows, which are 128, 64 or 32 bytes wide. Wider
rows are cut into several tiles.
"""

_WIDTHS = (128, 64, 32)  # bytes, the widest first


def swizzle_bytes(row_bytes: int) -> int | None:
  """Returns the width of the tiles in bytes, or None if no width fits.

  Args:
    row_bytes: Bytes per row, a multiple of the width.
  """
  return next((x for x in _WIDTHS if row_bytes % x == 0), None)
