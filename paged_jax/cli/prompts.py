"""The prompts of `paged-jax generate`: from arguments to token ids."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from paged_jax.cli.errors import CommandError
from paged_jax.models.config import LlamaConfig
from paged_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt, before it is tokenized."""

  text: str
  source: str  # the start of error messages about it


def read(args: argparse.Namespace) -> list[Prompt]:
  """Returns the prompts of `--prompt`, then those of `--prompts-file`.

  Raises:
    CommandError: If there is no prompt, a prompt is empty, or the file cannot
      be read or is not UTF-8.
  """
  prompts = [
    Prompt(text, f"argument --prompt: {text[:40]!r}") for text in args.prompt
  ]
  if args.prompts_file is not None:
    prompts += _of_file(args.prompts_file)
  if not prompts:
    raise CommandError("no prompts: give --prompt or --prompts-file.")
  return prompts


def encode(
  args: argparse.Namespace,
  prompts: Sequence[Prompt],
  tokenizer: Tokenizer,
  config: LlamaConfig,
) -> list[list[int]]:
  """Returns the token ids of every prompt.

  Raises:
    CommandError: If a prompt or `--max-len` is too long, or if the model has no
      chat template or the template fails.
  """
  max_len = args.max_len or config.max_len
  if max_len > config.max_len:
    raise CommandError(
      f"argument --max-len: {max_len} must be at most {config.max_len}, the "
      "limit of the model."
    )
  token_ids = []
  for prompt in prompts:
    text = _as_chat(prompt.text, tokenizer) if args.chat else prompt.text
    ids = tokenizer.encode(text)
    if len(ids) > max_len:
      raise CommandError(
        f"{prompt.source} has {len(ids)} tokens; {max_len=} is the limit."
      )
    token_ids.append(ids)
  return token_ids


def _as_chat(text: str, tokenizer: Tokenizer) -> str:
  try:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}])
  except ValueError as error:
    raise CommandError(f"argument --chat: {error}") from error


def _of_file(name: str) -> list[Prompt]:
  source = f"argument --prompts-file: {name}"
  if name == "-" and sys.stdin is None:
    raise CommandError(f"{source}: stdin is closed.")
  try:
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    text = data.decode("utf-8-sig")
  except OSError as error:
    raise CommandError(f"{source}: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise CommandError(f"{source} is not UTF-8: {error}.") from error
  # Not splitlines: a prompt may have a form feed or a Unicode line separator.
  lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
  if lines == [""]:
    raise CommandError(f"{source} has no prompts.")
  for i, line in enumerate(lines, start=1):
    if not line:
      raise CommandError(f"{source}:{i} is an empty prompt.")
  return [
    Prompt(line, f"{source}:{i}") for i, line in enumerate(lines, start=1)
  ]
