"""Masks of what queries see of the new tokens of their sequences, as bits.

Bit j of a word is set if the j-th new token is seen, whose key is at position
`context + j`. All positions of the context are seen, unless there is a window:
a query then stands at the end of its path, the context and the new tokens that
it sees. That is as many tokens before the end of the sequence as there are new
tokens that it does not see, its `unseen`.

The word of a sequence is the union of those of its queries, to tell which
values none of them sees, and its `unseen` is the greatest.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.common.limits import MAX_Q_LEN
from pallas_kernels.common.rounding import cdiv
from pallas_kernels.common.types import ArrayOrRef

_WORD = 32  # bits
_FEW = MAX_Q_LEN  # bits of a word that has `unseen` above them


class Many(NamedTuple):
  """A mask of any number of new tokens: words, between two of zeros."""

  of_rows: ArrayOrRef  # i32[num_words + 3, num_rows]; `unseen` is the last
  of_seqs: ArrayOrRef  # i32[num_seqs, num_words + 2]
  num_earlier: Array  # i32[num_seqs], the greatest `unseen`, see `kv_tiles`


class Few(NamedTuple):
  """A mask of at most `_FEW` new tokens; `unseen` is in the same words."""

  of_queries: (
    ArrayOrRef  # i32[num_seqs, max_q_len], or of the columns of a tile
  )
  of_seqs: ArrayOrRef  # i32[num_seqs], or of one


def pack_few(
  mask: Bool[Array, "num_seqs max_q_len max_new"],
  q_lens: Int[Array, " num_seqs"],
  sliding_window: int | None,
) -> Few:
  """Packs the mask of the query tokens of sequences.

  Args:
    mask: Columns past `max_q_len` are cut, those past `q_lens` ignored.
    q_lens: Query tokens of each sequence, at most `max_q_len`.
    sliding_window: Positions that a query sees, or None.
  """
  mask = mask[..., : mask.shape[1]]
  nth = jnp.arange(mask.shape[1], dtype=jnp.int32)
  exists = nth[None] < q_lens[:, None]
  mask &= exists[:, :, None] & exists[:, None, : mask.shape[2]]
  num_seen = jnp.sum(mask, axis=2, dtype=jnp.int32)
  fewest = jnp.min(jnp.where(exists, num_seen, mask.shape[1]), axis=1)
  unseen = q_lens[:, None] - num_seen
  return Few(
    _words(mask)[..., 0] | unseen << _FEW,
    _words(mask.any(1))[..., 0]
    | (_num_earlier(q_lens, fewest, sliding_window) << _FEW),
  )


def pack(
  mask: Bool[Array, "num_tokens max_new"],
  cu_q_lens: Int[Array, " num_offsets"],
  num_active: Int[Array, ""],
  sliding_window: int | None,
  *,
  group: int,
  more_rows: int,
) -> Many:
  """Packs the mask of tokens, which belong to sequences.

  Args:
    mask: Columns past the query tokens of a sequence are ignored.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this one on have no queries.
    sliding_window: Positions that a query sees, or None.
    group: Rows of a token.
    more_rows: Rows after those of the last token, which may be read.
  """
  (num_tokens, max_new), num_seqs = mask.shape, cu_q_lens.shape[0] - 1
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  passed = cu_q_lens[None, 1:] <= token[:, None]
  seq = jnp.sum(passed, axis=1, dtype=jnp.int32)
  seq = jnp.where(seq < num_active, seq, num_seqs)  # num_seqs: no sequence
  q_lens = jnp.append(cu_q_lens[1:] - cu_q_lens[:-1], 0)
  mask &= jnp.arange(max_new, dtype=jnp.int32)[None] < q_lens[seq][:, None]
  num_seen = jnp.sum(mask, axis=1, dtype=jnp.int32)
  by_some = jnp.zeros((num_seqs, max_new), jnp.int32)
  by_some = by_some.at[seq].max(mask.astype(jnp.int32), mode="drop")
  fewest = jnp.full((num_seqs,), max_new, jnp.int32)
  fewest = fewest.at[seq].min(num_seen, mode="drop")
  rows = jnp.pad(_words(mask).T, ((1, 1), (0, 0)))
  rows = jnp.concatenate([rows, (q_lens[seq] - num_seen)[None]])
  rows = jnp.repeat(rows, group, axis=1)
  return Many(
    jnp.pad(rows, ((0, 0), (0, more_rows))),
    jnp.pad(_words(by_some), ((0, 0), (1, 1))),
    _num_earlier(q_lens[:-1], fewest, sliding_window),
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
  num_words = cdiv(max_new, _WORD)
  padding = [(0, 0)] * (mask.ndim - 1) + [(0, num_words * _WORD - max_new)]
  bits = jnp.pad(mask, padding).reshape(*mask.shape[:-1], num_words, _WORD)
  nth = lax.broadcasted_iota(jnp.int32, bits.shape, bits.ndim - 1)
  return jnp.sum(bits.astype(jnp.int32) << nth, axis=-1, dtype=jnp.int32)


def unseen(words):
  """Returns `unseen`, which stands above the bits of `Few`."""
  return words >> _FEW


def has(words, nth):
  """Returns whether words have bits; any value for bits out of range."""
  return ((words >> (nth & (_WORD - 1))) & 1) != 0


def aligned(
  load: Callable[[Array], Array], num_words: int, first, size: int
) -> list[Array]:
  """Returns the words of new tokens from the first-th, maybe negative, on.

  Args:
    load: Returns one of the words of `Many`, including those of zeros.
    num_words: Their number.
    first: The token of the lowest bit.
    size: Bits, a multiple of 32.
  """
  at, shift = (first >> 5) + 1, first & (_WORD - 1)
  words = [
    load(jnp.clip(at + i, 0, num_words - 1)) for i in range(size // _WORD + 1)
  ]
  right, left = (
    jnp.broadcast_to(x, words[0].shape) for x in (shift, _WORD - 1 - shift)
  )
  return [
    lax.shift_right_logical(low, right) | ((high << 1) << left)
    for low, high in itertools.pairwise(words)
  ]


def spread(words, nth, axes: list[int]):
  """Returns whether aligned words have bits.

  Args:
    words: Each for 32 bits, of any shape.
    nth: i32, of each bit, from 0 on.
    axes: Axes of `nth` that are the axes of words.
  """
  which = nth >> 5
  word, *others = (lax.broadcast_in_dim(x, nth.shape, axes) for x in words)
  for i, other in enumerate(others, 1):
    word = jnp.where(which == i, other, word)
  return has(word, nth)
