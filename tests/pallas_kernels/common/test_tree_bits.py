"""Tree masks as bits of words, compared with the masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import tree_bits

CU_Q_LENS = [0, 3, 3, 10, 40, 45]  # the last is inactive; 2 tokens follow
NUM_ACTIVE, NUM_TOKENS = 4, 47


def _make(max_new):
  mask = np.random.default_rng(0).random((NUM_TOKENS, max_new)) < 0.3
  seqs = [slice(*CU_Q_LENS[i : i + 2]) for i in range(NUM_ACTIVE)]
  counts = np.zeros_like(mask)
  for seq in seqs:
    counts[seq, : seq.stop - seq.start] = True
  return mask, mask & counts, seqs


def _bits(words, num_bits):
  """Unpacks the words of the last axis."""
  shifts = np.arange(32)
  bits = np.asarray(words)[..., None] >> shifts & 1 != 0
  return bits.reshape(*words.shape[:-1], -1)[..., :num_bits]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("max_new", [1, 32, 33, 70])
def test_words_have_the_bits_of_tokens_and_of_sequences(max_new, window):
  mask, expected, seqs = _make(max_new)
  many = tree_bits.pack(
    jnp.asarray(mask),
    jnp.asarray(CU_Q_LENS, jnp.int32),
    jnp.int32(NUM_ACTIVE),
    window,
    group=2,
    more_rows=5,
  )
  words, before = np.asarray(many.of_rows[:-1]), np.asarray(many.of_rows[-1])
  assert not words[[0, -1]].any()
  bits = _bits(words[1:-1].T, max_new)
  np.testing.assert_array_equal(bits[:-5], np.repeat(expected, 2, axis=0))
  of_seqs = np.asarray(many.of_seqs)
  assert not of_seqs[:, [0, -1]].any()
  bits = _bits(of_seqs[:, 1:-1], max_new)
  for nth, seq in enumerate(seqs):
    q_len, num_seen = seq.stop - seq.start, expected[seq].sum(1)
    np.testing.assert_array_equal(bits[nth], expected[seq].any(0))
    np.testing.assert_array_equal(
      before[:-5].reshape(-1, 2)[seq].T, [q_len - num_seen] * 2
    )
    if q_len:
      fewest = 0 if window is None else min(num_seen.min(), window)
      assert many.num_earlier[nth] == q_len - fewest


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("max_new", [3, 8, 9])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_few_words_have_all_of_it(max_new, window):
  q_lens = [3, 0, 8, 1]
  mask = np.random.default_rng(1).random((4, 8, max_new)) < 0.5
  few = tree_bits.pack_few(
    jnp.asarray(mask), jnp.asarray(q_lens, jnp.int32), window
  )
  for seq, q_len in enumerate(q_lens):
    expected = mask[seq, :q_len, :q_len]
    num_bits = expected.shape[1]
    if not q_len:
      continue
    words = few.of_queries[seq, :q_len]
    nth = jnp.arange(num_bits, dtype=jnp.int32)
    bits = tree_bits.has(words[:, None], nth[None])
    np.testing.assert_array_equal(np.asarray(bits), expected)
    num_seen = expected.sum(1)
    np.testing.assert_array_equal(tree_bits.unseen(words), q_len - num_seen)
    of_seq = few.of_seqs[seq]
    np.testing.assert_array_equal(
      np.asarray(tree_bits.has(of_seq, nth)), expected.any(0)
    )
    fewest = 0 if window is None else min(num_seen.min(), window)
    assert tree_bits.unseen(of_seq) == q_len - fewest


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("size", [64, 128])
def test_aligned_words_have_the_bits_from_any_on(size):
  rng = np.random.default_rng(2)
  bits = rng.random((5, 70)) < 0.5
  packed = np.zeros((5, 5), np.uint32)  # three words between words of zeros
  for nth in range(70):
    packed[1 + nth // 32] |= bits[:, nth].astype(np.uint32) << np.uint32(
      nth % 32
    )
  packed = jnp.asarray(packed.view(np.int32))
  around = np.pad(bits, ((0, 0), (300, 300)))
  nth = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (5, size))
  for first in (-300, -129, -64, -33, -32, -31, -1, 0, 1, 31, 32, 69, 70, 150):
    words = tree_bits.aligned(
      lambda i: packed[i], len(packed), jnp.int32(first), size
    )
    np.testing.assert_array_equal(
      np.asarray(tree_bits.spread(words, nth, [0])),
      around[:, 300 + first : 300 + first + size],
    )
