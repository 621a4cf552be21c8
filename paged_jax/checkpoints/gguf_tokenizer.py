"""Builds the tokenizer of a GGUF file from its metadata.

The file contains the vocabulary, the merges, and the name of the rule that
splits text into words, but not the rule itself.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from paged_jax.checkpoints.metadata import (
  ModelFileError,
  numbers,
  optional,
  require,
  strings,
)
from paged_jax.text.tokenizer import Tokenizer, TokenKind

# Other names of a rule that splits text into words.
_PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
# Values of `tokenizer.ggml.token_type`; all others are plain text.
_CONTROL = 3
_USER_DEFINED = 4


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
  """Returns the tokenizer of a model file.

  Args:
    metadata: Key-value metadata of the file, including the `tokenizer.*` keys.

  Raises:
    ModelFileError: If a key is missing or contradicts another.
    NotImplementedError: If the tokenizer is not a byte-level BPE, or its rule
      for splitting text into words is unknown.
    ModuleNotFoundError: If the `demo` extra is not installed.
  """
  model = require(metadata, "tokenizer.ggml.model", str)
  if model != "gpt2":
    raise NotImplementedError(
      f"tokenizer.ggml.model={model!r} is not supported: only byte-level "
      "BPE ('gpt2') is."
    )
  tokens = list(strings(metadata, "tokenizer.ggml.tokens"))
  types = numbers(metadata, "tokenizer.ggml.token_type")
  if types is not None and len(types) != len(tokens):
    raise ModelFileError(
      f"metadata tokenizer.ggml.token_type has {len(types)} entries for "
      f"{len(tokens)} tokens."
    )
  merges = list(strings(metadata, "tokenizer.ggml.merges"))
  pre = optional(metadata, "tokenizer.ggml.pre", None, str)
  if pre is None:
    pre = "default"
    warnings.warn(
      "the file has no tokenizer.ggml.pre; text is split by the rule "
      "'default', which may not be that of the model.",
      stacklevel=2,
    )
  pre = _PRE_ALIASES.get(pre, pre)
  bos_id, eos_id, eot_id, eom_id = (
    optional(metadata, f"tokenizer.ggml.{name}_token_id", None, int)
    for name in ("bos", "eos", "eot", "eom")
  )
  # Llama 3 prepends the start token unless the file says otherwise.
  add_bos = optional(
    metadata, "tokenizer.ggml.add_bos_token", pre == "llama-bpe", bool
  )
  chat_template = optional(metadata, "tokenizer.chat_template", None, str)
  # Messages of `Tokenizer` begin with an argument, which is also the end of the
  # key in the file.
  try:
    return Tokenizer(
      tokens,
      merges,
      pre=pre,
      kinds=None if types is None else [_kind(each) for each in types],
      bos_token_id=bos_id,
      eos_token_id=eos_id,
      eot_token_id=eot_id,
      eom_token_id=eom_id,
      add_bos_token=add_bos,
      chat_template=chat_template,
    )
  except NotImplementedError as error:
    raise NotImplementedError(f"tokenizer.ggml.{error}") from error
  except ValueError as error:
    raise ModelFileError(f"metadata tokenizer.ggml.{error}") from error


def _kind(token_type: object) -> TokenKind:
  if token_type == _CONTROL:
    return TokenKind.CONTROL
  if token_type == _USER_DEFINED:
    return TokenKind.ADDED
  return TokenKind.TEXT
