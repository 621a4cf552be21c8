"""Reads GGUF files, the format of llama.cpp, of the Llama architecture.

All errors of a file are found in its header, before any weight is dequantised.
"""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paged_jax.checkpoints import gguf_file
from paged_jax.checkpoints.gguf_file import Tensor
from paged_jax.checkpoints.gguf_tokenizer import tokenizer_of
from paged_jax.checkpoints.metadata import (
  ModelFileError,
  optional,
  require,
  strings,
)
from paged_jax.extras import import_demo
from paged_jax.models.config import LlamaConfig
from paged_jax.text.tokenizer import Tokenizer

_ARCHITECTURE = "llama"
# Keys of features that are not implemented and would change the output. A file
# may have them with a value that turns the feature off.
_UNSUPPORTED_KEYS = (
  "llama.expert_",
  "llama.attention.sliding_window",
)
_OFF = (0, "none")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model file, with its weights still on disk.

  Attributes:
    config: The hyperparameters.
    weights: Float32 arrays by their Hugging Face names. Projections are
      [out, in]; queries and keys have the row order of half-split rotary
      embeddings. `lm_head.weight` is missing if the embeddings are tied. Each
      access dequantises the weight again, because the whole model may not fit
      in memory in float32. The file may be deleted meanwhile, but must not be
      written to.
    tokenizer: The model's tokenizer.
  """

  config: LlamaConfig
  weights: Mapping[str, np.ndarray]
  tokenizer: Tokenizer


class _Weights(Mapping[str, np.ndarray]):
  """The weights of a memory-mapped file, dequantised when they are accessed."""

  def __init__(self, tensors: Mapping[str, tuple[Tensor, "_Tensor"]]):
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    return _weight(*self._tensors[name])

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """The weight that a tensor of the file becomes."""

  name: str
  shape: tuple[int, ...]
  num_heads: int | None = None  # if its rows must be reordered, see _half_split


def load(path: str | os.PathLike[str]) -> Checkpoint:
  """Returns the hyperparameters, weights and tokenizer of a GGUF file.

  Args:
    path: The file. Its tensors may have any type that the `gguf` package can
      dequantise.

  Raises:
    FileNotFoundError: If the file does not exist.
    ModelFileError: If the file is not a GGUF file, is truncated, lacks metadata
      or tensors, or has them in the wrong shape. A subclass of ValueError.
    NotImplementedError: If the file needs a feature that is not implemented:
      another architecture, RoPE scaling, experts, biases, another tokenizer.
    ModuleNotFoundError: If the `demo` extra is not installed.
  """
  path = Path(path)
  with _naming(path):
    file = gguf_file.read(path)
    metadata, tensors = file.metadata, file.tensors
    _check_supported(metadata)
    vocab_size = len(strings(metadata, "tokenizer.ggml.tokens"))
    config = _config(metadata, vocab_size, tied="output.weight" not in tensors)
    # The tokenizer comes after the shapes, which bound its vocabulary.
    plan = _checked(tensors, _plan(config))
    tokenizer = tokenizer_of(metadata)
    for name in plan:
      _dequantise(tensors[name], slice(1))  # one row, to check the type
    weights = _Weights(
      {target.name: (tensors[name], target) for name, target in plan.items()}
    )
  return Checkpoint(config, weights, tokenizer)


@contextlib.contextmanager
def _naming(path: Path) -> Generator[None]:
  """Prepends the path to the messages of errors."""
  try:
    yield
  except NotImplementedError as error:
    raise NotImplementedError(f"{path}: {error}") from error
  except ValueError as error:
    raise ModelFileError(f"{path}: {error}") from error


def _check_supported(metadata: Mapping[str, Any]) -> None:
  architecture = require(metadata, "general.architecture", str)
  if architecture != _ARCHITECTURE:
    raise NotImplementedError(
      f"{architecture=} is not supported: only {_ARCHITECTURE!r} is."
    )
  for key, value in metadata.items():
    is_off = isinstance(value, int | float | str) and value in _OFF
    if key.startswith(_UNSUPPORTED_KEYS) and not is_off:
      raise NotImplementedError(
        f"metadata {key}={value!r:.80} is not supported."
      )
  num_parts = optional(metadata, "split.count", 1, int)
  if num_parts > 1:
    raise NotImplementedError(
      f"metadata split.count={num_parts}: models in several files are not "
      "supported; merge them with llama-gguf-split."
    )
  _check_rope(metadata)


def _check_rope(metadata: Mapping[str, Any]) -> None:
  """Raises a NotImplementedError if rotary positions are scaled."""
  key = "llama.rope.scaling.type"
  kind = optional(metadata, key, "linear", str)
  if kind not in ("none", "linear"):
    raise NotImplementedError(f"metadata {key}={kind!r:.80} is not supported.")
  if kind == "none":
    return
  for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
    factor = metadata.get(key, 1)
    if not isinstance(factor, int | float) or factor not in (0, 1):
      raise NotImplementedError(
        f"metadata {key}={factor!r:.80} is not supported."
      )


def _config(
  metadata: Mapping[str, Any], vocab_size: int, tied: bool
) -> LlamaConfig:
  def integer(key: str) -> int:
    return require(metadata, f"llama.{key}", int)

  hidden_size = integer("embedding_length")
  num_q_heads = integer("attention.head_count")
  head_dim = optional(metadata, "llama.attention.key_length", None, int)
  if head_dim is None:
    if num_q_heads <= 0 or hidden_size % num_q_heads:
      raise ModelFileError(
        f"{hidden_size=} must be a multiple of {num_q_heads=}."
      )
    head_dim = hidden_size // num_q_heads
  for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
    if metadata.get(key, head_dim) != head_dim:
      raise NotImplementedError(
        f"metadata {key}={metadata[key]!r} is not supported: only "
        f"{head_dim=} is."
      )
  return LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    intermediate_size=integer("feed_forward_length"),
    num_layers=integer("block_count"),
    num_q_heads=num_q_heads,
    num_kv_heads=optional(
      metadata, "llama.attention.head_count_kv", num_q_heads, int
    ),
    head_dim=head_dim,
    rope_theta=optional(metadata, "llama.rope.freq_base", 10000.0, float),
    rms_norm_eps=require(
      metadata, "llama.attention.layer_norm_rms_epsilon", float
    ),
    max_len=integer("context_length"),
    tie_word_embeddings=tied,
  )


def _plan(config: LlamaConfig) -> Iterator[tuple[str, _Tensor]]:
  """Yields the name of each tensor, and the weight that it becomes."""
  hidden = config.hidden_size
  q_size = config.num_q_heads * config.head_dim
  kv_size = config.num_kv_heads * config.head_dim
  mlp = config.intermediate_size
  table = (config.vocab_size, hidden)
  yield "token_embd.weight", _Tensor("model.embed_tokens.weight", table)
  yield "output_norm.weight", _Tensor("model.norm.weight", (hidden,))
  if not config.tie_word_embeddings:
    yield "output.weight", _Tensor("lm_head.weight", table)
  layer = {
    "attn_norm": _Tensor("input_layernorm", (hidden,)),
    "attn_q": _Tensor("self_attn.q_proj", (q_size, hidden), config.num_q_heads),
    "attn_k": _Tensor(
      "self_attn.k_proj", (kv_size, hidden), config.num_kv_heads
    ),
    "attn_v": _Tensor("self_attn.v_proj", (kv_size, hidden)),
    "attn_output": _Tensor("self_attn.o_proj", (hidden, q_size)),
    "ffn_norm": _Tensor("post_attention_layernorm", (hidden,)),
    "ffn_gate": _Tensor("mlp.gate_proj", (mlp, hidden)),
    "ffn_up": _Tensor("mlp.up_proj", (mlp, hidden)),
    "ffn_down": _Tensor("mlp.down_proj", (hidden, mlp)),
  }
  for i in range(config.num_layers):
    for name, target in layer.items():
      weight = f"model.layers.{i}.{target.name}.weight"
      yield f"blk.{i}.{name}.weight", dataclasses.replace(target, name=weight)


def _checked(
  tensors: Mapping[str, Tensor], plan: Iterator[tuple[str, _Tensor]]
) -> dict[str, _Tensor]:
  """Returns the plan; it ends at the first tensor that the file lacks."""
  checked: dict[str, _Tensor] = {}
  for name, target in plan:
    if name not in tensors:
      raise ModelFileError(f"tensor {name!r} is missing.")
    shape = tensors[name].shape
    if shape != target.shape:
      raise ModelFileError(
        f"tensor {name!r} has {shape=}, expected {target.shape}."
      )
    checked[name] = target
  unknown = tensors.keys() - checked.keys()
  if unknown:
    raise NotImplementedError(f"tensor {min(unknown)!r} is not supported.")
  return checked


def _dequantise(tensor: Tensor, rows: slice) -> np.ndarray:
  quants = import_demo("gguf.quants")
  try:
    return quants.dequantize(tensor.rows[rows], tensor.type)
  except NotImplementedError as error:
    raise NotImplementedError(f"tensor {tensor.name!r}: {error}") from error


def _weight(tensor: Tensor, target: _Tensor) -> np.ndarray:
  # A copy, because float32 tensors are views of the mapped file.
  weight = np.array(_dequantise(tensor, slice(None)), np.float32)
  weight = weight.reshape(target.shape)
  if target.num_heads is None:
    return weight
  return _half_split(weight, target.num_heads)


def _half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes llama.cpp's interleaving of the rotary pairs.

  The file stores the rows of a head as pairs (0, d/2), (1, d/2 + 1), ... next
  to each other. Half-split rotary embeddings need the first members of all
  pairs, then the second ones.
  """
  num_rows, hidden_size = weight.shape
  pairs = weight.reshape(num_heads, -1, 2, hidden_size)
  return pairs.swapaxes(1, 2).reshape(num_rows, hidden_size)
