"""Measures prefill of a model on a GPU, in tokens per second.

  ceiling  one large product of bfloat16 matrices: the peak rate of the GPU
  mixed    attention alone: 64 sequences that decode and 2 prompt chunks in one
           call, compared with one call for each kind
  model    16 prompts of 4,096 tokens through a Llama with 8 billion random
           parameters, in chunks of several sizes, as in
           `paged_jax.generation.loop.prefill`; logits of the last tokens only

The FLOPs of the model are those of its products, the head's for the last tokens
only, and of the attention below the diagonal. Each call donates the cache and
fills it again. Times are those of a compiled program, measured on the host,
divided by the number of calls. Attention is compared with plain JAX before it
is timed, and the logits of every chunk size with those of the first.

  python -m benchmarks.prefill

Results: benchmarks/results/h200/prefill.json
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paged_jax
from benchmarks.harness import (
  command,
  device_loop,
  models,
  queries,
  results,
)
from benchmarks.harness.attention import (
  measured,
  no_attention,
  reference,
  relative_error,
)
from benchmarks.harness.batches import DTYPE, Batch
from benchmarks.harness.cases import attempt, failures
from benchmarks.harness.prompts import read
from benchmarks.harness.queries import Case
from benchmarks.harness.table import lines
from paged_jax.kv import cache as paged_cache
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.config import CacheConfig
from paged_jax.kv.layout import LayerKV
from paged_jax.models.config import LlamaConfig
from paged_jax.models.llama import Llama
from pallas_kernels.common.rounding import cdiv

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy"]
# A 32-layer model 256 wide: weights that change by 0.2 % give 0.03, one other
# token of 256 gives 0.7.
MAX_ERROR_OF_LOGITS = 0.1
COLUMNS = {
  "us": "{[median]:12.1f} us",
  "tflop_per_s": "{:7.0f} TFLOP/s",
  "percent_of_ceiling": "{:7.1f} %",
  "tokens_per_s": "{:9.0f} tokens/s",
  "mixed_to_sum": "  x {:.3f} of chunks and decodes",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases and of their loops."""

  config: LlamaConfig = models.LLAMA_8B
  implementation: str = "mosaic_gpu"  # in `mixed`; the model chooses its own
  page_size: int = 16
  num_prompts: int = 16
  prompt_len: int = 4096
  chunks: tuple[int, ...] = (8192, 65_536)  # tokens per step
  model_calls: int = 3
  ceiling: int = 8192  # rows and columns of each matrix
  chunk_lens: tuple[int, ...] = (2048, 2048)
  chunk_contexts: tuple[int, ...] = (2048, 2048)
  num_decodes: int = 64
  decode_len: int = 4096  # includes the query token
  steps: int = 200  # steps of a loop
  calls: int = 5  # calls of a loop


FULL = Sizes()
ALL_CHUNKS = dataclasses.replace(FULL, chunks=(8192, 65_536, 2048, 512))
SMALL = Sizes(
  config=dataclasses.replace(
    models.LLAMA_8B,
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
  ),
  implementation="xla",
  page_size=8,
  num_prompts=4,
  prompt_len=24,
  chunks=(32, 96),
  model_calls=2,
  ceiling=64,
  chunk_lens=(20, 7),
  chunk_contexts=(9, 0),
  num_decodes=3,
  decode_len=33,
  steps=2,
  calls=2,
)


def main() -> None:
  """Times all cases, prints the figures and writes the record."""
  args, environment = command.start_on_gpu(
    "prefill",
    __doc__,
    PACKAGES,
    flags={"all-chunks": "time the model with more sizes of chunks"},
  )
  full = ALL_CHUNKS if args.all_chunks else FULL
  record = results.keep(
    "prefill", records(SMALL if args.small else full), args, environment
  )
  command.finish(failures(record))


def records(sizes: Sizes) -> Iterator[dict]:
  """Yields the record with all figures so far, after each part; prints them."""
  record: dict = {"settings": settings(sizes)}
  for part in (ceiling, mixed):
    record[part.__name__] = attempt(part, sizes)
    print(table({part.__name__: record[part.__name__]}), flush=True)
    yield record
  most = record["ceiling"].get("tflop_per_s")
  record["model"] = {}
  for chunk, figures in model(sizes):
    if most and "tflop_per_s" in figures:
      figures["percent_of_ceiling"] = 100 * figures["tflop_per_s"] / most
    record["model"][chunk] = figures
    print(table({"model": {chunk: figures}}), flush=True)
    yield record


def settings(sizes: Sizes) -> dict:
  """Returns the description of each figure."""
  return dataclasses.asdict(sizes) | dict(
    meaning=dict(
      us="microseconds of a call: of a loop of steps calls, divided by them",
      tflop_per_s="of the products, and of the attention that is seen",
      percent_of_ceiling="of the large product's TFLOP/s, by the medians",
      loop="what surrounds the calls of attention, in each of its figures",
      mixed_to_sum="mixed / (chunks + decodes - loop), by the medians",
      relative_error="to plain JAX; of logits, to those of the first chunks",
      temp_bytes="memory of the program beside the pool and the model",
    ),
    dtype=jnp.dtype(DTYPE).name,
    max_relative_error_of_logits=MAX_ERROR_OF_LOGITS,
  )


def table(record: dict) -> str:
  """Returns the figures as lines of text."""
  return lines(record, COLUMNS, width=24)


def ceiling(sizes: Sizes) -> dict:
  """Times the product of two large matrices."""
  shape = sizes.ceiling, sizes.ceiling
  x, w = (models.normal(jax.random.key(seed), shape, 1.0) for seed in range(2))

  # Waits for the previous step, so that XLA cannot hoist it out of the loop.
  def step(_, state, w):
    x, _ = lax.optimization_barrier(state)
    return x, jnp.dot(x, w)

  def verify(state):
    rows = (x[:8].astype(jnp.float32), w.astype(jnp.float32))
    relative_error(jnp.matmul(*rows, precision="highest"), state[1][:8])

  figures = device_loop.measure(
    step,
    (x, jnp.zeros_like(x)),
    sizes.steps,
    sizes.calls,
    verify,
    inputs=(w,),
  )
  figures["tflop_per_s"] = 2 * sizes.ceiling**3 / figures["us"]["median"] / 1e6
  return figures


def mixed(sizes: Sizes) -> dict:
  """Times decodes and prompt chunks, in one call and in one call for each."""
  case, num_chunks = mixed_case(sizes), len(sizes.chunk_lens)
  both = queries.make(case)
  chunks, decodes = split(both, num_chunks)
  ragged = functools.partial(
    paged_jax.ragged_paged_attention, implementation=sizes.implementation
  )
  decode = functools.partial(
    paged_jax.paged_attention, implementation=sizes.implementation
  )
  plain = functools.partial(
    paged_jax.ragged_paged_attention, implementation="xla"
  )
  expected = reference(plain, both)
  end = len(chunks.q)
  cases = {
    "loop": attempt(_timed, sizes, decodes, no_attention, None),
    "chunks": attempt(_timed, sizes, chunks, ragged, expected[:end]),
    "decodes": attempt(_timed, sizes, decodes, decode, expected[end:]),
    "mixed": attempt(_timed, sizes, both, ragged, expected),
  }
  if not failures(cases):
    us = {name: figures["us"]["median"] for name, figures in cases.items()}
    apart = us["chunks"] + us["decodes"] - us["loop"]
    cases["mixed"]["mixed_to_sum"] = us["mixed"] / apart
  return cases


def mixed_case(sizes: Sizes) -> Case:
  """Returns prompt chunks, followed by sequences that decode."""
  count, context = sizes.num_decodes, sizes.decode_len - 1
  return Case(
    q_lens=sizes.chunk_lens + (1,) * count,
    contexts=sizes.chunk_contexts + (context,) * count,
    page_size=sizes.page_size,
    head_dim=sizes.config.head_dim,
    heads=(sizes.config.num_q_heads, sizes.config.num_kv_heads),
  )


def split(batch: Batch, num_first: int) -> tuple[Batch, Batch]:
  """Returns the first sequences of a batch, and the decoding sequences."""
  starts, _ = batch.more
  end = int(starts[num_first])
  first = dataclasses.replace(
    batch,
    q=batch.q[:end],
    kv_lens=batch.kv_lens[:num_first],
    tables=batch.tables[:, :num_first],
    more=(starts[: num_first + 1], jnp.int32(num_first)),
  )
  others = dataclasses.replace(
    batch,
    q=batch.q[end:],
    kv_lens=batch.kv_lens[num_first:],
    tables=batch.tables[:, num_first:],
    more=(),
  )
  return first, others


def _timed(
  sizes: Sizes, batch: Batch, attend: Callable, expected: jax.Array | None
) -> dict:
  check = None
  if expected is not None:
    check = functools.partial(relative_error, expected)
  return measured(batch, attend, sizes.steps, sizes.calls, check)[0]


def model(sizes: Sizes) -> Iterator[tuple[str, dict]]:
  """Yields each chunk size, and the figures of prompts in chunks of it."""
  llama = models.random_model(sizes.config)
  expected: list[np.ndarray] = []
  for chunk in sizes.chunks:
    yield str(chunk), attempt(_prefill, sizes, llama, chunk, expected)


def _prefill(
  sizes: Sizes, llama: Llama, chunk: int, expected: list[np.ndarray]
) -> dict:
  cache, tokens, lens = prompts(sizes)
  logits = jnp.zeros((sizes.num_prompts, sizes.config.vocab_size), jnp.float32)
  error = {}

  def step(_, state, llama, tokens, lens):
    cache = paged_cache.release(state[0], lens > 0)
    return read(llama, cache, tokens, lens, chunk=chunk)

  def verify(state):
    expected.append(np.asarray(state[1]))  # the state is donated
    error["relative_error"] = relative_error(
      jnp.asarray(expected[0]), state[1], at_most=MAX_ERROR_OF_LOGITS
    )

  figures = device_loop.measure(
    step,
    (cache, logits),
    1,
    sizes.model_calls,
    verify,
    inputs=(llama, tokens, lens),
    large=cache.groups[0].pool.k.size,
    goes_on=True,
  )
  us = figures["us"]["median"]
  figures["tokens_per_s"] = tokens.size / us * 1e6
  figures["tflop_per_s"] = model_flops(sizes) / us / 1e6
  return figures | error


def prompts(sizes: Sizes) -> tuple[PagedCache, jax.Array, jax.Array]:
  """Returns an empty cache for the prompts, their tokens and their lengths."""
  config, count = sizes.config, sizes.num_prompts
  layer = LayerKV(config.num_kv_heads, config.head_dim)
  cache_config = CacheConfig(
    num_pages=count * cdiv(sizes.prompt_len, sizes.page_size),
    page_size=sizes.page_size,
    num_seqs=count,
    max_len=sizes.prompt_len,
    dtype=DTYPE,
  )
  cache = PagedCache.init((layer,) * config.num_layers, cache_config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, count * sizes.prompt_len)
  lens = jnp.full(count, sizes.prompt_len, jnp.int32)
  return cache, jnp.asarray(tokens, jnp.int32), lens


def model_flops(sizes: Sizes) -> float:
  """Returns the FLOPs of the model on all prompts, including the logits."""
  config, count = sizes.config, sizes.num_prompts
  hidden, heads = config.hidden_size, config.num_q_heads
  qkv_and_o = 2 * (heads + config.num_kv_heads) * config.head_dim * hidden
  layer = qkv_and_o + 3 * hidden * config.intermediate_size
  products = config.num_layers * layer * count * sizes.prompt_len
  products += config.vocab_size * hidden * count
  attend = Case(
    q_lens=(sizes.prompt_len,) * count,
    contexts=(0,) * count,
    head_dim=config.head_dim,
    heads=(heads, config.num_kv_heads),
  )
  return 2.0 * products + config.num_layers * attend.flops


if __name__ == "__main__":
  main()
