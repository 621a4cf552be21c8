"""Masks of what queries see of the new tokens of their sequences, as bits.

Bit j of a word tells whether the j-th new token is seen, whose key is at
position `context + j`. All positions of the context are seen, but for a window:
a query counts as being at the end of a path, the context and the new tokens
that it sees. That is so many tokens before the end of the sequence as there are
new tokens that it does not see, which the kernels know as `before`.

Of a sequence, the word is the union of those of its queries, for the values
that none of them sees, and `before` the greatest.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_WORD = 32  # bits
_FEW = 8  # bits of new tokens of a word that has `before` above them


class Few(NamedTuple):
  """A mask of at most `_FEW` new tokens; `before` is in the same words."""

  of_queries: Any  # i32[num_seqs, max_q_len], or of the columns of a tile
  of_seqs: Any  # i32[num_seqs], or of one


def pack_few(
  mask: Bool[Array, "num_seqs max_q_len max_new"],
  q_lens: Int[Array, " num_seqs"],
  sliding_window: int | None,
) -> Few:
  """Packs the mask of the query tokens of sequences.

  Args:
    mask: columns past `max_q_len` are cut, those past `q_lens` ignored.
    q_lens: query tokens of each sequence, at most `max_q_len`.
    sliding_window: positions that a query sees, or None.
  """
  mask = mask[..., : mask.shape[1]]
  nth = jnp.arange(mask.shape[1], dtype=jnp.int32)
  exists = nth[None] < q_lens[:, None]
  mask &= exists[:, :, None] & exists[:, None, : mask.shape[2]]
  num_seen = jnp.sum(mask, axis=2, dtype=jnp.int32)
  fewest = jnp.min(jnp.where(exists, num_seen, mask.shape[1]), axis=1)
  before = q_lens[:, None] - num_seen
  return Few(
    _words(mask)[..., 0] | before << _FEW,
    _words(mask.any(1))[..., 0]
    | (_num_earlier(q_lens, fewest, sliding_window) << _FEW),
  )


def _num_earlier(q_lens, fewest, sliding_window):
  """Returns by how many positions some query sees less than the last token.

  Without a window, it is the whole tree.
  """
  if sliding_window is None:
    return q_lens
  # Windows do not bound new tokens: all of them are visited.
  return q_lens - jnp.minimum(fewest, sliding_window)


def _words(mask):
  """Packs the last axis into words."""
  max_new = mask.shape[-1]
  num_words = -(-max_new // _WORD)
  padding = [(0, 0)] * (mask.ndim - 1) + [(0, num_words * _WORD - max_new)]
  bits = jnp.pad(mask, padding).reshape(*mask.shape[:-1], num_words, _WORD)
  nth = lax.broadcasted_iota(jnp.int32, bits.shape, bits.ndim - 1)
  return jnp.sum(bits.astype(jnp.int32) << nth, axis=-1, dtype=jnp.int32)


def before(words):
  """Returns what is above the bits of `Few`."""
  return words >> _FEW


def has(words, nth):
  """Tells whether words have bits; those out of range are of any value."""
  return ((words >> (nth & (_WORD - 1))) & 1) != 0
