"""Padded batches: positions of their tokens, and conversion to flat tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_step import (
  DECODE,
  NOWHERE,
  PAGE_SIZE,
  assert_unchanged,
  begin,
  empty,
  table_of,
)

from paged_jax import begin_padded

_padded = jax.jit(begin_padded)
MASK = np.array(
  [
    [0, 0, 1, 1, 1, 1],  # on the left
    [1, 1, 1, 0, 0, 0],  # on the right
    [0, 0, 0, 0, 0, 0],  # no token
    [1, 0, 0, 1, 1, 0],  # between tokens
  ],
  bool,
)


def _check_padded(before, cache, step, mask, refused=()):
  """Compares a padded step with plain loops over the batch."""
  batch, length = mask.shape
  old_lens = before.kv_lens.tolist()
  pages = np.asarray(table_of(cache).page_indices)
  slots = np.asarray(step.groups[0].slots)
  assert step.positions.shape == step.is_token.shape == mask.shape
  places, tokens = map(np.asarray, (step.padding.places, step.padding.tokens))
  flat, expected_places = 0, []
  for row in range(batch):
    position = old_lens[row]
    for column in range(length):
      place = row * length + column
      here = bool(mask[row, column])
      stored = here and row not in refused
      assert bool(step.is_token[row, column]) == stored
      assert int(step.positions[row, column]) == (position if stored else 0)
      assert int(tokens[place]) == (flat if here else batch * length)
      if stored:
        page, offset = divmod(position, PAGE_SIZE)
        assert slots[flat] == pages[row, page] * PAGE_SIZE + offset
      elif here:
        assert slots[flat] == NOWHERE
      if here:
        expected_places.append(place)
        flat, position = flat + 1, position + 1
    length_now = old_lens[row] if row in refused else position
    assert int(cache.kv_lens[row]) == length_now
    has_tokens = bool(mask[row].any()) and row not in refused
    assert bool(step.ok[row]) == has_tokens
    assert int(step.kv_lens[row]) == (length_now if has_tokens else 0)
  nobody = [batch * length] * (batch * length - flat)
  assert places.tolist() == expected_places + nobody
  assert (slots[flat:] == NOWHERE).all()


def test_padding_may_be_anywhere():
  cache, step = _padded(empty(), MASK)
  _check_padded(empty(), cache, step, MASK)
  # After a context, and up to the end of a page.
  for mask in (MASK[[1, 0, 3, 2]], MASK[[3, 2, 1, 0]]):
    before = cache
    cache, step = _padded(before, mask)
    _check_padded(before, cache, step, mask)


def test_a_padded_batch_refuses_rows_as_any_step():
  full, _ = begin(empty(), [8, 8, 0, 0])
  full, _ = begin(full, [0, 0, 16, 0])  # 4 of 5 pages
  mask = MASK[[0, 2, 1, 3]]
  cache, step = _padded(full, mask)
  _check_padded(full, cache, step, mask, refused=(2, 3))
  assert_unchanged(full, cache, [1, 2, 3])


def test_a_mask_of_integers_is_one_of_flags():
  flags = _padded(empty(), MASK)
  numbers = _padded(empty(), MASK * np.int32(-3))
  for a, b in zip(*map(jax.tree.leaves, (flags, numbers)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_padded_batch_of_length_1_is_a_decode_step():
  before, _ = begin(empty(), [7, 0, 8, 1])
  cache, step = _padded(before, np.array([[True], [False], [True], [True]]))
  plain, expected = begin(before, [1, 0, 1, 1], shape=DECODE)
  assert step.max_q_len == 1
  assert step.padding is None
  assert step.positions.tolist() == [[7], [0], [8], [1]]
  assert step.is_token.tolist() == [[True], [False], [True], [True]]
  np.testing.assert_array_equal(step.groups[0].slots, expected.groups[0].slots)
  assert cache.kv_lens.tolist() == plain.kv_lens.tolist() == [8, 0, 9, 2]


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    (np.ones(4, bool), r"mask must be .*\[4, length\], got bool\(4,\)"),
    (np.ones((3, 2), bool), r"got bool\(3, 2\)"),
    (np.ones((4, 2, 1), bool), r"got bool\(4, 2, 1\)"),
    (np.ones((4, 2), np.float32), r"bool or integers .* float32\(4, 2\)"),
    (np.ones((4, 0), bool), r"got bool\(4, 0\)"),
  ],
)
def test_a_wrong_mask_is_named(mask, message):
  with pytest.raises(ValueError, match=message):
    begin_padded(empty(), jnp.asarray(mask))
