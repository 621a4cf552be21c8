"""Byte-level BPE tokenizer, built from its vocabulary and merges.

Text is split into words before the merges apply. Model files name the rule
that splits; `_pre_tokenizer` has the rules that are supported.
"""

import enum
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from paged_jax.extras import import_demo
from paged_jax.text.chat_template import render_chat
from paged_jax.text.detokenize import StreamDecoder, token_bytes

_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
)
# Control tokens that end a turn or a message. Files of instruction models may
# give only the end of a document as `eos_token_id`.
_END_NAMES = frozenset(
  ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>"]
)
# The rule that llama.cpp uses if a file names none.
_DEFAULT_SPLITS = (
  r"[\p{P}\$\+<=>\^~\|]+",
  _GPT2_WORDS,
  r"\p{N}+",
  r"[0-9][0-9][0-9]",
)


class TokenKind(enum.Enum):
  """The kind of a token of the vocabulary."""

  TEXT = "text"  # spelled in the byte alphabet, formed by merges
  ADDED = "added"  # text that is matched as a whole, before any merge
  CONTROL = "control"  # matched as a whole, and not part of the text


class Tokenizer:
  """Converts text to token ids and back.

  Attributes:
    stop_token_ids: Ids that end a reply: the end of the sequence, of a turn and
      of a message, and control tokens that are known as such by their names.
  """

  def __init__(
    self,
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    pre: str,
    kinds: Sequence[TokenKind] | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    eot_token_id: int | None = None,
    eom_token_id: int | None = None,
    add_bos_token: bool = False,
    chat_template: str | None = None,
  ):
    """Builds the tokenizer. Error messages begin with the name of an argument.

    Args:
      tokens: The vocabulary; the index of a token is its id.
      merges: Pairs of tokens to merge, as `"left right"`, in order of priority.
      pre: Name of the rule that splits text into words: `"gpt-2"`, `"smollm"`,
        `"llama-bpe"` or `"default"`.
      kinds: Kind of each token; all are `TEXT` if None.
      bos_token_id: Start of a sequence.
      eos_token_id: End of a sequence.
      eot_token_id: End of a turn.
      eom_token_id: End of a message that calls a tool.
      add_bos_token: Whether `encode` prepends the start token.
      chat_template: Jinja source of the chat format.

    Raises:
      ValueError: If `kinds` or a token id does not fit `tokens`, `tokens` has a
        duplicate, or a merge does not join two tokens to a third.
      NotImplementedError: If `pre` is unknown.
      ModuleNotFoundError: If the `demo` extra is not installed.
    """
    self._tokens = tuple(tokens)
    if kinds is None:
      kinds = (TokenKind.TEXT,) * len(self._tokens)
    self._kinds = tuple(kinds)
    if len(self._kinds) != len(self._tokens):
      raise ValueError(
        f"kinds has {len(self._kinds)} entries for {len(self._tokens)} tokens."
      )
    self._backend = _backend(self._tokens, self._kinds, merges, pre)
    ids = dict(
      bos_token_id=bos_token_id,
      eos_token_id=eos_token_id,
      eot_token_id=eot_token_id,
      eom_token_id=eom_token_id,
    )
    for name, token_id in ids.items():
      if token_id is not None and not 0 <= token_id < self.vocab_size:
        raise ValueError(
          f"{name}={token_id} must be in [0, {self.vocab_size})."
        )
    self._bos_id, self._eos_id = bos_token_id, eos_token_id
    ends = [eos_token_id, eot_token_id, eom_token_id]
    for i, token in enumerate(self._tokens):
      if token in _END_NAMES and self._kinds[i] is TokenKind.CONTROL:
        ends.append(i)
    self.stop_token_ids = tuple(
      dict.fromkeys(token_id for token_id in ends if token_id is not None)
    )
    self._add_bos = add_bos_token
    self._chat_template = chat_template

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return len(self._tokens)

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of `text`.

    Special tokens that are spelled out in the text become their ids. The start
    token is prepended if `add_bos_token` is True and the text does not begin
    with it.

    Raises:
      ValueError: If the text has a lone surrogate, which UTF-8 cannot encode.
    """
    text.encode("utf-8")  # The library would report a wrong type instead.
    ids = self._backend.encode(text, add_special_tokens=False).ids
    if self._add_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
      ids.insert(0, self._bos_id)
    return ids

  def decode(
    self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True
  ) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

    Args:
      ids: Token ids, in `[0, vocab_size)`.
      skip_special_tokens: Whether to leave out control tokens.

    Raises:
      ValueError: If an id is outside `[0, vocab_size)`.
    """
    text = self._text_bytes(ids, skip_special_tokens)
    return text.decode("utf-8", errors="replace")

  def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
    """Returns a decoder for ids that arrive a few at a time."""
    return StreamDecoder(
      functools.partial(
        self._text_bytes, skip_special_tokens=skip_special_tokens
      )
    )

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns the conversation as text, in the model's chat format.

    Args:
      messages: Turns, each with a `role` and a `content`, both strings.
      add_generation_prompt: Whether to end the text with the start of a reply.

    Raises:
      ValueError: If there is no chat template, if a message lacks its role or
        content, or if the template fails or refuses the conversation.
      ModuleNotFoundError: If the `demo` extra is not installed.
    """
    if self._chat_template is None:
      raise ValueError("the model has no chat template.")
    return render_chat(
      self._chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      bos_token=self._token(self._bos_id),
      eos_token=self._token(self._eos_id),
    )

  def _token(self, token_id: int | None) -> str:
    return "" if token_id is None else self._tokens[token_id]

  def _text_bytes(
    self, ids: Iterable[SupportsIndex], skip_special_tokens: bool
  ) -> bytes:
    pieces = []
    for token_id in map(operator.index, ids):
      if not 0 <= token_id < self.vocab_size:
        raise ValueError(f"{token_id=} must be in [0, {self.vocab_size}).")
      kind = self._kinds[token_id]
      if not (skip_special_tokens and kind is TokenKind.CONTROL):
        is_added = kind is not TokenKind.TEXT
        pieces.append(token_bytes(self._tokens[token_id], is_added=is_added))
    return b"".join(pieces)


def _backend(
  tokens: Sequence[str],
  kinds: Sequence[TokenKind],
  merges: Sequence[str],
  pre: str,
) -> Any:
  """Returns the `tokenizers.Tokenizer` that splits and merges."""
  tokenizers = import_demo("tokenizers")
  pre_tokenizer = _pre_tokenizer(pre)
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise ValueError("tokens repeats a token.")
  pairs = []
  for merge in merges:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocab.keys():
      raise ValueError(
        f"merges has {merge!r}, which does not join two tokens to a third."
      )
    pairs.append((left, right))
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"
    )
  )
  backend.pre_tokenizer = pre_tokenizer
  backend.add_tokens(
    [
      tokenizers.AddedToken(
        token, special=kind is TokenKind.CONTROL, normalized=False
      )
      for token, kind in zip(tokens, kinds, strict=True)
      if kind is not TokenKind.TEXT
    ]
  )
  return backend


def _pre_tokenizer(pre: str) -> Any:
  """Returns the rule that splits text into words.

  Raises:
    NotImplementedError: If the rule is unknown.
  """
  tokenizers = import_demo("tokenizers")
  rules = tokenizers.pre_tokenizers
  splits = {
    "llama-bpe": (_LLAMA3_WORDS,),
    "default": _DEFAULT_SPLITS,
  }
  whole_words = rules.ByteLevel(add_prefix_space=False)
  if pre == "gpt-2":
    return whole_words
  if pre == "smollm":
    return rules.Sequence([rules.Digits(individual_digits=True), whole_words])
  if pre not in splits:
    raise NotImplementedError(
      f"{pre=} is not supported: only "
      f"{', '.join(['gpt-2', 'smollm', *splits])} are."
    )
  return rules.Sequence(
    [rules.Split(tokenizers.Regex(s), "isolated") for s in splits[pre]]
    + [rules.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
