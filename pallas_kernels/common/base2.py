"""The online softmax in base 2, for queries in rows or in columns.

The state of a query is the maximum score m, the sum l of 2^(s - m), and
acc = sum 2^(s - m) v. Decode keeps queries in the columns of its tiles, ragged
keeps them in the rows. Therefore both pass a function that multiplies acc by
one factor per query.

Masked scores are -inf. A query that has seen only masked scores has m = -inf;
then 0 is subtracted from its scores instead of m, because -inf - -inf is NaN.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common.spec import MAX_SLOPE

LOG2_E = math.log2(math.e)


# An array, or a tuple of its row blocks (see `decode.softmax.row_blocks`).
type Acc = Array | tuple[Array, ...]


class Softmax(NamedTuple):
  """The softmax state over the keys folded in so far; l is fully reduced."""

  acc: Acc
  m: Array  # f32[num_queries]
  l: Array  # f32[num_queries]


def to_base_2(qk, scale: float, logits_soft_cap: float | None):
  """Returns the scores of dot products q k: scaled, capped, in base 2.

  Args:
    qk: f32, dot products.
    scale: Factor of the dot products.
    logits_soft_cap: See `paged_jax.paged_attention`.
  """
  if logits_soft_cap is None:
    return qk * (scale * LOG2_E)
  # tanh x = 1 - 2 / (1 + e^2x). The hardware's tanh has an error of 5e-4, which
  # is an error of 0.025 in a score with a cap of 50.
  e = jnp.exp2(qk * (2 * LOG2_E * scale / logits_soft_cap))
  return (1 - 2 / (1 + e)) * (logits_soft_cap * LOG2_E)


def logits_to_base_2(logits: Array) -> Array:
  """Returns natural logits converted to base 2, in f32.

  Args:
    logits: Of any shape and dtype.
  """
  return logits.astype(jnp.float32) * LOG2_E


def slopes_to_base_2(slopes: Array) -> Array:
  """Returns ALiBi slopes in base 2, clamped so that biases stay finite.

  Args:
    slopes: Of any shape and dtype.
  """
  return jnp.clip(logits_to_base_2(slopes), -MAX_SLOPE, MAX_SLOPE)


def or_zero(m):
  """Returns maximum scores, with 0 in place of -inf.

  Args:
    m: f32[num_queries].
  """
  return jnp.where(m == -jnp.inf, 0.0, m)


def half_factor(difference):
  """Returns 2^(difference / 2), to be multiplied twice.

  With value scales, m of two states may differ by 100 and more. Then
  2^difference underflows although l times 2^difference does not.

  Args:
    difference: f32, m of a state minus the new m; at most 0.
  """
  return jnp.exp2(difference * 0.5)


def merge(
  states: Sequence[Softmax],
  scale_acc: Callable,
  add: Callable,
  *,
  far_apart: bool,
) -> Softmax:
  """Returns the softmax state over the keys of all states, folded in order.

  Args:
    states: States of the same queries over disjoint sets of keys.
    scale_acc: Multiplies acc by one factor per query.
    add: Adds two acc.
    far_apart: Whether m of two states may differ so much that a factor
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
    state: The softmax state over all keys.
    sinks: f32[num_queries], logits in base 2 that are added to the denominator
      only; or None. They do not count for queries that have seen no key.
    scale_acc: Multiplies acc by one factor per query.

  Returns:
    acc / l, and f32[num_queries]; 0 and -inf for queries that have seen no key.
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
