"""Reads prompts in chunks, and returns the logits after them."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from paged_jax.generation import loop
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.step import begin_step
from paged_jax.models import contract
from paged_jax.models.contract import DecoderModel


def read(
  model: DecoderModel,
  cache: PagedCache,
  tokens: Int[Array, " num_tokens"],
  lens: Int[Array, " num_seqs"],
  *,
  chunk: int,
) -> tuple[PagedCache, Float[Array, "num_seqs vocab_size"]]:
  """Reads the prompts of a batch, in the chunks of `loop.prefill`.

  It samples nothing. The logits of all prompts are computed once, after the
  last chunk.

  Args:
    model: The model.
    cache: Empty, with room for all prompts.
    tokens: i32[num_tokens], all prompts, padded to a multiple of `chunk`.
    lens: i32[num_seqs], tokens of each prompt.
    chunk: Tokens of a step.

  Returns:
    The next cache, and the logits after the last token of each prompt.
  """
  ends = jnp.cumsum(lens, dtype=jnp.int32)
  like, _ = jax.eval_shape(lambda: model(tokens[:1], None, None))
  last = jnp.zeros((lens.shape[0], like.shape[-1]), like.dtype)

  def body(i, carry):
    cache, last = carry
    plan = loop.chunk_plan(tokens, ends, i, chunk)
    assert plan.tokens is not None
    assert plan.samples is not None
    cache, step = begin_step(cache, plan.q_lens, chunk)
    hidden, cache = contract.run(model, plan.tokens, cache, step)
    at_ends = hidden.at[step.cu_q_lens[1:] - 1].get(mode="clip")
    return cache, jnp.where(plan.samples[:, None], at_ends, last)

  num_chunks = (ends[-1] + chunk - 1) // chunk
  cache, last = lax.fori_loop(0, num_chunks, body, (cache, last))
  return cache, contract.logits(model, last)
