"""The arguments of the `paged-jax` command, and the values that they accept."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from paged_jax import __version__
from paged_jax.cli.errors import CommandError
from paged_jax.dispatch import IMPLEMENTATIONS
from paged_jax.kv import dtypes

_MOST = 2**31 - 1  # the largest i32

_JSON_HELP = """\
With --json, stdout has one line for each prompt, in order, with a JSON object:
  prompt_token_ids  token ids of the prompt
  token_ids         new token ids, including a stop token
  text              text of the new tokens, without special tokens
  finish_reason     "stop", "length", "out_of_pages" or "error"
  logprobs          with --logprobs: natural log of each new token's
                    probability under the model, before temperature and filters
  timing            seconds of the whole batch, the same on every line:
    compile_s       tracing and compiling, or loading programs that an earlier
                    run compiled; not included in the next two
    prefill_s       until all prompts have their first new token
    decode_s        from then until all prompts have their last new token
    tokens_per_s    new tokens, except the first of each prompt, per second of
                    decode_s; null if there are none
No field includes the time to load the model.
"""


class _Parser(argparse.ArgumentParser):
  """A parser that raises errors of one line, without the usage."""

  def error(self, message: str) -> NoReturn:
    raise CommandError(message)


def parser() -> argparse.ArgumentParser:
  """Returns the parser, which raises `CommandError` for invalid arguments."""
  top = _Parser(
    prog="paged-jax",
    description="Text generation on a paged KV cache, in JAX.",
    allow_abbrev=False,
  )
  top.add_argument(
    "--version", action="version", version=f"paged-jax {__version__}"
  )
  commands = top.add_subparsers(dest="command", required=True)
  generate = commands.add_parser(
    "generate",
    help="continue prompts with a language model",
    description="Continues all prompts in one batch.\n"
    "With a single prompt, the new text appears on stdout as it is generated.",
    epilog=_JSON_HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  _add_input(generate.add_argument_group("model and prompts"))
  _add_length(generate.add_argument_group("length"))
  _add_sampling(generate.add_argument_group("sampling"))
  _add_output(generate.add_argument_group("output"))
  _add_cache(generate.add_argument_group("cache and computation"))
  commands.add_parser(
    "info",
    help="show versions, devices and attention implementations",
    description="Prints versions, devices, the attention implementations that "
    "this machine uses and why, and the cache folder.",
    allow_abbrev=False,
  )
  return top


def _add_input(group) -> None:
  group.add_argument(
    "--model",
    required=True,
    metavar="demo|FILE.gguf",
    help="a GGUF file of the Llama architecture, or 'demo' for "
    "SmolLM2-135M-Instruct (93 MB, downloaded once)",
  )
  group.add_argument(
    "--prompt",
    action="append",
    default=[],
    type=_prompt,
    metavar="TEXT",
    help="a prompt; may be repeated; write --prompt=TEXT if TEXT starts with a "
    "dash",
  )
  group.add_argument(
    "--prompts-file",
    metavar="FILE",
    help="a UTF-8 file with one prompt per line, added after those of "
    "--prompt; '-' is stdin",
  )
  group.add_argument(
    "--chat",
    action="store_true",
    help="put each prompt into the model's chat template as the user's turn "
    "(default: continue the prompt as plain text)",
  )


def _add_length(group) -> None:
  group.add_argument(
    "--max-new-tokens",
    type=_integer(1),
    default=128,
    metavar="N",
    help="maximum number of new tokens for each prompt (default: 128)",
  )
  group.add_argument(
    "--ignore-eos",
    action="store_true",
    help="continue after the model's stop tokens",
  )


def _add_sampling(group) -> None:
  group.add_argument(
    "--temperature",
    type=_number(0.0, math.inf),
    default=0.0,
    metavar="T",
    help="divide the logits by T; 0 takes the most likely token (default: 0)",
  )
  group.add_argument(
    "--top-k",
    type=_integer(0),
    default=0,
    metavar="K",
    help="keep the K most likely tokens; 0 keeps all (default: 0)",
  )
  group.add_argument(
    "--top-p",
    type=_number(0.0, 1.0, above=True),
    default=1.0,
    metavar="P",
    help="keep the most likely tokens whose total probability reaches P "
    "(default: 1)",
  )
  group.add_argument(
    "--min-p",
    type=_number(0.0, 1.0),
    default=0.0,
    metavar="P",
    help="keep tokens with at least P times the probability of the most likely "
    "token (default: 0)",
  )
  group.add_argument(
    "--seed",
    type=_integer(0, most=2**32 - 1),
    default=0,
    metavar="S",
    help="sample prompt i (from 0) with seed S + i, independent of the batch "
    "(default: 0)",
  )


def _add_output(group) -> None:
  group.add_argument(
    "--json",
    action="store_true",
    help="print one JSON object per prompt; see below",
  )
  group.add_argument(
    "--logprobs",
    action="store_true",
    help="add log-probabilities to the output of --json",
  )


def _add_cache(group) -> None:
  group.add_argument(
    "--page-size",
    type=_integer(8, multiple_of=8),
    default=16,
    metavar="N",
    help="tokens per page, a multiple of 8 (default: 16)",
  )
  group.add_argument(
    "--num-pages",
    type=_integer(1),
    metavar="N",
    help="number of pages (default: as many as the batch can need, within the "
    "free memory)",
  )
  group.add_argument(
    "--max-len",
    type=_integer(1),
    metavar="N",
    help="longest sequence in tokens, including the prompt (default: the "
    "model's limit)",
  )
  group.add_argument(
    "--prefill-chunk",
    type=_integer(1),
    default=512,
    metavar="N",
    help="prompt tokens per prefill step (default: 512)",
  )
  group.add_argument(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="dtype of the model (default: bfloat16 on a GPU, else float32)",
  )
  group.add_argument(
    "--kv-dtype",
    choices=tuple(dtype.name for dtype in dtypes.DTYPES),
    help="dtype of the cache; int8 and float8_e4m3fn are quantised and take "
    "half the memory of bfloat16 (default: the dtype of the model)",
  )
  group.add_argument(
    "--implementation",
    choices=("auto", *IMPLEMENTATIONS),
    default="auto",
    help="implementation of attention, writes and page copies; auto chooses "
    "the fastest that this machine can run (default: auto)",
  )


def _prompt(text: str) -> str:
  if not text:
    raise argparse.ArgumentTypeError(f"{text!r} is empty.")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise argparse.ArgumentTypeError(f"{text!r:.80} is not UTF-8.") from error
  return text


def _integer(
  least: int, *, most: int = _MOST, multiple_of: int = 1
) -> Callable[[str], int]:
  """Returns the `type` of an argument that is an integer in [least, most]."""
  rule = f"an integer in [{least}, {most}]"
  if multiple_of > 1:
    rule += f" and a multiple of {multiple_of}"

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"{text!r} must be {rule}.") from None
    if not least <= value <= most or value % multiple_of:
      raise argparse.ArgumentTypeError(f"{text} must be {rule}.")
    return value

  return parse


def _number(
  least: float, most: float, *, above: bool = False
) -> Callable[[str], float]:
  """Returns the `type` of an argument that is a finite number.

  Args:
    least: Smallest value.
    most: Largest value.
    above: Whether the value must be above `least`.
  """
  rule = f"a finite number {'above' if above else 'of at least'} {least:g}"
  if most < math.inf:
    rule += f" and at most {most:g}"

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"{text!r} must be {rule}.") from None
    low = value <= least if above else value < least
    if not math.isfinite(value) or low or value > most:
      raise argparse.ArgumentTypeError(f"{text} must be {rule}.")
    return value

  return parse
