"""Converts token ids to text: bytes of tokens, and tokens that arrive late."""

import codecs
import functools
from collections.abc import Callable, Iterable
from typing import SupportsIndex


def token_bytes(token: str, *, is_added: bool) -> bytes:
  """Returns the bytes of a token of a byte-level BPE.

  Args:
    token: The token as the vocabulary spells it.
    is_added: Whether the token was added to the vocabulary as a whole. Such
      tokens, and tokens with a character outside the byte alphabet, are spelled
      as plain text.
  """
  table = _byte_of_symbol()
  if is_added or not all(symbol in table for symbol in token):
    return token.encode()
  return bytes(table[symbol] for symbol in token)


class StreamDecoder:
  """Decodes token ids as they arrive, holding back incomplete characters.

  The returned texts, joined, are the text of all ids.
  """

  def __init__(self, to_bytes: Callable[[Iterable[SupportsIndex]], bytes]):
    """Creates a decoder without ids.

    Args:
      to_bytes: Returns the UTF-8 bytes of some ids.
    """
    self._to_bytes = to_bytes
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text that `ids` complete.

    Raises:
      ValueError: If an id is outside the vocabulary.
    """
    return self._utf8.decode(self._to_bytes(ids))

  def finish(self) -> str:
    """Returns the remaining text: U+FFFD for an incomplete character."""
    return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
  """Returns GPT-2's byte alphabet: the byte of each printable character.

  Printable Latin-1 bytes map to themselves; the others are numbered from
  U+0100.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(0x100) if byte not in set(printable)]
  return {chr(byte): byte for byte in printable} | {
    chr(0x100 + i): byte for i, byte in enumerate(others)
  }
