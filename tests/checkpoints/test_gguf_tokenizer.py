"""The tokenizer of a GGUF file, from made metadata and from the demo model."""

import json
from pathlib import Path

import pytest
import tiny_gguf

from paged_jax.checkpoints import gguf
from paged_jax.checkpoints.gguf_tokenizer import tokenizer_of
from paged_jax.checkpoints.metadata import ModelFileError

REFERENCE = Path(__file__).parents[1] / "data" / "demo_reference.json"


def _tokenizer(changes=None):
  return tokenizer_of(tiny_gguf.metadata(changes))


def _tokens(tokenizer, text):
  return [tiny_gguf.TOKENS[token_id] for token_id in tokenizer.encode(text)]


def test_vocabulary_and_merges_are_those_of_the_file():
  assert _tokenizer().vocab_size == tiny_gguf.VOCAB_SIZE
  assert _tokens(_tokenizer(), "hello") == ["hello"]
  changes = {"tokenizer.ggml.merges": ["h e", "l l", "hell o"]}
  assert _tokens(_tokenizer(changes), "hello") == ["he", "ll", "o"]


def test_words_are_cut_by_the_rule_the_file_names():
  assert _tokens(_tokenizer(), "123") == ["1", "2", "3"]
  changes = {"tokenizer.ggml.pre": "gpt-2"}
  assert _tokens(_tokenizer(changes), "123") == ["123"]


def test_types_say_which_tokens_are_matched_whole_and_which_are_no_text():
  ids = _tokenizer().encode("<|im_start|>he<tool><|im_end|>")
  assert ids == [1, tiny_gguf.TOKENS.index("he"), 3, 2]
  assert _tokenizer().decode(ids) == "he<tool>"
  plain = _tokenizer({"tokenizer.ggml.token_type": None})
  assert plain.decode(ids) == "<|im_start|>he<tool><|im_end|>"
  assert len(plain.encode("<tool>")) > 1


@pytest.mark.parametrize("asks", [True, False, None])
def test_start_token_is_put_in_front_where_the_file_asks_for_it(asks):
  tokenizer = _tokenizer({"tokenizer.ggml.add_bos_token": asks})
  assert tokenizer.encode("") == ([1] if asks else [])


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
def test_stop_tokens_are_those_of_the_file(eos, eot, stop):
  tokenizer = _tokenizer(
    {
      "tokenizer.ggml.eos_token_id": eos,
      "tokenizer.ggml.eot_token_id": eot,
    }
  )
  assert tokenizer.stop_token_ids == stop


NAMES = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>"]


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_that_end_a_turn_are_known_by_name(name):
  tokens = ["<|end_of_text|>", "<s>", name, *tiny_gguf.TOKENS[3:]]
  changes = {
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.eom_token_id": 1,
  }
  assert _tokenizer(changes).stop_token_ids == (0, 1, 2)
  types = tiny_gguf.metadata()["tokenizer.ggml.token_type"]
  plain = changes | {"tokenizer.ggml.token_type": [*types[:2], 1, *types[3:]]}
  assert _tokenizer(plain).stop_token_ids == (0, 1)


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
@pytest.mark.parametrize(("add_bos", "ids"), [(None, [1]), (False, [])])
def test_files_of_llama_3_begin_with_the_start_token(pre, add_bos, ids):
  changes = {
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.add_bos_token": add_bos,
  }
  assert _tokenizer(changes).encode("") == ids


def test_a_file_that_names_no_rule_for_words_gets_the_default():
  with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre"):
    tokenizer = _tokenizer({"tokenizer.ggml.pre": None})
  expected = _tokenizer({"tokenizer.ggml.pre": "default"})
  for text in ("12345 hello, world", "a+b=c  d"):
    assert tokenizer.encode(text) == expected.encode(text)


def test_chat_template_is_that_of_the_file():
  messages = [{"role": "user", "content": "hello"}]
  text = _tokenizer().apply_chat_template(messages)
  assert text.startswith("<|im_start|>user\nhello<|im_end|>")
  tokenizer = _tokenizer({"tokenizer.chat_template": None})
  with pytest.raises(ValueError, match="no chat template"):
    tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    (
      {"tokenizer.ggml.token_type": [1]},
      ModelFileError,
      "metadata tokenizer.ggml.token_type has 1 entries for "
      f"{tiny_gguf.VOCAB_SIZE} tokens.",
    ),
    (
      {"tokenizer.ggml.tokens": [*tiny_gguf.TOKENS[:-1], "a"]},
      ModelFileError,
      "metadata tokenizer.ggml.tokens repeats a token.",
    ),
    (
      {"tokenizer.ggml.merges": ["q z"]},
      ModelFileError,
      "metadata tokenizer.ggml.merges has 'q z', which does not join two "
      "tokens to a third.",
    ),
    (
      {"tokenizer.ggml.bos_token_id": -1},
      ModelFileError,
      "metadata tokenizer.ggml.bos_token_id=-1 must be in "
      f"[0, {tiny_gguf.VOCAB_SIZE}).",
    ),
    (
      {"tokenizer.ggml.pre": "qwen2"},
      NotImplementedError,
      "tokenizer.ggml.pre='qwen2' is not supported: only gpt-2, smollm, "
      "llama-bpe, default are.",
    ),
  ],
)
def test_an_error_names_the_key(changes, error, message):
  with pytest.raises(error) as caught:
    _tokenizer(changes)
  assert str(caught.value) == message


@pytest.fixture(scope="module")
def reference():
  return json.loads(REFERENCE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo_tokenizer(demo_path):
  return gguf.load(demo_path).tokenizer


@pytest.mark.slow
@pytest.mark.model
def test_demo_encodes_as_the_reference(demo_tokenizer, reference):
  for prompt in reference["prompts"]:
    ids = demo_tokenizer.encode(prompt["text"])
    assert ids == prompt["prompt_token_ids"], prompt["name"]
  for encoding in reference["encodings"]:
    assert demo_tokenizer.encode(encoding["text"]) == encoding["ids"]


@pytest.mark.slow
@pytest.mark.model
def test_demo_decodes_what_it_encodes(demo_tokenizer, reference):
  for example in [*reference["prompts"], *reference["encodings"]]:
    ids = demo_tokenizer.encode(example["text"])
    text = demo_tokenizer.decode(ids, skip_special_tokens=False)
    assert text == example["text"]


@pytest.mark.slow
@pytest.mark.model
def test_demo_renders_chats_as_the_reference(demo_tokenizer, reference):
  chat = reference["chat"]
  render = demo_tokenizer.apply_chat_template
  assert render(chat["messages"]) == chat["text"]
  assert (
    render(chat["messages"], add_generation_prompt=False)
    == chat["text_without_generation_prompt"]
  )


@pytest.mark.slow
@pytest.mark.model
def test_demo_stops_at_the_end_of_a_turn(demo_tokenizer):
  assert demo_tokenizer.stop_token_ids == tuple(
    demo_tokenizer.encode("<|im_end|>")
  )
