"""The softmax of the ragged kernel, whose maximum grows only past a slack."""

import dataclasses

import cases
import jax.numpy as jnp
import numpy as np
import pytest
import ragged_runs

from pallas_kernels.common import base2
from pallas_kernels.ragged import softmax as ragged_softmax
from pallas_kernels.ragged.config import Config

SMALL = Config(64, 2, num_programs=2, num_q_stages=2)
SPLIT = dataclasses.replace(SMALL, num_programs=3, splits=True)
SLACK = ragged_softmax._SLACK


def _growing(growth, dtype):
  """Returns a Problem whose maximum scores grow by `growth` per tile, base 2.

  Scores of the first query head do; those of other heads grow less, or fall.
  Scores of some tokens, which fill the rows of a warp, do not change.
  """
  problem = cases.make(
    kv_lens=[210, 140], q_lens=[70, 3], num_q_heads=4, dtype=dtype
  )
  scale = cases.PLAIN["scale"] * base2.LOG2_E
  q, k = (np.array(x) for x in (problem.q, problem.k_pages))
  q[..., 0] = [1, 0.1, -1, 0.5]
  q[8:16, :, 0] = 0
  for seq, kv_len in enumerate(problem.kv_lens):
    for position in range(kv_len):
      page = problem.page_indices[seq, position // 16]
      k[page, :, position % 16, 0] = growth / scale * (position // 64)
  return dataclasses.replace(problem, q=q, k_pages=k)


# Growth by less than the slack, so that the maximum grows every other tile; by
# more; and by so much that P would overflow float16 if the maximum stayed.
@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("growth", [0.6 * SLACK, 1.1 * SLACK, 20])
def test_scores_that_grow_match_oracle(growth, config):
  problem = _growing(growth, "float16")
  sinks = np.asarray([-2, 0, 1, 5], np.float32)
  ragged_runs.check(problem, config=config, sinks=sinks)


def _weigh(before, scores):
  """Folds a tile of scores into the state of one key per row.

  `before` has the maximum of each row.
  """
  m = jnp.asarray(before, jnp.float32)
  ones = jnp.isfinite(m).astype(jnp.float32)
  l = jnp.zeros((len(before), 8), jnp.float32).at[:, 0].set(ones)
  s = jnp.asarray(scores, jnp.float32)
  m, l, alpha, p = ragged_softmax.fold_scores(m, l, s, 1.0)
  return (np.asarray(x) for x in (m, l.sum(1), alpha, p))


def test_the_maximum_grows_only_past_the_slack():
  tops = [SLACK, SLACK + 1, -30, -np.inf, 2, -np.inf]
  befores = [0, 0, 0, 0, -np.inf, -np.inf]
  scores = np.tile(np.asarray([-np.inf, 0] * 4) - 1, (len(tops), 1))
  scores += np.asarray(tops)[:, None] + 1
  m, l, alpha, p = _weigh(befores, scores)
  assert m.tolist() == [0, SLACK + 1, 0, 0, 2, -np.inf]
  assert (alpha == 1).tolist() == [True, False, True, True, False, True]
  assert alpha[1] == 2 ** -(SLACK + 1)
  assert alpha[4] == 0
  assert p.max() <= 2**SLACK
  sums = [1 + 4 * 2**SLACK, alpha[1] + 4, 1 + 4 * 2.0**-30, 1, 4, 0]
  np.testing.assert_allclose(l, sums, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("before", [-np.inf, 0])
def test_nan_and_inf_stay_nan(before, bad):
  scores = np.zeros((1, 8))
  scores[0, 3] = bad
  m, l, _, p = _weigh([before], scores)
  assert np.isnan(l).all()
  assert np.isnan(p[0, 3])
  state = base2.Softmax(jnp.asarray(p), jnp.asarray(m), jnp.asarray(l))
  empty = base2.Softmax(jnp.zeros_like(p), jnp.full(1, -jnp.inf), jnp.zeros(1))
  for merged in (
    ragged_softmax.merge(state, empty),
    ragged_softmax.merge(empty, state),
  ):
    assert np.isnan(ragged_softmax.finish(merged, None)[1]).all()
