"""Compares the perplexity of the demo model on quantised and on float pages.

The model reads the start of a book chapter, chunk by chunk, through the cache:
every key and value that a token attends to comes from a page, including those
of its own chunk. Weights and computation are float32; queries are cast to the
dtype of float pages. Perplexity is the exponential of the mean loss of the next
token.

Runs on a CPU:

  python -m benchmarks.quantised

Results: benchmarks/results/cpu/quantised.json

The text is from chapter 3 of Darwin's Origin of Species (6th edition, 1872),
which is in the public domain.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import command, results
from benchmarks.harness.data import DATA
from paged_jax.checkpoints import demo, gguf
from paged_jax.kv import layout
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.config import CacheConfig
from paged_jax.kv.step import begin_step
from paged_jax.models import contract, llama
from pallas_kernels.common.rounding import cdiv

TEXT = DATA / "darwin_origin_of_species_1872_chapter_3.txt"
BASELINE = "bfloat16"
DTYPES = ("float32", BASELINE, "int8", "float8_e4m3fn")
GOALS = {"int8": 1.0, "float8_e4m3fn": 2.0}  # most percent off the baseline
CHUNK = 64
PAGE_SIZE = 16
NUM_TOKENS = 4097  # tokens of the text; the first has no loss


def main() -> None:
  """Measures the perplexity for every dtype and writes the record."""
  parser = command.parser("quantised", __doc__)
  parser.add_argument("--model", default="demo", help="`demo` or a GGUF file")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # the results are of a CPU
  path = demo.resolve(args.model)
  checkpoint = gguf.load(path)
  tokens = checkpoint.tokenizer.encode(text())[:NUM_TOKENS]
  model = llama.from_weights(
    checkpoint.config, checkpoint.weights, param_dtype=jnp.float32
  )
  losses = {}
  for dtype in DTYPES:
    losses[dtype] = token_losses(model, tokens, dtype)
    print(dtype, math.exp(losses[dtype].mean()), flush=True)
  record = {
    "environment": results.environment(
      ["jax", "jaxlib", "flax", "numpy"], on_cpu=True
    ),
    "settings": settings(path.name),
    "pages": figures(model.config, losses),
  }
  print(json.dumps(record["pages"], indent=1))
  print("written to", results.save("cpu", "quantised", record))


def settings(model: str) -> dict:
  """Returns the settings that the figures depend on."""
  return dict(
    model=model,
    text=TEXT.name,
    num_tokens=NUM_TOKENS,
    chunk=CHUNK,
    page_size=PAGE_SIZE,
    dtype="float32",
  )


def text() -> str:
  """Returns the text, with one line for each paragraph."""
  paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
  return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def token_losses(
  model: llama.Llama, tokens: list[int], dtype: str, chunk: int = CHUNK
) -> np.ndarray:
  """Returns the loss of each token except the first, in nats.

  Args:
    model: The model.
    tokens: Tokens of one text, at least two.
    dtype: Dtype of the pages.
    chunk: Tokens per step.
  """
  inputs, targets = np.array(tokens[:-1]), np.array(tokens[1:])
  config = CacheConfig(
    num_pages=cdiv(len(inputs), PAGE_SIZE),
    page_size=PAGE_SIZE,
    num_seqs=1,
    max_len=len(inputs),
    dtype=jnp.dtype(dtype),
  )
  cache = PagedCache.init(model.layers, config)
  losses = []
  for start in range(0, len(inputs), chunk):
    part = slice(start, start + chunk)
    num_real = len(inputs[part])
    padded = np.zeros((2, chunk), np.int32)
    padded[:, :num_real] = inputs[part], targets[part]
    q_lens = jnp.asarray([num_real], jnp.int32)
    cache, loss = _step(model, cache, *jnp.asarray(padded), q_lens)
    losses.append(np.asarray(loss, np.float64)[:num_real])
  return np.concatenate(losses)


@functools.partial(jax.jit, donate_argnames="cache")
def _step(model, cache, inputs, targets, q_lens):
  """Returns the next cache, and the loss of the token after each input."""
  cache, step = begin_step(cache, q_lens, len(inputs))
  hidden, cache = contract.run(model, inputs, cache, step)
  log_probs = jax.nn.log_softmax(contract.logits(model, hidden))
  return cache, -jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0]


def figures(config, losses: dict[str, np.ndarray]) -> dict:
  """Returns perplexity and memory for each dtype of the pages."""
  result = {}
  baseline = losses[BASELINE]
  for dtype, loss in losses.items():
    page_bytes = layout.page_bytes(
      config.num_layers,
      config.num_kv_heads,
      PAGE_SIZE,
      config.head_dim,
      jnp.dtype(dtype),
    )
    result[dtype] = {
      "perplexity": math.exp(loss.mean()),
      "percent_above_bfloat16": 100 * math.expm1((loss - baseline).mean()),
      "mean_change_of_loss": float(np.abs(loss - baseline).mean()),
      "bytes_per_token": page_bytes / PAGE_SIZE,
    }
  return result


if __name__ == "__main__":
  main()
