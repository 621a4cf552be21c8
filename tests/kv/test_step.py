"""Slots, positions and rows of the tokens of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_step import (
  DECODE,
  FLAT,
  NUM_PAGES,
  NUM_SEQS,
  SHORT,
  SOME,
  SOME_DECODE,
  TREE,
  Plain,
  assert_unchanged,
  begin,
  empty,
  release,
  table_of,
)

from paged_jax import begin_step

HUGE = 2**31 - 1
SHAPES = {
  "all rows": FLAT,
  "some rows": SOME,
  "short queries": SHORT,
  "decode": DECODE,
  "decode some rows": SOME_DECODE,
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_steps_are_what_plain_loops_say(shape):
  num_tokens, max_q_len, num_entries = shape
  rng = np.random.default_rng(num_tokens)
  choices = [-1, 0, 1, 1, 1, 1, 1, 2, HUGE]
  choices += [] if max_q_len == 1 else [3, 3, 4, 7, 7, 8, 8, 9, 9, 17]
  plain, num_served = Plain(empty()), 0
  for _ in range(60):
    rows = None
    if num_entries:
      rows = rng.permutation(NUM_SEQS)[:num_entries].tolist()
      if rng.random() < 0.3:  # out of range, or named twice
        rows = rng.integers(-1, NUM_SEQS + 2, num_entries).tolist()
    q_lens = rng.choice(choices, num_entries or NUM_SEQS).tolist()
    num_served += sum(plain.run(q_lens, rows, shape))
    if rng.random() < 0.5:
      row = int(rng.integers(NUM_SEQS))
      plain.model.release([row])
      plain.cache = release(plain.cache, np.arange(NUM_SEQS) == row)
  assert num_served > 20


def test_entries_of_a_step_are_rows_in_another_order():
  cache, _ = begin(empty(), [5, 0, 7, 0])
  cache, step = begin(cache, [2, 3, 1], [2, 0, 3], SOME)
  assert cache.kv_lens.tolist() == [8, 0, 9, 1]
  assert step.kv_lens.tolist() == [9, 8, 1]
  assert step.positions.tolist()[:6] == [7, 8, 5, 6, 7, 0]
  np.testing.assert_array_equal(
    step.groups[0].page_indices,
    table_of(cache).page_indices[jnp.array([2, 0, 3])],
  )


def test_tokens_of_no_row_are_padding():
  before, _ = begin(empty(), [5, 0, 7, 0])
  for nobody in (NUM_SEQS, NUM_SEQS + 1, -1):
    cache, step = begin(before, [2, 3, 1], [nobody, 0, nobody], SOME)
    assert cache.kv_lens.tolist() == [8, 0, 7, 0]
    assert step.ok.tolist() == [False, True, False]
    assert step.cu_q_lens.tolist() == [0, 2, 5, 6]
    assert step.is_token.tolist() == [False] * 2 + [True] * 3 + [False] * 11
    assert (np.asarray(step.groups[0].page_indices)[[0, 2]] == NUM_PAGES).all()


def test_the_second_to_name_a_row_is_refused():
  cache, step = begin(empty(), [2, 3, 1], [1, 1, 0], SOME)
  assert step.ok.tolist() == [True, False, True]
  assert cache.kv_lens.tolist() == [1, 2, 0, 0]
  # Even if the first entry has no tokens.
  cache, step = begin(empty(), [0, 3, 1], [1, 1, 0], SOME)
  assert step.ok.tolist() == [False, False, True]


def test_rows_are_served_in_their_order_when_pages_run_short():
  cache, _ = begin(empty(), [8, 8, 0, 0])
  full, _ = begin(cache, [0, 0, 16, 0])
  assert int(table_of(full).num_free) == 1
  for order in ([2, 0, 1], [1, 2, 0]):
    cache, step = begin(full, [1, 1, 1], order, SOME)
    assert step.ok.tolist() == [True, False, False]
    assert_unchanged(full, cache, order[1:])
    cache, step = begin(full, [1, 1, 1], order, SOME_DECODE)
    assert step.ok.tolist() == [True, False, False]
    assert_unchanged(full, cache, order[1:])


def test_a_decode_token_is_that_of_its_row():
  cache, _ = begin(empty(), [7, 0, 8, 1])
  cache, step = begin(cache, [1, 0, 1, 1], shape=DECODE)
  assert step.max_q_len == 1
  assert step.cu_q_lens.tolist() == [0, 1, 2, 3, 4]
  assert step.is_token.tolist() == [True, False, True, True]
  assert step.positions.tolist() == [7, 0, 8, 1]
  assert step.kv_lens.tolist() == [8, 0, 9, 2]


def test_traced_tokens_that_do_not_fit_whole_are_refused():
  # Only 6 of the second row's 10 tokens would fit into 16.
  before, _ = begin(empty(), [0, 3, 0, 0])
  cache, step = begin(before, [10, 10, 1, 0])
  assert step.ok.tolist() == [True, False, False, False]
  assert step.cu_q_lens.tolist() == [0, 10, 16, 16, 16]
  assert step.is_token.tolist() == [True] * 10 + [False] * 6
  assert_unchanged(before, cache, [1, 2, 3])
  assert int(table_of(cache).num_free) == int(table_of(before).num_free) - 2


def test_traced_lengths_above_the_most_are_refused():
  cache, step = begin(empty(), [3, 4, 1, 0], [0, 1, 2, 3], SHORT)
  assert step.ok.tolist() == [True, False, True, False]
  assert cache.kv_lens.tolist() == [3, 0, 1, 0]
  # It keeps its tokens on the token axis.
  assert step.cu_q_lens.tolist() == [0, 3, 7, 8, 8]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("q_lens", "num_tokens", "max_q_len", "message"),
  [
    ([6, 6, 0, 0], 8, None, r"q_lens=\[6, 6, 0, 0\] have 12 tokens.*=8"),
    ([9, 0, 0, 0], 8, None, r"q_lens=\[9, 0, 0, 0\] must be in \[0, 8\]"),
    ([1, -1, 0, 0], 8, None, r"q_lens=\[1, -1, 0, 0\] must be in \[0, 8\]"),
    ([1, 4, 0, 0], 8, 3, r"q_lens=\[1, 4, 0, 0\] must be in \[0, 3\]"),
    ([1, 2, 0, 0], 4, 1, r"q_lens=\[1, 2, 0, 0\] must be in \[0, 1\]"),
    ([1, 1, 0, 0], 8, 1, "num_tokens=8 must be num_rows=4"),
    ([0, 0, 0, 0], 0, None, r"num_tokens=0 must be in \[1, "),
    ([0, 0, 0, 0], 2**40, None, r"num_tokens=1099511627776 must be in \[1, "),
    ([0, 0, 0, 0], 8.0, None, "num_tokens=8.0 must be a Python integer"),
    ([0, 0, 0, 0], 8, 0, r"max_q_len=0 must be in \[1, "),
    ([0, 0, 0, 0], 8, True, "max_q_len=True must be a Python integer"),
  ],
)
def test_lengths_that_are_known_and_do_not_fit_are_named(
  q_lens, num_tokens, max_q_len, message
):
  q_lens = jnp.asarray(q_lens, jnp.int32)
  with pytest.raises(ValueError, match=message):
    begin_step(empty(), q_lens, num_tokens, max_q_len=max_q_len)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("q_lens", "rows", "message"),
  [
    (np.ones(3, np.int32), None, r"q_lens must have shape \(4,\)"),
    (np.ones(4, np.float32), None, "q_lens must be integers"),
    (np.ones(2, np.int32), np.zeros(3, np.int32), r"q_lens .* shape \(3,\)"),
    (np.ones(2, np.int32), np.zeros(2, np.float32), "rows must be integers"),
    (np.ones(2, np.int32), np.zeros((2, 1), np.int32), "rows must have shape"),
    (np.ones(5, np.int32), np.zeros(5, np.int32), r"rows.shape=\(5,\)"),
  ],
)
def test_wrong_lengths_and_rows_are_named(q_lens, rows, message):
  with pytest.raises(ValueError, match=message):
    begin_step(empty(), q_lens, 8, rows=rows)


@pytest.mark.parametrize(
  "mask", [np.ones((7, 3), bool), np.ones((8, 3), np.int32), np.ones(8, bool)]
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_tree_mask_that_does_not_fit_is_named(mask):
  with pytest.raises(ValueError, match=r"tree_mask must be bool\[8, max_new\]"):
    begin_step(empty(), np.ones(4, np.int32), 8, tree_mask=mask)


def test_numbers_of_64_bits_do_not_wrap_around():
  with jax.enable_x64(True):
    rows = jnp.array([2**32 + 1, 0])
    cache, step = begin_step(empty(), jnp.array([1, 1]), 8, rows=rows)
  assert step.ok.tolist() == [False, True]
  assert cache.kv_lens.tolist() == [1, 0, 0, 0]


def test_a_tree_mask_is_carried():
  _, step = begin(empty(), [3, 1, 0, 2], [0, 1, 2, 3], SHORT)
  np.testing.assert_array_equal(step.tree_mask, TREE)
  assert begin(empty(), [3, 1, 0, 2])[1].tree_mask is None
