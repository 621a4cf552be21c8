"""Rounding of sizes. Imports no Pallas."""


def cdiv(a: int, b: int) -> int:
  """Returns `a / b`, rounded up.

  Args:
    a: Dividend.
    b: Divisor, not 0.
  """
  return -(-a // b)


def round_up(n: int, multiple: int) -> int:
  """Returns the least multiple of `multiple` that is at least `n`.

  Args:
    n: Not negative.
    multiple: Positive.
  """
  return cdiv(n, multiple) * multiple


def next_power_of_two(n: int) -> int:
  """Returns the least power of two that is at least `n`.

  Args:
    n: Not negative. The result for 0 is 1.
  """
  return 1 << max(n - 1, 0).bit_length()
