"""The demo model, compared with Hugging Face transformers in float32."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paged_jax import PagedCache, begin_step
from paged_jax.checkpoints import gguf
from paged_jax.generation import CacheConfig, SamplingParams, generate
from paged_jax.models import llama

pytestmark = [pytest.mark.model, pytest.mark.slow]

REFERENCE = json.loads(
  (pathlib.Path(__file__).parents[1] / "data/demo_reference.json").read_text()
)
NUM_NEW = 48
NAMES = [prompt["name"] for prompt in REFERENCE["prompts"]]


@pytest.fixture(scope="module")
def model(demo_path):
  checkpoint = gguf.load(demo_path)
  return llama.from_weights(
    checkpoint.config, checkpoint.weights, param_dtype=jnp.float32
  )


def _reference(name):
  return REFERENCE["prompts"][NAMES.index(name)]


def _greedy(model, names, **config):
  result = generate(
    model,
    [_reference(name)["prompt_token_ids"] for name in names],
    SamplingParams(max_new_tokens=NUM_NEW),
    cache=CacheConfig(**config),
  )
  return [list(completion.token_ids) for completion in result]


def test_a_ragged_batch_gives_the_tokens_of_transformers(model):
  assert len(NAMES) >= 8
  tokens = _greedy(model, NAMES)
  assert tokens == [_reference(name)["token_ids"] for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_each_prompt_alone_gives_the_tokens_of_transformers(model, name):
  # The same pool size for all, so that the decode loop is compiled once.
  tokens = _greedy(model, [name], num_pages=32, prefill_chunk=64)
  assert tokens == [_reference(name)["token_ids"]]


@jax.jit
def _forced_logits(model, cache, chunks, lens, forced):
  """Returns the logits after the prompt and after each forced token."""

  def read(cache, chunk):
    tokens, q_len = chunk
    cache, step = begin_step(cache, q_len[None], tokens.shape[0])
    hidden, cache = model(tokens, cache, step)
    return cache, hidden[q_len - 1]

  def force(cache, token):
    one = jnp.ones(1, jnp.int32)
    cache, step = begin_step(cache, one, 1, max_q_len=1)
    hidden, cache = model(token[None], cache, step)
    return cache, hidden[0]

  cache, ends = lax.scan(read, cache, (chunks, lens))
  _, rest = lax.scan(force, cache, forced)
  return model.logits(jnp.concatenate([ends[-1:], rest]))


@pytest.mark.parametrize(
  ("page_size", "chunk"), [(8, 1), (8, 64), (16, 7), (64, 1), (64, 64)]
)
def test_pages_and_chunks_do_not_change_the_logits(model, page_size, chunk):
  reference = REFERENCE["logits"]
  prompt = _reference(reference["prompt"])
  ids = prompt["prompt_token_ids"]
  config = CacheConfig(
    num_pages=256 // page_size,
    page_size=page_size,
    num_seqs=1,
    max_len=256,
    dtype=jnp.float32,
  )
  chunks = np.zeros((-(-len(ids) // chunk), chunk), np.int32)
  chunks.flat[: len(ids)] = ids
  lens = np.full(len(chunks), chunk, np.int32)
  lens[-1] = len(ids) - chunk * (len(chunks) - 1)
  logits = _forced_logits(
    model,
    PagedCache.init(model.layers, config),
    jnp.asarray(chunks),
    jnp.asarray(lens),
    jnp.asarray(prompt["token_ids"][:-1], jnp.int32),
  )
  logits = np.asarray(logits)
  assert logits.argmax(-1).tolist() == prompt["token_ids"]
  for row in reference["rows"]:
    ours = logits[row["step"]]
    expected = np.array(row["first"])
    np.testing.assert_allclose(
      ours[: expected.size], expected, rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(ours.max(), row["max"], rtol=0, atol=1e-4)
