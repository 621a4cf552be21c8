"""Hyperparameters of a decoder-only model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Hyperparameters of a model of the Llama architecture.

  Attributes:
    vocab_size: Number of token ids.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the gated MLP.
    num_layers: Number of decoder layers.
    num_q_heads: Number of query heads; a multiple of `num_kv_heads`.
    num_kv_heads: Number of key and value heads.
    head_dim: Width of one head; even.
    rope_theta: Base of the rotary frequencies.
    rms_norm_eps: Added to the mean square before the root.
    max_len: Longest sequence that the model was trained on, in tokens.
    tie_word_embeddings: Whether the output head is the embedding table.

  Raises:
    ValueError: If a size is not positive, `num_q_heads` is not a multiple of
      `num_kv_heads`, or `head_dim` is odd.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  max_len: int
  tie_word_embeddings: bool

  def __post_init__(self):
    for name in (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_layers",
      "num_q_heads",
      "num_kv_heads",
      "head_dim",
      "max_len",
    ):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive.")
    if self.num_q_heads % self.num_kv_heads:
      raise ValueError(
        f"{self.num_q_heads=} must be a multiple of {self.num_kv_heads=}."
      )
    if self.head_dim % 2:
      raise ValueError(f"{self.head_dim=} must be even.")
