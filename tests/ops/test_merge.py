"""Merging attention over parts of the keys, compared with the oracle."""

import itertools

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax

HEADS = 4
SINKS = np.array([-1, 0, 2, 30], np.float32)


def _parts(cuts, *, dtype="float32", scale=0.3, sinks=None, num_tokens=5):
  """Returns output and LSE of each part between cuts, and those of all keys.

  The first token sees no key, the second none past the first cut.
  """
  rng = np.random.default_rng(0)
  length, head_dim = cuts[-1], 64
  q = rng.standard_normal((num_tokens, HEADS, head_dim))
  keys, values = rng.standard_normal((2, length, 2, head_dim))
  seen = np.ones((num_tokens, length), bool)
  seen[0], seen[1, cuts[1] :] = False, False

  def attend(start, end, sinks=None):
    inside = (start <= np.arange(length)) & (np.arange(length) < end)
    pairs = [
      oracle.attend_one(
        q[i], keys, values, seen[i] & inside, scale=scale, sinks=sinks
      )
      for i in range(num_tokens)
    ]
    return [np.stack(x) for x in zip(*pairs, strict=True)]

  parts = []
  for start, end in itertools.pairwise(cuts):
    out, lse = attend(start, end)
    parts.append((jnp.asarray(out, dtype), jnp.asarray(lse, jnp.float32)))
  return parts, attend(0, length, sinks)


@pytest.mark.slow(quick=6)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize(
  "cuts", [(0, 40), (0, 30, 40), (0, 1, 2, 39, 40), (0, 0, 40, 40)], ids=str
)
def test_parts_make_the_whole(cuts, sinks, dtype):
  parts, expected = _parts(cuts, dtype=dtype, sinks=sinks)
  given = None if sinks is None else jnp.asarray(sinks)
  out, lse = paged_jax.merge_attention(*parts, sinks=given)
  assert out.dtype == dtype
  assert lse.dtype == jnp.float32
  cases.assert_matches(out, lse, *expected, dtype)


# Logits of thousands: their exponentials alone are 0 or Inf.
@pytest.mark.parametrize("scale", [300.0, -1000.0])
def test_logits_may_be_of_any_magnitude(scale):
  parts, (expected, expected_lse) = _parts((0, 13, 40), scale=scale)
  out, lse = paged_jax.merge_attention(*parts)
  # In float32, LSEs in the thousands have an error of up to 1e-3.
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
  assert cases.relative_error(out, expected) < 1e-3


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_that_saw_nothing_leaves_no_trace(dtype, rubbish):
  (part,), _ = _parts((0, 40), dtype=dtype)
  nothing = (
    jnp.full_like(part[0], rubbish),
    jnp.full_like(part[1], -jnp.inf),
  )
  for parts in ((part,), (nothing, part), (nothing, part, nothing)):
    for merged, alone in zip(
      paged_jax.merge_attention(*parts), part, strict=True
    ):
      np.testing.assert_array_equal(np.asarray(merged), np.asarray(alone))
  for sinks in (None, jnp.asarray(SINKS)):
    out, lse = paged_jax.merge_attention(nothing, nothing, sinks=sinks)
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()


def test_a_part_that_is_not_finite_shows():
  parts, _ = _parts((0, 13, 40))
  out, lse = parts[0]
  spoilt = out.at[2, 1].set(jnp.nan)
  merged, _ = paged_jax.merge_attention((spoilt, lse), parts[1])
  bad = np.isnan(np.asarray(merged)).all(-1)
  assert np.argwhere(bad).tolist() == [[2, 1]]


def _bad(**changes):
  """Returns a valid part and one with changes."""
  (part,), _ = _parts((0, 40))
  names = dict(zip(("out", "lse"), part, strict=True))
  for name, change in changes.items():
    names[name] = change(names[name])
  return part, tuple(names.values())


BAD = {
  "dtypes": (
    dict(out=lambda x: x.astype(jnp.float16)),
    r"parts\[1\]\[0\].dtype=float16",
  ),
  "shapes": (
    dict(out=lambda x: x[:2], lse=lambda x: x[:2]),
    r"parts\[1\]\[0\].shape=\(2, 4, 64\)",
  ),
  "dtype of lse": (
    dict(lse=lambda x: x.astype(jnp.float16)),
    r"parts\[1\]\[1\].dtype=float16",
  ),
  "shape of lse": (
    dict(lse=lambda x: x[..., None]),
    r"parts\[1\]\[1\].shape=\(5, 4, 1\)",
  ),
  "no array": (
    dict(lse=lambda x: 0.0),
    r"parts\[1\]\[1\] must be an array",
  ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_parts_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    paged_jax.merge_attention(*_bad(**changes))


@pytest.mark.usefixtures("unchecked_shapes")
def test_parts_that_are_no_pairs_are_named():
  (out, lse), _ = _bad()
  for parts in (((out, lse, lse),), ((out,),), (out, lse)):
    with pytest.raises(ValueError, match=r"parts\[0\] must be a pair"):
      paged_jax.merge_attention(*parts)


@pytest.mark.usefixtures("unchecked_shapes")
def test_something_must_be_merged_and_sinks_must_fit():
  with pytest.raises(ValueError, match="parts is empty"):
    paged_jax.merge_attention()
  integers = _bad(out=lambda x: x.astype(jnp.int32))[1]
  with pytest.raises(ValueError, match=r"parts\[0\]\[0\].dtype=int32"):
    paged_jax.merge_attention(integers)
  part, _ = _bad()
  with pytest.raises(ValueError, match=r"sinks.shape=\(3,\)"):
    paged_jax.merge_attention(part, sinks=jnp.zeros(3))
