"""Records the parents of beams, in real beam searches on the demo model.

Width 4, by the sum of log-probabilities, without a length penalty: each step
keeps the best 4 of all continuations of the 4 beams. Tokens that end a reply
are left out, so that every beam runs to the last step. All searches run in one
batch over one paged cache, whose rows `kv.cache.permute` reorders.

  python -m benchmarks.waste.record_beams

writes benchmarks/data/beam_parents.json, which `benchmarks.waste` replays. The
scores of the best beams are compared with those of one pass of the model over
their whole text.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.data import DATA
from benchmarks.harness.prompts import read
from paged_jax.checkpoints import demo, gguf
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.config import CacheConfig
from paged_jax.kv.step import begin_step
from paged_jax.models import llama
from pallas_kernels.common.rounding import round_up

WIDTH = 4
NUM_NEW = 96
PAGE_SIZE = 16
MAX_LEN = 320
CHUNK = 64
PATH = DATA / "beam_parents.json"

QUESTIONS = (
  "Why is the sky blue at noon and red at sunset?",
  "Write a short story about a lighthouse keeper who finds a letter.",
  "Explain to a child of ten how a computer remembers things when it is "
  "switched off, and why it forgets some things and not others.",
  "Summarise this in two sentences: The harbour was built in the twelfth "
  "century, when the river still reached the old town. Ships brought wool, "
  "salt and timber, and the tolls paid for the walls. When the river silted "
  "up, the merchants moved to the coast, the warehouses became workshops, and "
  "the quay became a street that floods in wet winters.",
  "Write a Python function that returns the n-th Fibonacci number, and say "
  "how long it takes.",
  "Translate into French, then say which word was hardest: The old clock in "
  "the hall has not struck the hour since my grandmother wound it for the "
  "last time.",
  "I have eggs, rice, two tomatoes, half an onion, a lemon and some stale "
  "bread. I am cooking for three people, one of whom does not eat eggs, and "
  "there is only one pan. What can I make in half an hour? Give the steps in "
  "order, with times, and say what can be done while something else cooks.",
  "A train leaves at 9:40 and travels 210 km at 84 km/h. It waits 12 minutes "
  "at a station on the way. A second train leaves the same town at 10:05 on "
  "the same line, does not stop, and travels at 96 km/h. When does each "
  "arrive, which one is first, and by how many minutes? If the first train "
  "waited 20 minutes and not 12, what would change? Show every step of the "
  "calculation and check the result by a second way of working it out. Then "
  "write the answer again as a table with one line for each train.",
)


def main() -> None:
  """Searches, checks the scores, and writes the parents."""
  path = demo.fetch()
  checkpoint = gguf.load(path)
  model = llama.from_weights(
    checkpoint.config, checkpoint.weights, param_dtype=jnp.float32
  )
  tokenizer = checkpoint.tokenizer
  prompts = [_prompt(tokenizer, question) for question in QUESTIONS]
  parents, tokens, scores = search(model, prompts, tokenizer.stop_token_ids)
  for i, prompt in enumerate(prompts):
    best = trace(parents[i], tokens[i], beam=0)
    again = _score(model, prompt, best, tokenizer.stop_token_ids)
    if abs(again - scores[i, 0]) > 1e-2:
      raise RuntimeError(f"prompt {i}: {scores[i, 0]} is {again} in one pass.")
    print(len(prompt), scores[i].tolist(), again, tokenizer.decode(best)[:70])
  record = {
    "model": path.name,
    "search": "width 4, sum of log-probabilities, no end tokens",
    "prompt_lens": [len(prompt) for prompt in prompts],
    # Parent beam in the previous step, by prompt, step and beam. In the first
    # step, all parents are beam 0, which is the prompt.
    "parents": parents.tolist(),
  }
  PATH.write_text(json.dumps(record) + "\n")


def search(
  model: llama.Llama, prompts: list[list[int]], stop_ids: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Runs one search for each prompt, all in one batch.

  Returns:
    i32[num_prompts, NUM_NEW, WIDTH] parents, the tokens of the same shape, and
    f32[num_prompts, WIDTH] scores at the end, the best first.
  """
  num_prompts = len(prompts)
  cache = _new_cache(model, num_prompts * WIDTH)
  lens = np.zeros(num_prompts * WIDTH, np.int32)
  lens[::WIDTH] = [len(prompt) for prompt in prompts]
  flat = np.zeros(round_up(int(lens.sum()), CHUNK), np.int32)
  flat[: lens.sum()] = np.concatenate(prompts)
  prefill = jax.jit(read, static_argnames="chunk", donate_argnames="cache")
  cache, logits = prefill(
    model, cache, jnp.asarray(flat), jnp.asarray(lens), chunk=CHUNK
  )
  scores = np.full((num_prompts, WIDTH), -np.inf, np.float32)
  scores[:, 0] = 0  # the only beam so far
  scores, banned = jnp.asarray(scores), jnp.asarray(stop_ids, jnp.int32)
  steps = []
  for _ in range(NUM_NEW):
    cache, logits, scores, chosen = _step(model, cache, logits, scores, banned)
    steps.append(jax.device_get(chosen))
  parents, tokens = (
    np.stack(each, axis=1) for each in zip(*steps, strict=True)
  )
  return parents, tokens, np.asarray(scores)


@functools.partial(jax.jit, donate_argnames="cache")
def _step(model, cache, logits, scores, banned):
  """Chooses the next beams, reorders the rows, and decodes their tokens."""
  num_prompts = scores.shape[0]
  logprobs = _logprobs(logits, banned).reshape(num_prompts, WIDTH, -1)
  vocab_size = logprobs.shape[-1]
  total = (scores[..., None] + logprobs).reshape(num_prompts, -1)
  scores, chosen = jax.lax.top_k(total, WIDTH)
  parents, tokens = chosen // vocab_size, chosen % vocab_size
  group = jnp.arange(num_prompts, dtype=jnp.int32)[:, None] * WIDTH
  cache, _ = paged_cache.permute(cache, (group + parents).reshape(-1))
  num_rows = num_prompts * WIDTH
  one_each = jnp.ones(num_rows, jnp.int32)
  cache, step = begin_step(cache, one_each, num_rows, max_q_len=1)
  hidden, cache = model(tokens.reshape(-1), cache, step)
  return cache, model.logits(hidden), scores, (parents, tokens)


def trace(parents: np.ndarray, tokens: np.ndarray, beam: int) -> list[int]:
  """Returns the tokens that led to a beam of the last step."""
  found = []
  for step in range(len(parents) - 1, -1, -1):
    found.append(int(tokens[step, beam]))
    beam = int(parents[step, beam])
  return found[::-1]


def _score(model, prompt, new, stop_ids) -> float:
  """Returns the sum of log-probabilities of new tokens, from one pass."""
  ids = np.zeros(MAX_LEN, np.int32)
  ids[: len(prompt) + len(new)] = prompt + new
  hidden = _hidden(
    model,
    _new_cache(model, 1),
    jnp.asarray(ids),
    jnp.asarray([len(prompt) + len(new)], jnp.int32),
  )
  first = len(prompt) - 1
  logits = model.logits(hidden[first : first + len(new)])
  logprobs = _logprobs(logits, jnp.asarray(stop_ids, jnp.int32))
  return float(logprobs[jnp.arange(len(new)), jnp.asarray(new)].sum())


@jax.jit
def _hidden(model, cache, tokens, q_lens):
  cache, step = begin_step(cache, q_lens, tokens.shape[0])
  hidden, _ = model(tokens, cache, step)
  return hidden


def _logprobs(logits: jax.Array, banned: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits, axis=-1).at[:, banned].set(-jnp.inf)


def _prompt(tokenizer, question: str) -> list[int]:
  messages = [{"role": "user", "content": question}]
  return tokenizer.encode(tokenizer.apply_chat_template(messages))


def _new_cache(model: llama.Llama, num_seqs: int) -> PagedCache:
  config = CacheConfig(
    num_pages=num_seqs * (MAX_LEN // PAGE_SIZE),
    page_size=PAGE_SIZE,
    num_seqs=num_seqs,
    max_len=MAX_LEN,
    dtype=jnp.float32,
  )
  return PagedCache.init(model.layers, config)


if __name__ == "__main__":
  main()
