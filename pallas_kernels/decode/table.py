"""Tiles and programs of the decode kernel that were measured to be best.

`benchmarks/tune_decode.py --write-table` writes the entries of its GPU: where
each shape that it timed with such a key took at least 2 % longer by the rule.
"""

# KV heads of all sequences, rounded up to a power of two; queries of each,
# padded; head_dim; dtype of the pool.
Key = tuple[int, int, int, str]
Fields = tuple[int, int, int]  # of a Config


def key(num_items: int, num_queries: int, head_dim: int, dtype: str) -> Key:
  """Returns the key of shapes.

  Args:
    num_items: KV heads of all sequences.
    num_queries: queries of each of them, padded.
    head_dim: width of a head.
    dtype: name of the dtype of the pool.
  """
  return 1 << max(num_items - 1, 0).bit_length(), num_queries, head_dim, dtype


# By the kind of the device. The script replaces all that follows.
CONFIGS: dict[str, dict[Key, Fields]] = {}
