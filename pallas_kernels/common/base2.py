"""The streaming softmax in base 2, whatever axis the queries are on.

The state of a query is the greatest score m, the sum l of 2^(s - m), and
acc = sum 2^(s - m) v. Decode has the queries in the columns of its tiles and
prefill in the rows: both hand in how acc is multiplied by a factor for each
query.

Masked scores are -inf. While a query has seen only those, m is -inf, and 0 is
subtracted in its place, so that it stays empty instead of turning into NaN.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.spec import MAX_SLOPE

LOG2_E = math.log2(math.e)


# One array, or blocks of one (see `decode.softmax.row_blocks`).
type Acc = Array | tuple[Array, ...]


class Softmax(NamedTuple):
  """The softmax over the keys folded in so far, summed over the keys."""

  acc: Acc
  m: Array  # f32[num_queries]
  l: Array  # f32[num_queries]


def to_base_2(qk, scale: float, logits_soft_cap: float | None):
  """Returns the scores of products q k: scaled, capped, in base 2."""
  if logits_soft_cap is None:
    return qk * (scale * LOG2_E)
  # tanh x = 1 - 2 / (1 + e^2x). The hardware's tanh errs by 5e-4, which a cap
  # of 50 makes 0.025.
  e = jnp.exp2(qk * (2 * LOG2_E * scale / logits_soft_cap))
  return (1 - 2 / (1 + e)) * (logits_soft_cap * LOG2_E)


def logits_to_base_2(logits: Array) -> Array:
  """Returns logits of query heads, as f32 in base 2."""
  return logits.astype(jnp.float32) * LOG2_E


def slopes_to_base_2(slopes: Array) -> Array:
  """Returns slopes of ALiBi, clamped so that products stay finite."""
  return jnp.clip(logits_to_base_2(slopes), -MAX_SLOPE, MAX_SLOPE)


def or_zero(m):
  """Returns greatest scores, 0 where nothing was seen."""
  return jnp.where(m == -jnp.inf, 0.0, m)


def half_factor(difference):
  """Returns the square root of 2^difference.

  With scales of values, m of two states may be 2^100 apart: l times
  2^difference is a number, though 2^difference alone underflows.
  """
  return jnp.exp2(difference * 0.5)


def merge(
  states: Sequence[Softmax],
  scale_acc: Callable,
  add: Callable,
  *,
  far_apart: bool,
) -> Softmax:
  """Returns the softmax over the keys of all states, folded in order.

  Args:
    states: Of the same queries, over different keys.
    scale_acc: Multiplies acc by a factor for each query.
    add: Adds two acc.
    far_apart: Whether m of two states may differ by so much that a factor
      underflows; see `half_factor`.
  """
  top = functools.reduce(jnp.maximum, [state.m for state in states])
  shift = or_zero(top)
  alphas = [jnp.exp2(state.m - shift) for state in states]
  scaled = [
    scale_acc(state.acc, alpha)
    for state, alpha in zip(states, alphas, strict=True)
  ]
  if far_apart:
    roots = [half_factor(state.m - shift) for state in states]
    ls = [s.l * root * root for s, root in zip(states, roots, strict=True)]
  else:
    ls = [s.l * alpha for s, alpha in zip(states, alphas, strict=True)]
  return Softmax(
    functools.reduce(add, scaled), top, functools.reduce(jnp.add, ls)
  )


def finish(
  state: Softmax, sinks: Array | None, scale_acc: Callable
) -> tuple[Acc, Array]:
  """Returns the normalised output and the natural log-sum-exp.

  Args:
    state: The softmax over all keys.
    sinks: f32[num_queries], a logit in base 2 that only the denominator
      counts, or None. What has seen no key stays empty.
    scale_acc: Multiplies acc by a factor for each query.
  """
  acc, m, l = state
  sees = l != 0  # NaN must not count as empty
  if sinks is not None:
    top = or_zero(jnp.maximum(m, sinks))
    alpha = jnp.exp2(m - top)
    acc = scale_acc(acc, alpha)
    l = jnp.where(sees, l * alpha + jnp.exp2(sinks - top), 0.0)
    m = top
  inverse = jnp.where(sees, 1 / l, 0.0)
  lse = jnp.where(sees, (m + jnp.log2(l)) * (1 / LOG2_E), -jnp.inf)
  return scale_acc(acc, inverse), lse
