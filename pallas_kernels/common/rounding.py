"""Rounding of sizes. Imports no Pallas."""


def cdiv(a: int, b: int) -> int:
  """Returns `a / b`, rounded up."""
  return -(-a // b)


def round_up(n: int, multiple: int) -> int:
  """Returns the least multiple that is at least `n`."""
  return cdiv(n, multiple) * multiple


def next_power_of_two(n: int) -> int:
  """Returns the least power of two that is at least `n`; 1 for 0."""
  return 1 << max(n - 1, 0).bit_length()
