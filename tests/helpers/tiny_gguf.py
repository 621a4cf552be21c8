"""Small GGUF files of random weights, in the form of llama.cpp's converter."""

import gguf
import numpy as np

NUM_LAYERS = 2
NUM_Q_HEADS = 4
NUM_KV_HEADS = 2
HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 96
HEAD_DIM = HIDDEN_SIZE // NUM_Q_HEADS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")
MERGES = (
  "h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ Ġ", "1 2", "12 3", "o !"
)  # fmt: skip
CHAT_TEMPLATE = """\
{% for message in messages %}
  {% if message['role'] == 'critic' %}
    {{ raise_exception('no critics') }}
  {% endif %}
{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"""


def byte_symbols():
  """Returns a printable character for each byte (GPT-2's alphabet)."""
  symbols, spare = [], 0x100
  for byte in range(0x100):
    if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
      symbols.append(chr(byte))
    else:
      symbols.append(chr(spare))
      spare += 1
  return symbols


TOKENS = [*SPECIALS, *byte_symbols(), *(m.replace(" ", "") for m in MERGES)]
VOCAB_SIZE = len(TOKENS)
TOKEN_TYPES = [3, 3, 3, 4] + [1] * (VOCAB_SIZE - 4)


def metadata(changes=None):
  """Returns the metadata of the file; a change to None leaves a key out."""
  values = {
    "general.architecture": "llama",
    "llama.block_count": NUM_LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN_SIZE,
    "llama.feed_forward_length": INTERMEDIATE_SIZE,
    "llama.attention.head_count": NUM_Q_HEADS,
    "llama.attention.head_count_kv": NUM_KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 2.0**-16,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TOKEN_TYPES,
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": CHAT_TEMPLATE,
  }
  values |= changes or {}
  return {key: value for key, value in values.items() if value is not None}


def weights(seed=0, tied=True):
  """Returns float32 weights by their Hugging Face names."""
  q_size, kv_size = NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
  shapes = {
    "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE),
    "model.norm.weight": (HIDDEN_SIZE,),
  }
  if not tied:
    shapes["lm_head.weight"] = (VOCAB_SIZE, HIDDEN_SIZE)
  for i in range(NUM_LAYERS):
    shapes |= {
      f"model.layers.{i}.{name}.weight": shape
      for name, shape in {
        "input_layernorm": (HIDDEN_SIZE,),
        "self_attn.q_proj": (q_size, HIDDEN_SIZE),
        "self_attn.k_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.v_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.o_proj": (HIDDEN_SIZE, q_size),
        "post_attention_layernorm": (HIDDEN_SIZE,),
        "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
      }.items()
    }
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def gguf_name(name):
  """Returns the name that llama.cpp gives a Hugging Face tensor."""
  for theirs, ours in (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("_proj.", "."),
  ):
    name = name.replace(theirs, ours)
  return name


def interleave(weight, num_heads):
  """Reorders rows as llama.cpp does: pair (j, j + d/2) becomes (2j, 2j + 1)."""
  head_dim = len(weight) // num_heads
  out = np.empty_like(weight)
  for head in range(num_heads):
    for j in range(head_dim // 2):
      for half in range(2):
        source = head * head_dim + half * (head_dim // 2) + j
        out[head * head_dim + 2 * j + half] = weight[source]
  return out


def tensors(values):
  """Returns the tensors of the file, by llama.cpp's names."""
  heads = {"q_proj": NUM_Q_HEADS, "k_proj": NUM_KV_HEADS}
  out = {}
  for name, weight in values.items():
    num_heads = heads.get(name.split(".")[-2])
    out[gguf_name(name)] = (
      weight if num_heads is None else interleave(weight, num_heads)
    )
  return out


def write(path, values=None, stored=None, quants=None):
  """Writes a GGUF file.

  Args:
    path: Path of the file.
    values: Metadata; `metadata()` by default.
    stored: Tensors by llama.cpp's names; random by default.
    quants: Quantisation types of tensors, by name; float32 by default.
  """
  values = metadata() if values is None else values
  stored = tensors(weights()) if stored is None else stored
  writer = gguf.GGUFWriter(path, values["general.architecture"])
  adders = {
    str: writer.add_string,
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    list: writer.add_array,
  }
  for key, value in values.items():
    if key != "general.architecture":
      adders[type(value)](key, value)
  for name, tensor in stored.items():
    if quants and name in quants:
      blocks = gguf.quants.quantize(tensor, quants[name])
      writer.add_tensor(name, blocks, raw_dtype=quants[name])
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
