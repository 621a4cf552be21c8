"""Byte-level BPE tokenizer built from the metadata of a GGUF file.

A GGUF file carries the vocabulary, the merges and the name of the rule that
cuts text into words before the merges apply, not the rule itself. The rules
known here are those of `_pre_tokenizer`.
"""

import codecs
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from paged_jax.checkpoints.metadata import (
  ModelFileError,
  optional,
  require,
  require_texts,
)
from paged_jax.extras import import_demo
from paged_jax.text.chat_template import render_chat

# Token types of `tokenizer.ggml.token_type`; every other one is plain text.
_CONTROL = 3
_USER_DEFINED = 4

_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
)
# What llama.cpp falls back to for files that name no rule.
_DEFAULT_SPLITS = (
  r"[\p{P}\$\+<=>\^~\|]+",
  _GPT2_WORDS,
  r"\p{N}+",
  r"[0-9][0-9][0-9]",
)


class Tokenizer:
  """Text to token ids and back, as one model file defines them.

  Attributes:
    stop_token_ids: Ids that end a reply: the end of the sequence and, where
      the file names one, the end of the turn.
  """

  def __init__(self, metadata: Mapping[str, Any]):
    """Builds the tokenizer.

    Args:
      metadata: Key-value metadata of the file, `tokenizer.*` keys included.

    Raises:
      ModelFileError: if a key is missing or contradicts another.
      NotImplementedError: if the tokenizer is not a byte-level BPE, or cuts
        words by a rule that is not known here.
      ModuleNotFoundError: if the `demo` extra is not installed.
    """
    model = require(metadata, "tokenizer.ggml.model", str)
    if model != "gpt2":
      raise NotImplementedError(
        f"tokenizer.ggml.model={model!r} is not supported: only byte-level "
        "BPE ('gpt2') is."
      )
    self._tokens = require_texts(metadata, "tokenizer.ggml.tokens")
    types = optional(metadata, "tokenizer.ggml.token_type", None, list)
    self._types = [1] * len(self._tokens) if types is None else types
    if len(self._types) != len(self._tokens):
      raise ModelFileError(
        f"metadata tokenizer.ggml.token_type has {len(self._types)} entries "
        f"for {len(self._tokens)} tokens."
      )
    self._backend = _backend(metadata, self._tokens, self._types)
    self._bos_id = self._token_id(metadata, "bos")
    self._eos_id = self._token_id(metadata, "eos")
    stop_ids = (self._eos_id, self._token_id(metadata, "eot"))
    self.stop_token_ids = tuple(
      dict.fromkeys(token_id for token_id in stop_ids if token_id is not None)
    )
    self._add_bos = optional(
      metadata, "tokenizer.ggml.add_bos_token", False, bool
    )
    self._chat_template = optional(
      metadata, "tokenizer.chat_template", None, str
    )

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return len(self._tokens)

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of `text`.

    Special tokens written out in the text become their ids. A start token is
    put in front where the file asks for one and the text has none yet.

    Raises:
      ValueError: if the text has a lone surrogate, which UTF-8 cannot carry.
    """
    text.encode("utf-8")  # The library would take it for another type.
    ids = self._backend.encode(text, add_special_tokens=False).ids
    if self._add_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
      ids.insert(0, self._bos_id)
    return ids

  def decode(
    self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True
  ) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

    Raises:
      ValueError: if an id is outside `[0, vocab_size)`.
    """
    text = self._text_bytes(ids, skip_special_tokens)
    return text.decode("utf-8", errors="replace")

  def stream(self, skip_special_tokens: bool = True) -> "StreamDecoder":
    """Returns a decoder for ids that arrive a few at a time."""
    return StreamDecoder(self, skip_special_tokens)

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns the conversation as the text the model was trained on.

    Args:
      messages: Turns, each with a `role` and a `content`.
      add_generation_prompt: Whether the text ends where a reply begins.

    Raises:
      ValueError: if the file has no chat template, a message lacks its role
        or content, or the template refuses the conversation.
    """
    if self._chat_template is None:
      raise ValueError("this model file has no chat template.")
    return render_chat(
      self._chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      bos_token=self._token(self._bos_id),
      eos_token=self._token(self._eos_id),
    )

  def _token_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = optional(metadata, key, None, int)
    if token_id is not None and not 0 <= token_id < self.vocab_size:
      raise ModelFileError(
        f"metadata {key}={token_id} must be in [0, {self.vocab_size})."
      )
    return token_id

  def _token(self, token_id: int | None) -> str:
    return "" if token_id is None else self._tokens[token_id]

  def _text_bytes(
    self, ids: Iterable[SupportsIndex], skip_special_tokens: bool
  ) -> bytes:
    pieces = []
    for token_id in map(operator.index, ids):
      if not 0 <= token_id < self.vocab_size:
        raise ValueError(f"{token_id=} must be in [0, {self.vocab_size}).")
      if not (skip_special_tokens and self._types[token_id] == _CONTROL):
        pieces.append(self._piece(token_id))
    return b"".join(pieces)

  def _piece(self, token_id: int) -> bytes:
    token = self._tokens[token_id]
    table = _byte_of_symbol()
    # Added tokens are spelled as they read; so is a token that uses a
    # character outside the byte alphabet.
    if self._types[token_id] in (_CONTROL, _USER_DEFINED) or not all(
      symbol in table for symbol in token
    ):
      return token.encode()
    return bytes(table[symbol] for symbol in token)


class StreamDecoder:
  """Decodes ids as they arrive, holding back unfinished characters.

  The pieces, joined, are `Tokenizer.decode` of all the ids.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
    self._tokenizer = tokenizer
    self._skip_special_tokens = skip_special_tokens
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text that `ids` complete.

    Raises:
      ValueError: if an id is outside the vocabulary.
    """
    return self._utf8.decode(
      self._tokenizer._text_bytes(ids, self._skip_special_tokens)
    )

  def finish(self) -> str:
    """Returns the rest: U+FFFD for a character that was never finished."""
    return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
  """Returns GPT-2's alphabet: the printable character of every byte.

  Printable Latin-1 bytes stand for themselves; the others are numbered from
  U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(0x100) if byte not in set(printable)]
  return {chr(byte): byte for byte in printable} | {
    chr(0x100 + i): byte for i, byte in enumerate(others)
  }


def _backend(
  metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Any:
  """Returns the `tokenizers.Tokenizer` that cuts and merges."""
  tokenizers = import_demo("tokenizers")
  pre = require(metadata, "tokenizer.ggml.pre", str)
  pre_tokenizer = _pre_tokenizer(pre)
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise ModelFileError("metadata tokenizer.ggml.tokens repeats a token.")
  merges = []
  for merge in require_texts(metadata, "tokenizer.ggml.merges"):
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocab.keys():
      raise ModelFileError(
        f"metadata tokenizer.ggml.merges has {merge!r}, which does not join "
        "two tokens to a third."
      )
    merges.append((left, right))
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"
    )
  )
  backend.pre_tokenizer = pre_tokenizer
  backend.add_tokens(
    [
      tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  return backend


def _pre_tokenizer(name: str) -> Any:
  """Returns the rule `name` that cuts text into words.

  Raises:
    NotImplementedError: if the rule is not known here.
  """
  tokenizers = import_demo("tokenizers")
  rules = tokenizers.pre_tokenizers
  splits = {
    "llama-bpe": (_LLAMA3_WORDS,),
    "default": _DEFAULT_SPLITS,
  }
  whole_words = rules.ByteLevel(add_prefix_space=False)
  if name == "gpt-2":
    return whole_words
  if name == "smollm":
    return rules.Sequence([rules.Digits(individual_digits=True), whole_words])
  if name not in splits:
    raise NotImplementedError(
      f"tokenizer.ggml.pre={name!r} is not supported: only "
      f"{', '.join(['gpt-2', 'smollm', *splits])} are."
    )
  return rules.Sequence(
    [rules.Split(tokenizers.Regex(s), "isolated") for s in splits[name]]
    + [rules.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
