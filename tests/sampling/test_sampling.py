import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import sampling
from paged_jax.sampling import SamplingParams

LOGITS = np.array([2.0, 1.0, 0.5, -1.0, -4.0], np.float32)


def _softmax(logits):
  weights = np.exp(np.float64(logits) - np.max(logits))
  return weights / weights.sum()


def _draw(params, num=4000, logits=LOGITS):
  """Draws `num` successive tokens of one sequence."""
  arrays = sampling.stack([params])
  row = jnp.asarray(logits)[None]
  draw = lambda i: sampling.sample(row, arrays, i[None])[0]
  return np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(num, dtype=jnp.int32)))


def _assert_distribution(tokens, expected):
  """Asserts that frequencies are within five standard deviations."""
  expected = np.asarray(expected)
  counts = np.bincount(tokens, minlength=expected.size)
  assert not counts[expected == 0].any()
  spread = 5 * np.sqrt(expected * (1 - expected) / tokens.size)
  assert (np.abs(counts / tokens.size - expected) <= spread + 1e-9).all()


def test_temperature_zero_takes_the_most_likely_token():
  assert (_draw(SamplingParams(temperature=0.0, top_k=3), 16) == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature):
  tokens = _draw(SamplingParams(temperature=temperature))
  _assert_distribution(tokens, _softmax(LOGITS / temperature))


def test_top_k_keeps_the_k_most_likely():
  expected = np.append(_softmax(LOGITS[:2]), [0, 0, 0])
  _assert_distribution(
    _draw(SamplingParams(temperature=1.0, top_k=2)), expected
  )


def test_top_p_keeps_the_fewest_that_reach_it():
  # Probabilities are about 0.60, 0.22, 0.13, 0.03, 0.00.
  for top_p, kept in [(0.5, 1), (0.7, 2), (0.9, 3), (1.0, 5)]:
    expected = np.append(_softmax(LOGITS[:kept]), np.zeros(5 - kept))
    tokens = _draw(SamplingParams(temperature=1.0, top_p=top_p))
    _assert_distribution(tokens, expected)


def test_of_equal_logits_the_first_tokens_are_kept():
  equal = np.zeros(8, np.float32)
  for filters, kept in (
    (dict(top_p=0.5), 4),
    (dict(top_p=0.51), 5),
    (dict(top_k=3), 3),
    (dict(top_k=6, top_p=0.5), 3),
    (dict(top_k=2, min_p=1.0), 2),
    (dict(min_p=1.0), 8),
  ):
    tokens = _draw(SamplingParams(temperature=1.0, **filters), 400, equal)
    assert set(tokens.tolist()) == set(range(kept))


def test_top_p_counts_probability_within_top_k():
  # The first of the two tokens that top-k keeps has 0.73, more than top_p.
  tokens = _draw(SamplingParams(temperature=1.0, top_k=2, top_p=0.7))
  assert (tokens == 0).all()


def test_min_p_is_relative_to_the_top_probability():
  ratio = np.exp(LOGITS[2] - LOGITS[0])  # 0.22
  for min_p, kept in [(ratio * 1.01, 2), (ratio * 0.99, 3), (1.0, 1)]:
    expected = np.append(_softmax(LOGITS[:kept]), np.zeros(5 - kept))
    tokens = _draw(SamplingParams(temperature=1.0, min_p=float(min_p)))
    _assert_distribution(tokens, expected)


def test_a_draw_does_not_depend_on_other_rows():
  params = SamplingParams(temperature=0.9, top_k=4, seed=7)
  others = [
    SamplingParams(),
    dataclasses.replace(params, seed=8),
    SamplingParams(temperature=2.0, top_p=0.4),
  ]
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((4, 50)), jnp.float32)
  index = jnp.array([5, 1, 2, 3], jnp.int32)
  together = sampling.sample(logits, sampling.stack([params, *others]), index)
  alone = sampling.sample(logits[:1], sampling.stack([params]), index[:1])
  assert int(together[0]) == int(alone[0])


def test_seeds_and_positions_give_different_draws():
  tokens = [
    tuple(_draw(SamplingParams(temperature=1.0, seed=seed), 40))
    for seed in range(3)
  ]
  assert len(set(tokens)) == 3
  assert len(set(tokens[0])) > 1


def test_stop_tokens_are_each_rows_own():
  arrays = sampling.stack(
    [
      SamplingParams(stop_token_ids=(3, 5, 9)),
      SamplingParams(),
      SamplingParams(stop_token_ids=(0,)),
    ]
  )
  is_stop = lambda *tokens: sampling.is_stop(
    jnp.array(tokens, jnp.int32), arrays
  ).tolist()
  assert is_stop(9, 9, 9) == [True, False, False]
  assert is_stop(0, 0, 0) == [False, False, True]


@pytest.mark.parametrize(
  "params",
  [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1),
  ],
)
def test_an_infinite_logit_wins(params):
  assert (_draw(params, 20, [3.0, np.inf, 5.0]) == 1).all()
  # Of several, each may be drawn.
  tokens = _draw(params, 60, [np.inf, 7.0, np.inf])
  assert set(tokens.tolist()) == ({0, 2} if params.temperature else {0})


def test_rows_with_a_nan_are_found():
  logits = jnp.asarray(
    [[1, 2, 3], [1, np.nan, 3], [np.inf, 0, np.nan], [np.inf, -np.inf, 0]]
  )
  has_nan = jax.jit(sampling.has_nan)(logits)
  assert has_nan.tolist() == [False, True, True, False]


@pytest.mark.parametrize("temperature", [1e38, 1e39])
def test_a_huge_temperature_draws_no_masked_token(temperature):
  logits = jnp.asarray([-jnp.inf, -jnp.inf, 1.0, 0.0, 5.0])
  tokens = _draw(SamplingParams(temperature=temperature), 60, logits)
  assert set(np.unique(tokens).tolist()) == {2, 3, 4}


def test_a_tiny_temperature_takes_the_most_likely_token():
  for shift in (0, 40, -200):
    tokens = _draw(SamplingParams(temperature=1e-37), 8, 30 * LOGITS + shift)
    assert (tokens == 0).all()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(temperature=-0.1), "temperature=-0.1"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=-1), "top_k=-1"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(min_p=-1.0), "min_p=-1.0"),
    (dict(seed=-1), "seed=-1"),
    (dict(seed=1.5), "seed=1.5"),
    (dict(top_k=0.5), "top_k=0.5"),
    (dict(max_new_tokens="4"), "max_new_tokens='4'"),
    (dict(stop_token_ids=[5]), "stop_token_ids="),
    (dict(stop_token_ids=(43.9,)), "stop_token_ids=43.9"),
    (dict(stop_token_ids=(2**31,)), "stop_token_ids="),
    (dict(seed=2**32), "seed=4294967296"),
  ],
)
def test_parameters_out_of_range_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    SamplingParams(**changes)
