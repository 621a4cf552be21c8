"""Measures decode steps of a whole model, as `stream` runs them.

  stream    `paged_jax.generation.stream`: one dispatch per step, a few steps
            in flight
  loop      `paged_jax.generation.loop.decode`: all steps in one program
  returns   the time until a call that dispatches a step returns to Python

The models have the shapes of SmolLM2-135M and Llama 3.1 8B, with random
bfloat16 parameters. Prompts have 1,024 tokens and are continued greedily by 256
tokens, so stream and loop run at the same contexts, 1,025 to 1,280, and no row
ends early. Times are of the steps after the first new token, measured on the
host. Stream and loop alternate, and their tokens are compared.

  python -m benchmarks.step

Results: benchmarks/results/h200/step.json
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import command, models, results
from benchmarks.harness.batches import DTYPE
from benchmarks.harness.cases import attempt, failures
from benchmarks.harness.table import lines
from paged_jax import PagedCache, sampling
from paged_jax.generation import (
  CacheConfig,
  SamplingParams,
  driver,
  join,
  loop,
  programs,
  stream,
)
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.batch import Batch
from paged_jax.generation.rows import Rows
from paged_jax.models.config import LlamaConfig
from paged_jax.models.llama import Llama

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy"]
COLUMNS = {
  "stream_ms": "{:9.3f} ms",
  "loop_ms": "{:9.3f} ms",
  "stream_to_loop": "{:7.3f}",
  "returns_ms": "{:9.3f} ms",
  "returns_to_step": "{:7.3f}",
  "tb_per_s": "{:6.2f} TB/s",
  "same_tokens": "  {}",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases, and the number of turns."""

  shapes: dict[str, LlamaConfig]
  batches: tuple[int, ...]
  prompt_len: int
  num_new: int
  prefill_chunk: int
  turns: int

  def only(self, shape: str) -> "Sizes":
    """Returns these sizes with one of the models."""
    return dataclasses.replace(self, shapes={shape: self.shapes[shape]})


FULL = Sizes(
  shapes={"135M": models.SMOLLM_135M, "8B": models.LLAMA_8B},
  batches=(8, 256),
  prompt_len=1024,
  num_new=256,
  prefill_chunk=8192,
  turns=3,
)
SMALL = Sizes(
  shapes={
    "tiny": dataclasses.replace(
      models.LLAMA_8B,
      vocab_size=96,
      hidden_size=32,
      intermediate_size=48,
      num_layers=2,
      num_q_heads=4,
      num_kv_heads=2,
      head_dim=16,
    )
  },
  batches=(2,),
  prompt_len=9,
  num_new=6,
  prefill_chunk=64,
  turns=2,
)


def main() -> None:
  """Times all cases, prints the figures and writes the record."""
  args, where = command.start_on_gpu(
    "step", __doc__, PACKAGES, values={"--shape": "the only model to time"}
  )
  sizes = SMALL if args.small else FULL
  if args.shape:
    sizes = sizes.only(args.shape)
  record = results.keep("step", records(sizes), args, where)
  print(lines(record["steps"], COLUMNS, width=16))
  command.finish(failures(record))


def records(sizes: Sizes) -> Iterator[dict]:
  """Yields the record with all figures so far, after each case."""
  settings = dataclasses.asdict(sizes) | {"shapes": list(sizes.shapes)}
  figures: dict[str, dict] = {}
  for name, config in sizes.shapes.items():
    model = models.random_model(config)
    for batch in sizes.batches:
      figures[f"{name}, B{batch}"] = attempt(_time, sizes, model, batch)
      yield {"settings": settings, "steps": figures}


def _time(sizes: Sizes, model: Llama, batch: int) -> dict:
  """Returns the figures of a case."""
  rng = np.random.default_rng(0)
  shape = batch, sizes.prompt_len
  prompts = rng.integers(0, model.vocab_size, shape).tolist()
  params = SamplingParams(max_new_tokens=sizes.num_new)
  config = CacheConfig(
    prefill_chunk=sizes.prefill_chunk,
    max_len=sizes.prompt_len + sizes.num_new,
  )
  num_steps = sizes.num_new - 1
  streamed, looped, returns = [], [], []
  for _ in range(1 + sizes.turns):
    ms, tokens = _stream(model, prompts, params, config)
    streamed.append(ms / num_steps)
    prefilled = _Loop(model, prompts, params, config)
    ms, expected = prefilled.decode(num_steps)
    looped.append(ms / num_steps)
    returns.append(_Loop(model, prompts, params, config).returns_ms(num_steps))
  # The first turn compiles.
  stream_ms, loop_ms, returns_ms = (
    statistics.median(each[1:]) for each in (streamed, looped, returns)
  )
  return {
    "us": {
      name: [1e3 * ms for ms in each[1:]]
      for name, each in (
        ("stream", streamed),
        ("loop", looped),
        ("call", returns),
      )
    },
    "stream_ms": stream_ms,
    "loop_ms": loop_ms,
    "stream_to_loop": stream_ms / loop_ms,
    "returns_ms": returns_ms,
    "returns_to_step": returns_ms / stream_ms,
    "tb_per_s": _num_bytes(model, batch, sizes) / stream_ms / 1e9,
    "same_tokens": np.array_equal(tokens, expected),
  }


def _num_bytes(model: Llama, batch: int, sizes: Sizes) -> float:
  """Returns the least bytes that a step reads at the mean context."""
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
  if not model.config.tie_word_embeddings:  # a step reads few rows of these
    parameters -= model.embed_tokens.embedding[...].nbytes
  context = sizes.prompt_len + sizes.num_new / 2
  of_token = sum(2 * kv.num_kv_heads * kv.head_dim for kv in model.layers)
  return parameters + batch * context * of_token * jnp.dtype(DTYPE).itemsize


def _stream(model, prompts, params, config) -> tuple[float, np.ndarray]:
  """Returns the milliseconds after the first item, and all tokens."""
  items = stream(model, prompts, params, cache=config)
  first = next(items)
  begin = time.perf_counter()
  rest = list(items)
  elapsed = time.perf_counter() - begin
  tokens = [each.token_ids for each in join([first, *rest])]
  return elapsed * 1e3, np.asarray(tokens)


class _Loop:
  """Prefilled rows, and the runner of their next steps."""

  def __init__(self, model, prompts, params, config):
    config = dataclasses.replace(
      config,
      num_seqs=len(prompts),
      dtype=jnp.bfloat16,
      num_pages=len(prompts) * config.pages_per_seq,
    )
    batch = Batch.of(model, prompts, params, config)
    status = batch.status(config.num_pages, config.page_size)
    rows = rows_lib.init(
      PagedCache.init(model.layers, config),
      sampling.stack(batch.params),
      jnp.asarray(batch.max_new, jnp.int32),
      status=jnp.asarray(status),
      capacity=params.max_new_tokens,
    )
    self._model = model
    self._runner = programs.Runner(model, rows)
    for plan in batch.chunks(status, config.prefill_chunk):
      self._runner.prefill(plan)
    jax.block_until_ready(self._runner.rows)

  def decode(self, num_steps: int) -> tuple[float, np.ndarray]:
    """Returns the milliseconds of one program's steps, and all tokens."""
    structure, leaves = programs.flatten(self._model)
    begin = time.perf_counter()
    rows = _decode(structure, leaves, self._runner.rows, num_steps)
    jax.block_until_ready(rows.status)
    elapsed = time.perf_counter() - begin
    return elapsed * 1e3, np.asarray(rows.tokens)

  def returns_ms(self, num_steps: int) -> float:
    """Returns the median milliseconds for which a dispatch blocks Python."""
    ms, in_flight = [], []
    for _ in range(num_steps):
      begin = time.perf_counter()
      packed = self._runner.decode()
      ms.append((time.perf_counter() - begin) * 1e3)
      in_flight.append(packed)
      if len(in_flight) == driver.IN_FLIGHT:
        np.asarray(in_flight.pop(0))
    return statistics.median(ms)


@programs.by_leaves
def _decode(model: Llama, rows: Rows, num_steps: jax.Array) -> Rows:
  """Runs `loop.decode` on a model that is passed as its leaves."""
  return loop.decode(model, rows, num_steps)


if __name__ == "__main__":
  main()
