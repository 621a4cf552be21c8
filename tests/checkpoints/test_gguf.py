import dataclasses

import gguf as gguf_format
import numpy as np
import pytest
import tiny_gguf

from paged_jax.checkpoints import gguf
from paged_jax.models.config import LlamaConfig


@pytest.fixture
def path(tmp_path):
  return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_survive_the_round_trip(path, tied):
  weights = tiny_gguf.weights(tied=tied)
  tiny_gguf.write(path, stored=tiny_gguf.tensors(weights))
  loaded = gguf.load(path).weights
  assert loaded.keys() == weights.keys()
  for name, weight in weights.items():
    assert loaded[name].dtype == np.float32
    np.testing.assert_array_equal(loaded[name], weight, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_config_states_the_metadata(path, tied):
  tiny_gguf.write(path, stored=tiny_gguf.tensors(tiny_gguf.weights(tied=tied)))
  assert gguf.load(path).config == LlamaConfig(
    vocab_size=tiny_gguf.VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=5000.0,
    rms_norm_eps=2.0**-16,
    max_len=128,
    tie_word_embeddings=tied,
  )


def test_config_has_the_defaults_of_the_format(path):
  absent = {
    "llama.rope.freq_base": None,
    "llama.rope.dimension_count": None,
    "llama.attention.head_count_kv": None,
  }
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  for i in range(tiny_gguf.NUM_LAYERS):
    for name in "kv":
      stored[f"blk.{i}.attn_{name}.weight"] = stored[f"blk.{i}.attn_q.weight"]
  tiny_gguf.write(path, tiny_gguf.metadata(absent), stored)
  config = gguf.load(path).config
  assert config.rope_theta == 10000.0
  assert config.num_kv_heads == config.num_q_heads == 4
  assert config.head_dim == 16


def test_heads_may_be_wider_than_the_hidden_size_says(path):
  changes = {
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.rope.dimension_count": 32,
  }
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  for i in range(tiny_gguf.NUM_LAYERS):
    for name in "qkv":
      weight = stored[f"blk.{i}.attn_{name}.weight"]
      stored[f"blk.{i}.attn_{name}.weight"] = np.tile(weight, (2, 1))
    weight = stored[f"blk.{i}.attn_output.weight"]
    stored[f"blk.{i}.attn_output.weight"] = np.tile(weight, (1, 2))
  tiny_gguf.write(path, tiny_gguf.metadata(changes), stored)
  checkpoint = gguf.load(path)
  assert checkpoint.config.head_dim == 32
  shape = checkpoint.weights["model.layers.0.self_attn.q_proj.weight"].shape
  assert shape == (128, 64)


def _rotate_interleaved(x, angles):
  """Rotates pairs (2j, 2j + 1), as llama.cpp does for the stored rows."""
  out = np.empty_like(x)
  for j, angle in enumerate(angles):
    a, b = x[2 * j], x[2 * j + 1]
    out[2 * j] = a * np.cos(angle) - b * np.sin(angle)
    out[2 * j + 1] = a * np.sin(angle) + b * np.cos(angle)
  return out


def _rotate_half_split(x, angles):
  """Rotates pairs (j, j + d/2), as Hugging Face models do."""
  half = len(x) // 2
  out = np.empty_like(x)
  for j, angle in enumerate(angles):
    a, b = x[j], x[j + half]
    out[j] = a * np.cos(angle) - b * np.sin(angle)
    out[j + half] = a * np.sin(angle) + b * np.cos(angle)
  return out


def test_half_split_rotary_gives_the_scores_of_the_stored_order(path):
  stored = tiny_gguf.tensors(tiny_gguf.weights(seed=1))
  tiny_gguf.write(path, stored=stored)
  loaded = gguf.load(path).weights
  rng = np.random.default_rng(2)
  x_q, x_k = rng.standard_normal((2, tiny_gguf.HIDDEN_SIZE))
  head_dim = tiny_gguf.HEAD_DIM
  frequencies = 5000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
  for q_head in range(tiny_gguf.NUM_Q_HEADS):
    scores = {}
    for rotate, q_weight, k_weight in (
      (
        _rotate_interleaved,
        stored["blk.1.attn_q.weight"],
        stored["blk.1.attn_k.weight"],
      ),
      (
        _rotate_half_split,
        loaded["model.layers.1.self_attn.q_proj.weight"],
        loaded["model.layers.1.self_attn.k_proj.weight"],
      ),
    ):
      kv_head = q_head * tiny_gguf.NUM_KV_HEADS // tiny_gguf.NUM_Q_HEADS
      q = (q_weight.astype(np.float64) @ x_q).reshape(-1, head_dim)[q_head]
      k = (k_weight.astype(np.float64) @ x_k).reshape(-1, head_dim)[kv_head]
      q, k = rotate(q, 11 * frequencies), rotate(k, 4 * frequencies)
      scores[rotate] = q @ k
    stored_score, loaded_score = scores.values()
    np.testing.assert_allclose(loaded_score, stored_score, rtol=1e-12)


def _dequantise_q4_1(blocks):
  """Decodes rows of blocks: f16 scale, f16 minimum, 32 4-bit values."""
  rows = []
  for row in blocks:
    values = []
    for block in row.reshape(-1, 20):
      scale, minimum = block[:4].view(np.float16).astype(np.float32)
      low = [int(byte) & 15 for byte in block[4:]]
      high = [int(byte) >> 4 for byte in block[4:]]
      values += [scale * v + minimum for v in low + high]
    rows.append(values)
  return np.array(rows, np.float32)


def _dequantise_q8_0(blocks):
  """Decodes rows of blocks: f16 scale, 32 8-bit values."""
  rows = []
  for row in blocks:
    values = []
    for block in row.reshape(-1, 34):
      scale = block[:2].view(np.float16).astype(np.float32)[0]
      values += [scale * v for v in block[2:].view(np.int8)]
    rows.append(values)
  return np.array(rows, np.float32)


@pytest.mark.parametrize(
  ("kind", "dequantise"),
  [("Q4_1", _dequantise_q4_1), ("Q8_0", _dequantise_q8_0)],
)
def test_quantised_weights_are_decoded(path, kind, dequantise):
  kind = gguf_format.GGMLQuantizationType[kind]
  stored = tiny_gguf.tensors(tiny_gguf.weights())
  quants = {"token_embd.weight": kind, "blk.0.attn_q.weight": kind}
  tiny_gguf.write(path, stored=stored, quants=quants)
  loaded = gguf.load(path).weights
  expected = {
    name: dequantise(gguf_format.quants.quantize(stored[name], kind))
    for name in quants
  }
  np.testing.assert_array_equal(
    loaded["model.embed_tokens.weight"], expected["token_embd.weight"]
  )
  np.testing.assert_array_equal(
    tiny_gguf.interleave(
      loaded["model.layers.0.self_attn.q_proj.weight"], tiny_gguf.NUM_Q_HEADS
    ),
    expected["blk.0.attn_q.weight"],
  )


def test_weights_can_be_read_after_the_file_is_removed(path):
  tiny_gguf.write(path)
  weights = gguf.load(path).weights
  before = dict(weights)
  path.unlink()
  for name, weight in weights.items():
    np.testing.assert_array_equal(weight, before[name])


# The tests' own type checks read an item of every mapping.
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_weight_is_dequantised_only_when_it_is_asked_for(path, monkeypatch):
  tiny_gguf.write(path)
  asked = []
  original = gguf._weight
  monkeypatch.setattr(
    gguf, "_weight", lambda *args: asked.append(1) or original(*args)
  )
  weights = gguf.load(path).weights
  assert not asked
  assert weights["model.norm.weight"].ndim == 1
  assert len(asked) == 1


def test_checkpoint_is_frozen(path):
  checkpoint = gguf.load(tiny_gguf.write(path))
  with pytest.raises(dataclasses.FrozenInstanceError):
    checkpoint.config = None


@pytest.mark.slow
@pytest.mark.model
def test_demo_model_loads(demo_path):
  checkpoint = gguf.load(demo_path)
  assert checkpoint.config == LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    rms_norm_eps=float(np.float32(1e-5)),
    max_len=8192,
    tie_word_embeddings=True,
  )
  assert sum(w.size for w in checkpoint.weights.values()) == 134_515_008
  assert all(np.isfinite(w).all() for w in checkpoint.weights.values())
