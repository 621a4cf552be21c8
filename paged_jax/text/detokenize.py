"""Token ids back to text: the bytes of a token, and text that arrives late."""

import codecs
import functools
from collections.abc import Callable, Iterable
from typing import SupportsIndex


def token_bytes(token: str, *, is_added: bool) -> bytes:
  """Returns the bytes that a token of a byte-level BPE stands for.

  Args:
    token: As the vocabulary spells it.
    is_added: Whether it was added to the vocabulary as a whole: it is then
      spelled as it reads. So is a token with a character outside the byte
      alphabet.
  """
  table = _byte_of_symbol()
  if is_added or not all(symbol in table for symbol in token):
    return token.encode()
  return bytes(table[symbol] for symbol in token)


class StreamDecoder:
  """Decodes ids as they arrive, holding back unfinished characters.

  The texts it returns, joined, are those of all the ids at once.
  """

  def __init__(self, to_bytes: Callable[[Iterable[SupportsIndex]], bytes]):
    """Starts with no ids.

    Args:
      to_bytes: Returns the UTF-8 bytes of some ids.
    """
    self._to_bytes = to_bytes
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text that `ids` complete.

    Raises:
      ValueError: if an id is outside the vocabulary.
    """
    return self._utf8.decode(self._to_bytes(ids))

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
