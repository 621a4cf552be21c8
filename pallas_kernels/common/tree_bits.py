"""Tree masks of speculative decoding, packed into bits.

The new tokens of a sequence follow its context. Bit j of a query's words is set
if the query sees the j-th new token, whose key is at position `context + j`.

Without a sliding window, a query sees the whole context. With one, the position
of a query is the length of its path, that is of the context and the new tokens
that it sees. The `unseen` of a query, the number of new tokens that it does not
see, is therefore its distance from the end of the sequence.

The words of a sequence are the union of the words of its queries: no query sees
a new token without a bit there, so that its row of V is zeroed. The `unseen` of
a sequence is the maximum over its queries.
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

_WORD = 32  # bits per word
_FEW = MAX_Q_LEN  # mask bits in a word of `Few`; the bits above hold `unseen`


class Many(NamedTuple):
  """A mask of any number of new tokens, for the ragged kernel.

  A word of zeros precedes the words of each row, and another follows them.
  """

  of_rows: ArrayOrRef  # i32[num_words + 3, num_rows]; the last word is `unseen`
  of_seqs: ArrayOrRef  # i32[num_seqs, num_words + 2]
  num_earlier: Array  # i32[num_seqs]: the maximum `unseen`, see `kv_tiles`


class Few(NamedTuple):
  """A mask of at most `_FEW` new tokens, one word each, for the decode kernel.

  In a kernel: the words of the columns of a tile, and of their sequence.
  """

  of_queries: ArrayOrRef  # i32[num_seqs, max_q_len]
  of_seqs: ArrayOrRef  # i32[num_seqs]


def pack_few(
  mask: Bool[Array, "num_seqs max_q_len max_new"],
  q_lens: Int[Array, " num_seqs"],
  sliding_window: int | None,
) -> Few:
  """Packs a mask whose queries are grouped by sequence.

  Args:
    mask: Columns past `max_q_len` or past `q_lens` are ignored.
    q_lens: Query tokens of each sequence, at most `max_q_len`.
    sliding_window: Positions in the window of a query, or None.
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
  """Packs a mask whose queries lie on the flat token axis.

  Args:
    mask: Columns past the query tokens of a sequence are ignored.
    cu_q_lens: Offsets of the sequences on the token axis.
    num_active: Sequences from this index on have no queries.
    sliding_window: Positions in the window of a query, or None.
    group: Rows per token: query heads per KV head.
    more_rows: Rows to append, because the last tile may be read past the end.
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
  """Returns an upper bound of `unseen` over the queries of each sequence.

  Without a window, the bound is the number of new tokens.
  """
  if sliding_window is None:
    return q_lens
  # The window does not hide new tokens: all of them are visited.
  return q_lens - jnp.minimum(fewest, sliding_window)


def _words(mask):
  """Packs the last axis of a boolean mask into i32 words."""
  max_new = mask.shape[-1]
  num_words = cdiv(max_new, _WORD)
  padding = [(0, 0)] * (mask.ndim - 1) + [(0, num_words * _WORD - max_new)]
  bits = jnp.pad(mask, padding).reshape(*mask.shape[:-1], num_words, _WORD)
  nth = lax.broadcasted_iota(jnp.int32, bits.shape, bits.ndim - 1)
  return jnp.sum(bits.astype(jnp.int32) << nth, axis=-1, dtype=jnp.int32)


def unseen(words):
  """Returns the `unseen` of queries.

  Args:
    words: i32 words of `Few`.
  """
  return words >> _FEW


def has(words, nth):
  """Returns whether bit `nth` of each word is set.

  Args:
    words: i32 words.
    nth: i32 bit numbers; arbitrary results for those outside [0, 32).
  """
  return ((words >> (nth & (_WORD - 1))) & 1) != 0


def aligned(
  load: Callable[[Array], Array], num_words: int, first, size: int
) -> list[Array]:
  """Returns the mask of `size` consecutive new tokens, as words.

  Args:
    load: Returns the word of `Many` at an index, words of zeros included.
    num_words: Number of words, words of zeros included.
    first: The new token of the lowest bit; may be negative.
    size: Number of bits, a multiple of 32.
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
  """Returns a boolean mask from the words that `aligned` returned.

  Args:
    words: Words of 32 bits each, of any shape.
    nth: i32, bit numbers in [0, 32 * len(words)).
    axes: Axes of `nth` along which the axes of a word lie.
  """
  which = nth >> 5
  word, *others = (lax.broadcast_in_dim(x, nth.shape, axes) for x in words)
  for i, other in enumerate(others, 1):
    word = jnp.where(which == i, other, word)
  return has(word, nth)
