"""Streaming softmax of a wgmma tile, in registers, in base 2.

State of each of 64 rows: the greatest score m, the sum l of 2^(s - m), and
acc = sum 2^(s - m) v. A tile of scores s is folded in by

  m' = max(m, max s)    l' = 2^(m - m') l + sum 2^(s - m')
  acc' = 2^(m - m') acc + 2^(s - m') V

Masked scores are -inf. While a row has seen only those, m is -inf, and 0 is
subtracted in its place, so that it stays empty instead of turning into NaN.
"""

from typing import NamedTuple, cast

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.split_kv import LOG2_E

ROWS = 64  # of a wgmma tile


class State(NamedTuple):
  """The softmax over the keys folded in so far."""

  acc: Float[Array, "rows head_dim"]
  m: Float[Array, " rows"]
  l: Float[Array, " rows"]


def init(head_dim: int) -> State:
  """Returns the softmax over no keys."""
  by_row = plgpu.Layout.WGMMA.reduce(1)
  acc = jnp.zeros((ROWS, head_dim), jnp.float32)
  m = jnp.full((ROWS,), -jnp.inf, jnp.float32)
  l = jnp.zeros((ROWS,), jnp.float32)
  return State(
    plgpu.layout_cast(acc, plgpu.Layout.WGMMA),
    plgpu.layout_cast(m, by_row),
    plgpu.layout_cast(l, by_row),
  )


def to_base_2(qk, scale: float, logits_soft_cap: float | None):
  """Returns the scores of products q k: scaled, capped, in base 2."""
  if logits_soft_cap is None:
    return qk * (scale * LOG2_E)
  # tanh x = 1 - 2 / (1 + e^2x). The hardware's tanh errs by 5e-4, which a cap
  # of 50 makes 0.025.
  e = jnp.exp2(qk * (2 * LOG2_E * scale / logits_soft_cap))
  return (1 - 2 / (1 + e)) * (logits_soft_cap * LOG2_E)


def fold(state: State, s):
  """Returns the state but for the product P V, and P, of scores s."""
  m = jnp.maximum(state.m, s.max(axis=1))
  shift = jnp.where(m == -jnp.inf, 0.0, m)
  p = jnp.exp2(s - lax.broadcast_in_dim(shift, s.shape, [0]))
  alpha = jnp.exp2(state.m - shift)
  acc = state.acc * lax.broadcast_in_dim(alpha, state.acc.shape, [0])
  return State(acc, m, state.l * alpha + p.sum(axis=1)), p


def finish(state: State):
  """Returns the normalised output and the base-2 log-sum-exp."""
  acc, m, l = state
  inverse = jnp.where(l > 0, 1 / l, 0.0)
  out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
  return out, jnp.where(l > 0, m + jnp.log2(l), -jnp.inf)


def matmul(a, b):
  """Returns a @ b by wgmma, in f32; operands are in shared memory."""

  def issue(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = a.shape[0], b.shape[1]
  return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))


def accumulate(acc, a, b, *, interpreted: bool):
  """Returns acc + a @ b by wgmma, without a second accumulator."""
  if interpreted:  # the interpreter cannot start from a given accumulator
    return acc + matmul(a, b)
  accumulate_in = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))
  return cast(Array, accumulate_in(plgpu.ACC.init(acc)))
