"""`paged-jax generate`: continues prompts with a language model.

All checks that do not need the model run before it is downloaded or read.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import extras, generation
from paged_jax.checkpoints import demo, gguf
from paged_jax.checkpoints.metadata import ModelFileError
from paged_jax.cli import output, prompts
from paged_jax.cli.errors import CommandError
from paged_jax.cli.info import ATTENTION_OPS, default_device, why_not_kernel
from paged_jax.cli.timing import timed
from paged_jax.generation import CacheConfig, Completion, SamplingParams
from paged_jax.models import llama
from paged_jax.models.config import LlamaConfig
from paged_jax.text.tokenizer import Tokenizer

# Programs that compile faster are not cached.
_MIN_COMPILE_S = 0.2


def run(args: argparse.Namespace) -> None:
  """Generates and prints.

  Raises:
    CommandError: If an argument is wrong, the model cannot be loaded, or memory
      does not suffice.
  """
  given = prompts.read(args)
  _check_options(args, len(given))
  on_gpu = default_device().platform in ("gpu", "cuda")
  dtype = jnp.dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))
  _check_kernel(args, dtype)
  with _within_memory():
    _say(f"loading {args.model}")
    checkpoint = _load(args.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    token_ids = prompts.encode(args, given, tokenizer, config)
    _check_kernel(args, dtype, config)
    _keep_compiled_programs()
    model = llama.from_weights(config, checkpoint.weights, param_dtype=dtype)
    _say("compiling, then reading the prompts")
    steps = timed(_stream(args, model, token_ids, tokenizer.stop_token_ids))
    _print(args, steps, tokenizer, given)


def _check_options(args: argparse.Namespace, num_prompts: int) -> None:
  if args.logprobs and not args.json:
    raise CommandError("argument --logprobs: requires --json.")
  last_seed = args.seed + num_prompts - 1
  if last_seed >= 2**32:
    raise CommandError(
      f"argument --seed: {args.seed} gives the last of {num_prompts} prompts "
      f"the seed {last_seed}, which must be below 2**32."
    )
  if args.model != "demo":
    try:
      Path(args.model).stat()
    except FileNotFoundError as error:
      raise CommandError(
        f"argument --model: {args.model!r} does not exist."
      ) from error
    except OSError as error:
      raise CommandError(
        f"argument --model: {args.model!r}: {error.strerror}."
      ) from error
  needed = ["gguf", "tokenizers"] + ["jinja2"] * args.chat
  try:
    for name in needed:
      extras.import_demo(name)
  except ModuleNotFoundError as error:
    raise CommandError(f"argument --model: {error}") from error


def _check_kernel(
  args: argparse.Namespace, dtype: np.dtype, config: LlamaConfig | None = None
) -> None:
  """Checks `--implementation`, before the model is loaded and again after."""
  if args.implementation != "mosaic_gpu":
    return
  shape = {}
  if config is not None:
    names = ("head_dim", "num_q_heads", "num_kv_heads")
    shape = {name: getattr(config, name) for name in names}
  for op in ATTENTION_OPS:
    reason = why_not_kernel(
      op,
      dtype=dtype,
      kv_dtype=args.kv_dtype,
      page_size=args.page_size,
      **shape,
    )
    if reason is not None:
      raise CommandError(
        "argument --implementation: 'mosaic_gpu' is not available for "
        f"{op}: {reason}"
      )


def _keep_compiled_programs() -> None:
  """Enables JAX's compilation cache for later runs.

  Compiling the demo model takes 36 s on two CPU cores; downloading it takes 3
  s.
  """
  if jax.config.jax_compilation_cache_dir:
    return  # the user has set one
  directory = demo.cache_dir() / "compiled"
  try:
    # Compiled programs are code, so no other user may write to the folder.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError:
    return  # the cache is optional
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_S
  )


def _load(model: str) -> gguf.Checkpoint:
  try:
    return gguf.load(demo.resolve(model))
  except OSError as error:
    # Without the error number, which means nothing to most users.
    reason = str(error).removeprefix(f"[Errno {error.errno}] ")
    raise CommandError(f"argument --model: {reason}") from error
  except (ModelFileError, NotImplementedError, ModuleNotFoundError) as error:
    raise CommandError(f"argument --model: {error}") from error


def _stream(
  args: argparse.Namespace,
  model: llama.Llama,
  token_ids: Sequence[Sequence[int]],
  stop_token_ids: tuple[int, ...],
) -> Iterator[list[Completion]]:
  """Returns an iterator over the new tokens of each step."""
  params = SamplingParams(
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    min_p=args.min_p,
    stop_token_ids=() if args.ignore_eos else stop_token_ids,
  )
  cache = CacheConfig(
    page_size=args.page_size,
    num_pages=args.num_pages,
    max_len=args.max_len,
    dtype=args.kv_dtype,
    prefill_chunk=args.prefill_chunk,
    implementation=(
      None if args.implementation == "auto" else args.implementation
    ),
  )
  return generation.stream(
    model,
    token_ids,
    [
      dataclasses.replace(params, seed=args.seed + i)
      for i in range(len(token_ids))
    ],
    cache=cache,
    with_logprobs=args.logprobs,
  )


def _print(
  args: argparse.Namespace,
  steps: output.Steps,
  tokenizer: Tokenizer,
  given: Sequence[prompts.Prompt],
) -> None:
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A terminal that is not UTF-8 shows question marks instead of a traceback.
    sys.stdout.reconfigure(errors="replace")
  if args.json:
    output.print_json(steps, tokenizer)
  elif len(given) == 1:
    output.print_stream(steps, tokenizer)
  else:
    output.print_batch(steps, tokenizer, given)


@contextlib.contextmanager
def _within_memory() -> Generator[None]:
  """Turns out-of-memory errors into errors of the command."""
  try:
    yield
  except MemoryError as error:
    raise CommandError(f"out of memory: {error}") from error
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise CommandError(
      "out of device memory; try fewer --num-pages, a smaller --prefill-chunk "
      f"or fewer prompts: {error}"
    ) from error


def _say(message: str) -> None:
  """Prints a message to stderr if it is a terminal."""
  if sys.stderr.isatty():
    print(f"paged-jax: {message} ...", file=sys.stderr)
