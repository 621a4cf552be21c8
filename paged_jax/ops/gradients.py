"""A clear error for gradients through ops on pages, which have none."""

import functools

import jax
import jax.numpy as jnp


def without_gradient[T](operands: T, op: str) -> T:
  """Returns operands whose derivative raises a `NotImplementedError`.

  Kernels have no derivative, and plain JAX loops over as many pages as lengths
  say, which JAX cannot reverse. A model trains without a cache.

  Args:
    operands: A pytree of arrays.
    op: Name of the op, for the message.
  """
  refuse = lambda x: (
    _identity(op, x) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )
  return jax.tree.map(refuse, operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(op, x):
  del op
  return x


@_identity.defjvp
def _refuse(op, primals, tangents):
  del primals, tangents
  raise NotImplementedError(
    f"{op} has no gradient. To train a model, call it with cache=None and "
    "step=None: it then computes causal attention that can be differentiated."
  )
