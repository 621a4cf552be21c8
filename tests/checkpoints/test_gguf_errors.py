import re
import sys

import gguf as gguf_format
import numpy as np
import pytest
import tiny_gguf

from paged_jax.checkpoints import gguf
from paged_jax.checkpoints.metadata import ModelFileError


@pytest.fixture
def path(tmp_path):
  return tmp_path / "tiny.gguf"


@pytest.fixture
def no_dequantise(monkeypatch):
  """Fails the test if a weight is dequantised."""

  def dequantize(data, qtype):
    raise AssertionError("a weight was dequantised")

  monkeypatch.setattr(gguf_format.quants, "dequantize", dequantize)


def _assert_refused(path, error, *words):
  """Asserts that the file is refused with one line that names it."""
  with pytest.raises(error) as caught:
    gguf.load(path)
  message = str(caught.value)
  assert message.startswith(f"{path}: ")
  assert "\n" not in message
  for word in words:
    assert word in message


def test_missing_file_is_named(path):
  _assert_refused(path, FileNotFoundError, "no such file")


def test_directory_is_refused(tmp_path):
  _assert_refused(tmp_path, ModelFileError, "not a regular file")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(100)])
def test_file_of_another_format_is_refused(path, content):
  path.write_bytes(content)
  _assert_refused(path, ModelFileError, "not a GGUF file")


def test_file_of_unknown_version_is_refused(path):
  content = bytearray(tiny_gguf.write(path).read_bytes())
  content[4] = 99
  path.write_bytes(content)
  _assert_refused(path, ModelFileError, "99")


def test_truncated_file_is_refused_wherever_it_ends(path, no_dequantise):
  content = tiny_gguf.write(path).read_bytes()
  ends = np.linspace(4, len(content) - 1, 60).astype(int)
  for end in [*ends, *range(4, 64), *range(len(content) - 40, len(content))]:
    path.write_bytes(content[:end])
    _assert_refused(path, ModelFileError, "truncated or damaged")


def test_big_endian_file_is_refused(path):
  writer = gguf_format.GGUFWriter(
    path, "llama", endianess=gguf_format.GGUFEndian.BIG
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  _assert_refused(path, NotImplementedError, "big-endian")


@pytest.mark.parametrize(
  "key",
  [
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
  ],
)
def test_missing_metadata_key_is_named(path, no_dequantise, key):
  tiny_gguf.write(path, tiny_gguf.metadata({key: None}))
  _assert_refused(path, ModelFileError, repr(key), "missing")


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("llama.block_count", "two", "llama.block_count='two'"),
    ("llama.block_count", 0, "num_layers=0"),
    ("llama.embedding_length", 65, "hidden_size=65"),
    ("llama.attention.head_count", 0, "num_q_heads=0"),
    ("llama.attention.head_count_kv", 3, "num_kv_heads=3"),
    ("llama.rope.freq_base", 5000, "llama.rope.freq_base=5000"),
    ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens"),
    ("tokenizer.ggml.token_type", [1], "tokenizer.ggml.token_type"),
    ("tokenizer.ggml.merges", ["q z"], "'q z'"),
    ("tokenizer.ggml.merges", ["he"], "'he'"),
    ("tokenizer.ggml.eos_token_id", 9999, "tokenizer.ggml.eos_token_id=9999"),
  ],
)
def test_wrong_metadata_value_is_named(path, no_dequantise, key, value, words):
  tiny_gguf.write(path, tiny_gguf.metadata({key: value}))
  _assert_refused(path, ModelFileError, words)


def test_repeated_token_is_refused(path, no_dequantise):
  changes = {"tokenizer.ggml.tokens": [*tiny_gguf.TOKENS[:-1], "a"]}
  tiny_gguf.write(path, tiny_gguf.metadata(changes))
  _assert_refused(path, ModelFileError, "tokenizer.ggml.tokens")


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k.weight"])
def test_missing_tensor_is_named(path, no_dequantise, name):
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  del stored[name]
  tiny_gguf.write(path, stored=stored)
  _assert_refused(path, ModelFileError, repr(name), "missing")


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("token_embd.weight", (tiny_gguf.VOCAB_SIZE + 1, 64)),
    ("token_embd.weight", (64, tiny_gguf.VOCAB_SIZE)),
    ("blk.1.ffn_norm.weight", (63,)),
    ("blk.0.attn_k.weight", (64, 64)),
  ],
)
def test_wrong_tensor_shape_is_named(path, no_dequantise, name, shape):
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  expected = stored[name].shape
  stored[name] = np.zeros(shape, np.float32)
  tiny_gguf.write(path, stored=stored)
  _assert_refused(path, ModelFileError, repr(name), f"{shape=}", f"{expected}")


def test_other_architecture_is_named(path, no_dequantise):
  tiny_gguf.write(path, tiny_gguf.metadata({"general.architecture": "qwen2"}))
  _assert_refused(path, NotImplementedError, "'qwen2'", "'llama'")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("llama.rope.scaling.type", "yarn"),
    ("llama.rope.scaling.factor", 4.0),
    ("llama.rope.scale_linear", 2.0),
    ("split.count", 3),
    ("llama.rope.dimension_count", 8),
    ("llama.attention.value_length", 8),
    ("llama.attention.sliding_window", 4096),
    ("llama.expert_count", 8),
    ("tokenizer.ggml.model", "llama"),
    ("tokenizer.ggml.pre", "qwen2"),
  ],
)
def test_unsupported_feature_is_named(path, no_dequantise, key, value):
  tiny_gguf.write(path, tiny_gguf.metadata({key: value}))
  _assert_refused(path, NotImplementedError, key, repr(value))


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("llama.rope.scaling.type", "none"),
    ("llama.rope.scaling.type", "linear"),
    ("llama.rope.scaling.factor", 1.0),
    ("llama.rope.scaling.original_context_length", 4096),
    ("llama.rope.scale_linear", 1.0),
    ("llama.expert_count", 0),
    ("split.count", 1),
  ],
)
def test_feature_that_is_off_is_accepted(path, key, value):
  tiny_gguf.write(path, tiny_gguf.metadata({key: value}))
  assert gguf.load(path).config.num_layers == 2


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_unsupported_tensor_is_named(path, no_dequantise, name):
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  stored[name] = np.ones(8, np.float32)
  tiny_gguf.write(path, stored=stored)
  _assert_refused(path, NotImplementedError, repr(name))


def test_tensor_type_that_cannot_be_decoded_is_named(path):
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  stored["output_norm.weight"] = np.ones(64, np.int32)
  tiny_gguf.write(path, stored=stored)
  _assert_refused(path, NotImplementedError, "'output_norm.weight'", "I32")


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_missing_extra_says_what_to_install(path, monkeypatch, package):
  tiny_gguf.write(path)
  monkeypatch.setitem(sys.modules, package, None)
  words = re.escape("pip install 'paged-jax[demo]'")
  with pytest.raises(ModuleNotFoundError, match=words):
    gguf.load(path)
