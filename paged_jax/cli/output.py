"""Prints the output of `paged-jax generate`."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from paged_jax.cli.prompts import Prompt
from paged_jax.cli.timing import Timing
from paged_jax.generation import Completion, join
from paged_jax.text.tokenizer import Tokenizer

# The new tokens and the time so far of each step; has at least one step.
type Steps = Iterable[tuple[list[Completion], Timing]]


def print_json(steps: Steps, tokenizer: Tokenizer) -> None:
  """Prints one JSON object per line for each prompt, and nothing else."""
  completions, timing = _whole(steps)
  rate = timing.tokens_per_s(completions)
  seconds = {
    "compile_s": round(timing.compile_s, 4),
    "prefill_s": round(timing.prefill_s, 4),
    "decode_s": round(timing.decode_s, 4),
    "tokens_per_s": None if rate is None else round(rate, 2),
  }
  for completion in completions:
    fields: dict[str, Any] = {
      "prompt_token_ids": completion.prompt_token_ids,
      "token_ids": completion.token_ids,
      "text": tokenizer.decode(completion.token_ids),
      "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
      fields["logprobs"] = [  # JSON has no infinity and no NaN
        each if math.isfinite(each) else None for each in completion.logprobs
      ]
    print(json.dumps(fields | {"timing": seconds}, allow_nan=False))


def print_stream(steps: Steps, tokenizer: Tokenizer) -> None:
  """Prints the text of a single prompt as it grows."""
  decoder = tokenizer.stream()

  def shown() -> Steps:
    for completions, timing in steps:
      text = decoder.push(completions[0].token_ids)
      print(text, end="", flush=True)
      yield completions, timing

  whole = _whole(shown())
  print(decoder.finish(), flush=True)
  _summarise(*whole)


def print_batch(
  steps: Steps, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> None:
  """Prints every prompt with its completion, after all have ended."""
  completions, timing = _whole(steps)
  pairs = zip(prompts, completions, strict=True)
  for i, (prompt, completion) in enumerate(pairs, start=1):
    print(f"=== prompt {i} of {len(prompts)} ===")
    print(prompt.text)
    print(f"--- completion {i}: {_describe(completion)} ---")
    print(tokenizer.decode(completion.token_ids), end="\n\n")
  sys.stdout.flush()
  _summarise(completions, timing)


def _whole(steps: Steps) -> tuple[list[Completion], Timing]:
  """Returns the completions of all steps joined, and their total time."""
  pairs = list(steps)
  return join(completions for completions, _ in pairs), pairs[-1][1]


def _summarise(completions: Sequence[Completion], timing: Timing) -> None:
  if len(completions) == 1:
    line = _describe(completions[0])
  else:
    num_tokens = sum(len(c.token_ids) for c in completions)
    line = f"{len(completions)} prompts, {num_tokens} tokens"
  rate = timing.tokens_per_s(completions)
  if rate is not None:
    line += f", {rate:.1f} tokens/s"
  print(f"paged-jax: {line}", file=sys.stderr)


def _describe(completion: Completion) -> str:
  reason = completion.finish_reason
  return f"{len(completion.token_ids)} tokens, finish reason: {reason}"
