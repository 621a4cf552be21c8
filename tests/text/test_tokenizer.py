import re
import sys

import numpy as np
import pytest
import tiny_gguf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.text.tokenizer import Tokenizer, TokenKind

KINDS = [TokenKind.CONTROL] * 3 + [TokenKind.ADDED]
KINDS += [TokenKind.TEXT] * (tiny_gguf.VOCAB_SIZE - 4)


def _tokenizer(**changes):
  values = dict(
    tokens=tiny_gguf.TOKENS,
    merges=tiny_gguf.MERGES,
    pre="smollm",
    kinds=KINDS,
    bos_token_id=1,
    eos_token_id=2,
    chat_template=tiny_gguf.CHAT_TEMPLATE,
  )
  return Tokenizer(**(values | changes))


def _tokens(tokenizer, text):
  return [tiny_gguf.TOKENS[token_id] for token_id in tokenizer.encode(text)]


TINY = _tokenizer()
IDS = st.integers(0, tiny_gguf.VOCAB_SIZE - 1)


@pytest.mark.parametrize(
  ("pre", "text", "tokens"),
  [
    # Digits stand alone, so the blanks before them stay together.
    ("smollm", "  123", ["ĠĠ", "1", "2", "3"]),
    ("gpt-2", "  123", ["Ġ", "Ġ", "123"]),
    # Digits form groups of three from the left; a newline joins no word.
    ("llama-bpe", "1234\n", ["123", "4", "Ċ"]),
    ("default", "1234", ["123", "4"]),
    ("gpt-2", "hello!", ["hello", "!"]),
    ("default", "hello wo!", ["hello", "Ġwo", "!"]),
    ("smollm", "hello", ["hello"]),
  ],
)
def test_words_are_cut_by_the_rule_that_is_named(pre, text, tokens):
  tokenizer = _tokenizer(pre=pre)
  assert _tokens(tokenizer, text) == tokens


def test_merges_apply_in_their_order():
  tokenizer = _tokenizer(merges=["l l", "h e", "he ll", "hell o"])
  assert _tokens(tokenizer, "hello") == ["hello"]
  tokenizer = _tokenizer(merges=["h e", "l l", "hell o"])
  assert _tokens(tokenizer, "hello") == ["he", "ll", "o"]


@settings(deadline=None)
@given(st.text())
def test_decode_undoes_encode(text):
  ids = TINY.encode(text)
  assert TINY.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(st.lists(IDS))
def test_decode_equals_the_tokenizers_library(ids):
  backend = TINY._backend
  backend.decoder = tokenizers.decoders.ByteLevel()
  for skip in (True, False):
    expected = backend.decode(ids, skip_special_tokens=skip)
    assert TINY.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_in_the_text_are_recognised():
  assert TINY.encode("<|im_start|>he<|im_end|><tool>") == [
    1,
    tiny_gguf.TOKENS.index("he"),
    2,
    3,
  ]


def test_decode_skips_control_tokens_but_not_user_defined_ones():
  ids = TINY.encode("<|im_start|>he<tool><|im_end|>")
  assert TINY.decode(ids) == "he<tool>"
  assert (
    TINY.decode(ids, skip_special_tokens=False)
    == "<|im_start|>he<tool><|im_end|>"
  )


def _with_token(token, kind, **changes):
  """Returns a tokenizer whose last token is `token`."""
  tokens = [*tiny_gguf.TOKENS, token]
  return _tokenizer(tokens=tokens, kinds=[*KINDS, kind], **changes)


@pytest.mark.parametrize("token", ["né", "n e"])
def test_added_tokens_are_spelled_as_they_read(token):
  tokenizer = _with_token(token, TokenKind.ADDED)
  assert tokenizer.encode(token) == [tiny_gguf.VOCAB_SIZE]
  assert tokenizer.decode([tiny_gguf.VOCAB_SIZE]) == token


@pytest.mark.parametrize(
  ("pre", "whole"), [("llama-bpe", True), ("gpt-2", False)]
)
def test_only_llama3_takes_whole_words_that_no_merge_makes(pre, whole):
  tokenizer = _with_token("abc", TokenKind.TEXT, pre=pre)
  assert (tokenizer.encode("abc") == [tiny_gguf.VOCAB_SIZE]) == whole


@pytest.mark.parametrize("token_id", [-1, tiny_gguf.VOCAB_SIZE])
def test_decode_refuses_ids_outside_the_vocabulary(token_id):
  with pytest.raises(ValueError, match=f"{token_id=}"):
    TINY.decode([token_id])
  with pytest.raises(ValueError, match=f"{token_id=}"):
    TINY.stream().push([token_id])


def test_decode_takes_arrays():
  assert TINY.decode(np.array(TINY.encode("hello"), np.int32)) == "hello"


def test_encode_refuses_lone_surrogates():
  with pytest.raises(ValueError, match="surrogates"):
    TINY.encode("a\ud800")


def test_start_token_is_put_in_front_once():
  tokenizer = _tokenizer(add_bos_token=True)
  assert tokenizer.encode("he")[0] == 1
  assert tokenizer.encode("<|im_start|>he") == tokenizer.encode("he")
  assert tokenizer.encode("") == [1]
  assert TINY.encode("") == []


@pytest.mark.parametrize(
  ("eos", "eot", "stop"),
  [
    (2, None, (2,)),
    (2, 0, (2, 0)),
    (2, 2, (2,)),
    (None, 0, (0, 2)),  # <|im_end|> is an end by its name
    (None, None, (2,)),
  ],
)
def test_stop_tokens_end_a_sequence_or_a_turn(eos, eot, stop):
  tokenizer = _tokenizer(eos_token_id=eos, eot_token_id=eot)
  assert tokenizer.stop_token_ids == stop


def test_vocab_size_counts_the_tokens():
  assert TINY.vocab_size == tiny_gguf.VOCAB_SIZE


@settings(deadline=None)
@given(st.lists(st.lists(IDS, max_size=5)), st.booleans())
def test_streamed_pieces_join_to_the_whole(pushes, skip):
  stream = TINY.stream(skip_special_tokens=skip)
  text = "".join(stream.push(ids) for ids in pushes) + stream.finish()
  whole = [token_id for ids in pushes for token_id in ids]
  assert text == TINY.decode(whole, skip_special_tokens=skip)


@settings(deadline=None)
@given(st.text())
def test_stream_never_hands_out_half_a_character(text):
  stream = TINY.stream()
  ids = TINY.encode(text)
  pieces = [stream.push([token_id]) for token_id in ids]
  assert stream.finish() == ""
  # Half a character would be shown as a replacement character.
  assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_stream_hands_out_text_as_soon_as_it_is_complete():
  stream = TINY.stream()
  ids = TINY.encode("é!")
  assert [stream.push([token_id]) for token_id in ids] == ["", "é", "!"]


def test_stream_ends_with_a_mark_for_an_unfinished_character():
  stream = TINY.stream()
  assert stream.push(TINY.encode("é")[:1]) == ""
  assert stream.finish() == "\ufffd"


def test_chat_template_writes_the_conversation():
  messages = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "wo"},
  ]
  turns = (
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nwo<|im_end|>\n"
  )
  assert TINY.apply_chat_template(messages) == turns + "<|im_start|>assistant\n"
  assert TINY.apply_chat_template(messages, False) == turns


def test_chat_template_may_refuse_a_conversation():
  messages = [{"role": "critic", "content": "bad"}]
  with pytest.raises(ValueError, match="no critics"):
    TINY.apply_chat_template(messages)


@pytest.mark.parametrize(
  "template",
  ["{% for", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ x.y }}"],
)
def test_chat_template_that_is_broken_or_unsafe_is_refused(template):
  tokenizer = _tokenizer(chat_template=template)
  with pytest.raises(ValueError, match="the chat template failed"):
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
  "message", [{"content": "x"}, {"role": "user"}, {"role": "a", "content": 1}]
)
def test_message_without_role_or_content_is_named(message):
  messages = [{"role": "user", "content": "x"}, message]
  with pytest.raises(ValueError, match=re.escape(f"messages[1]={message!r}")):
    TINY.apply_chat_template(messages)


def test_missing_chat_template_is_an_error():
  tokenizer = _tokenizer(chat_template=None)
  with pytest.raises(ValueError, match="no chat template"):
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_missing_jinja_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  words = re.escape("pip install 'paged-jax[demo]'")
  with pytest.raises(ModuleNotFoundError, match=words):
    TINY.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
  ("changes", "error", "words"),
  [
    ({"kinds": KINDS[1:]}, ValueError, "kinds has"),
    ({"tokens": [*tiny_gguf.TOKENS[:-1], "a"]}, ValueError, "tokens repeats"),
    ({"merges": ["q z"]}, ValueError, "merges has 'q z'"),
    ({"merges": ["he"]}, ValueError, "merges has 'he'"),
    ({"eos_token_id": 9999}, ValueError, "eos_token_id=9999"),
    ({"bos_token_id": -1}, ValueError, "bos_token_id=-1"),
    ({"pre": "qwen2"}, NotImplementedError, "pre='qwen2'"),
  ],
)
def test_an_error_begins_with_the_argument(changes, error, words):
  with pytest.raises(error, match=f"^{re.escape(words)}"):
    _tokenizer(**changes)


def test_tokens_are_text_unless_their_kinds_are_given():
  tokenizer = _tokenizer(kinds=None)
  assert _tokens(tokenizer, "<tool>")[0] == "<"
  assert tokenizer.decode([0]) == "<|endoftext|>"
