"""Streaming softmax in registers, in base 2, with queries down and keys across.

The turned one of `online_softmax`: many queries fill the 64 rows of wgmma, so
that P stays in registers as the left operand of P V. The state of each row is
the greatest score m, the sum l of 2^(s - m), and acc = sum 2^(s - m) v.
"""

from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import online_softmax
from pallas_kernels.online_softmax import LOG2_E, or_zero

QUERIES = plgpu.Layout.WGMMA.reduce(1)


class State(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Float[Array, "rows head_dim"]
  m: Float[Array, " rows"]
  l: Float[Array, " rows"]


def init(rows: int, head_dim: int) -> State:
  """Returns the softmax over no keys."""
  vector = lambda value: plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), QUERIES
  )
  acc = online_softmax.tile(0.0, (rows, head_dim))
  return State(acc, vector(-jnp.inf), vector(0.0))


def across(values, shape: tuple[int, ...]):
  """Returns values of queries, repeated along a tile."""
  return lax.broadcast_in_dim(values, shape, [0])


def fold(state: State, s, factor: float):
  """Returns the state but for the product P V, and P.

  Args:
    state: the softmax so far.
    s: scores of a tile, which times `factor` are in base 2.
    factor: not negative.
  """
  m = jnp.maximum(state.m, s.max(axis=1) * factor)
  shift = or_zero(m)
  p = jnp.exp2(s * factor - across(shift, s.shape))
  alpha = jnp.exp2(state.m - shift)
  acc = state.acc * across(alpha, state.acc.shape)
  return State(acc, m, state.l * alpha + p.sum(axis=1)), p


def merge(a: State, b: State) -> State:
  """Returns the softmax over the keys of both."""
  m = jnp.maximum(a.m, b.m)
  shift = or_zero(m)
  of_a, of_b = jnp.exp2(a.m - shift), jnp.exp2(b.m - shift)
  shape = a.acc.shape
  acc = a.acc * across(of_a, shape) + b.acc * across(of_b, shape)
  return State(acc, m, a.l * of_a + b.l * of_b)


def finish(state: State, sinks):
  """Returns the normalised output and the natural log-sum-exp.

  Args:
    state: the softmax over all keys.
    sinks: f32[rows], a logit in base 2 that only the denominator counts, or
      None. What has seen no key stays empty.
  """
  acc, m, l = state
  sees = l != 0  # NaN is no emptiness
  if sinks is not None:
    top = or_zero(jnp.maximum(m, sinks))
    alpha = jnp.exp2(m - top)
    acc *= across(alpha, acc.shape)
    l = jnp.where(sees, l * alpha + jnp.exp2(sinks - top), 0.0)
    m = top
  inverse = jnp.where(sees, 1 / l, 0.0)
  lse = jnp.where(sees, (m + jnp.log2(l)) * (1 / LOG2_E), -jnp.inf)
  return acc * across(inverse, acc.shape), lse


def matmul(operands, after_issue=lambda: None):
  """Returns the sum of products a @ b by wgmma, in f32.

  Args:
    operands: pairs of a and b, in shared memory.
    after_issue: called while they are multiplied.
  """

  def issue(acc):
    for a, b in operands:
      plgpu.wgmma(acc, a, b)
    after_issue()
    return acc[...]

  return pl.run_scoped(issue, _product_of(operands))


def _product_of(operands):
  (a, b), *_ = operands
  return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def accumulate(acc, p, v, *, interpreted: bool):
  """Returns acc + p @ v by wgmma.

  Args:
    acc: f32.
    p: in registers or in shared memory.
    v: in shared memory.
    interpreted: whether there is no GPU.
  """
  return online_softmax.accumulate(acc, p, v, interpreted=interpreted)


def accumulate_and_matmul(
  acc, p, v, operands, *, after_issue, after_first, interpreted: bool
):
  """Returns acc + p @ v, and then `matmul(operands)`, without a pause.

  Args:
    acc: see `accumulate`.
    p: see `accumulate`.
    v: see `accumulate`.
    operands: see `matmul`.
    after_issue: called while they are multiplied.
    after_first: called when the first product is there.
    interpreted: see `accumulate`.
  """
  if interpreted:  # the interpreter cannot start from a given accumulator
    acc = accumulate(acc, p, v, interpreted=interpreted)
    after_first()
    return acc, matmul(operands, after_issue)

  def multiply(acc_ref):
    acc_ref[...] = acc
    plgpu.wgmma(acc_ref, p, v)

    def multiply_next(product_ref):
      for a, b in operands:
        plgpu.wgmma(product_ref, a, b)
      after_issue()
      out = plgpu.wgmma_accumulator_load(acc_ref, wait_n=len(operands))
      after_first()
      return out, product_ref[...]

    return pl.run_scoped(multiply_next, _product_of(operands))

  return pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))
