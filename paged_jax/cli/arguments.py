"""The arguments of the `paged-jax` command, and which values they take."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from paged_jax import __version__
from paged_jax.cli.errors import CommandError
from paged_jax.dispatch import IMPLEMENTATIONS
from paged_jax.kv import dtypes

_MOST = 2**31 - 1  # of whatever becomes an i32

_JSON_HELP = """\
With --json, stdout has one object a line for each prompt, in order:
  prompt_token_ids  the prompt
  token_ids         new tokens only, a stop token included
  text              of the new tokens, special tokens left out
  finish_reason     "stop", "length", or "out_of_pages"
  logprobs          with --logprobs: natural log of each new token's
                    probability under the model, before temperature and filters
  timing            of the whole batch, so the same on every line:
    compile_s       tracing and compiling, or fetching what an earlier run
                    compiled; part of neither of the next two
    prefill_s       until the first new token of every prompt
    decode_s        until the last new token of every prompt
    tokens_per_s    new tokens but the first of each prompt, over decode_s;
                    null if there are none
The time to load the model is in none of them.
"""


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the usage."""

  def error(self, message: str) -> NoReturn:
    raise CommandError(message)


def parser() -> argparse.ArgumentParser:
  """Returns the parser; it raises `CommandError` for what it refuses."""
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
    description="Continues prompts, all in one batch.\n"
    "The text of a single prompt appears on stdout as it is made.",
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
    help="say what this machine runs",
    description="Prints versions, devices, the attention implementations "
    "this machine gets and why, and the cache folder.",
    allow_abbrev=False,
  )
  return top


def _add_input(group) -> None:
  group.add_argument(
    "--model",
    required=True,
    metavar="demo|FILE.gguf",
    help="a GGUF file of the Llama architecture; 'demo' is "
    "SmolLM2-135M-Instruct (93 MB, fetched once)",
  )
  group.add_argument(
    "--prompt",
    action="append",
    default=[],
    type=_prompt,
    metavar="TEXT",
    help="may be repeated; write --prompt=TEXT if it starts with a dash",
  )
  group.add_argument(
    "--prompts-file",
    metavar="FILE",
    help="one prompt a line, UTF-8, after those of --prompt; '-' is stdin",
  )
  group.add_argument(
    "--chat",
    action="store_true",
    help="put each prompt as a user's turn into the model's chat template; "
    "without, a prompt is plain text to be continued",
  )


def _add_length(group) -> None:
  group.add_argument(
    "--max-new-tokens",
    type=_integer(1),
    default=128,
    metavar="N",
    help="most new tokens of each prompt (default: 128)",
  )
  group.add_argument(
    "--ignore-eos",
    action="store_true",
    help="do not end at the model's stop tokens",
  )


def _add_sampling(group) -> None:
  group.add_argument(
    "--temperature",
    type=_number(0.0, math.inf),
    default=0.0,
    metavar="T",
    help="0 takes the most likely token (default: 0)",
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
    help="keep the most likely tokens that together reach P (default: 1)",
  )
  group.add_argument(
    "--min-p",
    type=_number(0.0, 1.0),
    default=0.0,
    metavar="P",
    help="keep tokens of at least this share of the top token's probability "
    "(default: 0)",
  )
  group.add_argument(
    "--seed",
    type=_integer(0, most=2**32 - 1),
    default=0,
    metavar="S",
    help="prompt i samples with seed S + i, whatever its batch (default: 0)",
  )


def _add_output(group) -> None:
  group.add_argument(
    "--json", action="store_true", help="one JSON object a line; see below"
  )
  group.add_argument(
    "--logprobs", action="store_true", help="log-probabilities, with --json"
  )


def _add_cache(group) -> None:
  group.add_argument(
    "--page-size",
    type=_integer(8, multiple_of=8),
    default=16,
    metavar="N",
    help="tokens a page, a multiple of 8 (default: 16)",
  )
  group.add_argument(
    "--num-pages",
    type=_integer(1),
    metavar="N",
    help="pages of the pool (default: what the batch can need and memory has)",
  )
  group.add_argument(
    "--max-len",
    type=_integer(1),
    metavar="N",
    help="longest sequence, prompt included (default: the model's own)",
  )
  group.add_argument(
    "--prefill-chunk",
    type=_integer(1),
    default=512,
    metavar="N",
    help="prompt tokens a step (default: 512)",
  )
  group.add_argument(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="of the model (default: bfloat16 on a GPU, else float32)",
  )
  group.add_argument(
    "--kv-dtype",
    choices=tuple(dtype.name for dtype in dtypes.DTYPES),
    help="of the cache; int8 and float8_e4m3fn are quantised, in half the "
    "memory of bfloat16 (default: that of the model)",
  )
  group.add_argument(
    "--implementation",
    choices=("auto", *IMPLEMENTATIONS),
    default="auto",
    help="of attention, writes and page copies (default: auto, the fastest "
    "that runs here)",
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
    above: Whether `least` itself is refused.
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
