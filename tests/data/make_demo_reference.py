"""Writes tests/data/demo_reference.json: what PyTorch says of the demo model.

Needs torch, transformers >= 5.23, accelerate and gguf, in an environment of
its own, and no network:

  HF_HUB_OFFLINE=1 python tests/data/make_demo_reference.py path/to/model.gguf

The same GGUF file is loaded by transformers in float32 on the CPU, and every
prompt is continued greedily, alone, end tokens ignored. `min_margin` is the
smallest gap between the two largest logits of the prompt's steps: a smaller
numerical difference than half of it cannot change a token.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers

NUM_NEW_TOKENS = 48
MIN_MARGIN = 1e-3
NUM_LOGITS = 64
LOGITS_PROMPT = "prose"
LOGITS_STEPS = (0, 1, 2, 7, 23, 47)
OUTPUT = Path(__file__).parent / "demo_reference.json"

CONVERSATION = [
  {"role": "user", "content": "What is the capital of France?"},
  {"role": "assistant", "content": "Paris."},
  {"role": "user", "content": "And of Japan? Answer in one word."},
]

PROSE = (
  "The harbour was quiet in the early morning. Fishing boats lay side by "
  "side along the stone wall, their nets drying on the decks, and a few "
  "gulls walked about between the ropes. At the end of the pier an old man "
  "sat on a wooden box and mended a basket. He had worked on these boats for "
  "fifty years, and now he watched the younger people go out before dawn and "
  "come back in the afternoon. When a child asked him what the sea was like "
  "far from the land, he"
)

ENCYCLOPEDIA = (
  "Paper was first made in China about two thousand years ago. Before that, "
  "people wrote on bamboo, on silk, on clay tablets or on the skins of "
  "animals. Bamboo was heavy, silk was expensive, and clay could not be "
  "carried far. According to tradition an official at the court, Cai Lun, "
  "described in the year 105 how to make sheets from the bark of trees, old "
  "rags and fishing nets. The fibres were beaten in water until they came "
  "apart, a thin layer was lifted out on a screen, and the layer was pressed "
  "and dried. From China the craft travelled to Korea and Japan, and, along "
  "the trade routes, to Samarkand, Baghdad and Cairo. In Europe the first "
  "paper mills were built in Spain and Italy; they used the power of water "
  "to drive the hammers that broke up the rags. When printing with movable "
  "type spread in the fifteenth century, the demand for paper grew quickly, "
  "and rags became scarce. For three hundred years inventors looked for "
  "another raw material: straw, hemp, nettles, even the nests of wasps were "
  "tried. Only in the middle of the nineteenth century did wood replace rags, "
  "after machines had been built that could grind a log into pulp and, later, "
  "after chemists had found out how to dissolve the substance that binds its "
  "fibres. Paper became cheap, and with it newspapers, books and letters. "
  "The history of paper shows that"
)

PROMPTS = {
  "word": "Once",
  "english": "The three most important things to know about the Moon are",
  "code": (
    "def is_prime(n):\n"
    '  """Returns whether n is a prime number."""\n'
    "  if n <  2:\n"
    "    return False\n"
  ),
  "unicode": (
    "Le café «Zoë» coûte 12,50 €. 日本語では「こんにちは」と言います。"
    "🙂 In English,"
  ),
  "list": "Shopping list:\n1. Milk\n2. Bread\n3. Eggs\n4.",
  "arithmetic": "2 + 2 = 4\n3 + 5 = 8\n10 + 7 = 17\n6 + 9 =",
  "prose": PROSE,
  "encyclopedia": ENCYCLOPEDIA,
}

# Texts that are easily cut into the wrong tokens.
TEXTS = (
  "",
  " ",
  "  leading and trailing  ",
  "a\n\n\n  b\t\tc\r\n",
  "x =  42\n    7",
  "in 2024, 1,000,000 times 3.14159",
  "  5   ½²Ⅷ٣४",
  "I'm sure they'll say it's fine, don't you?",
  "naïve façade — “quoted” … ¿qué?",
  "你好 世界 한국어 العربية עברית",
  "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f e\u0301 \u200b\ufeff",
  "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<file_sep>",
  "<|im_start|> <|im_end",
  "https://example.org/a_b?c=%20#d",
  "if(x>=0&&y!=z){return -1;}//ok",
)


def load(path):
  """Returns the tokenizer and the model of a GGUF file."""
  names = {"gguf_file": path.name}
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **names)
  # transformers 5.23 does not know the rule "smollm" and keeps digits and the
  # blanks before them together; SmolLM2 was trained with the digits apart.
  rules = tokenizers.pre_tokenizers
  tokenizer.backend_tokenizer.pre_tokenizer = rules.Sequence(
    [
      rules.Digits(individual_digits=True),
      rules.ByteLevel(add_prefix_space=False),
    ]
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, attn_implementation="eager", **names
  )
  return tokenizer, model.eval()


def unpermuted(rows, num_heads):
  """Returns the rows of q or k in Hugging Face's order, one at a time."""
  half = len(rows) // num_heads // 2
  order = [
    2 * half * head + 2 * j + second
    for head in range(num_heads)
    for second in range(2)
    for j in range(half)
  ]
  return rows[order]


def check_weights(path, model):
  """Asserts that transformers read the weights as the gguf package does."""
  stored = {
    tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    for tensor in gguf.GGUFReader(path).tensors
  }
  state = model.state_dict()
  config = model.config
  q, k = config.num_attention_heads, config.num_key_value_heads
  pairs = {
    "model.embed_tokens": stored["token_embd.weight"],
    "model.norm": stored["output_norm.weight"],
    "lm_head": stored["token_embd.weight"],
  }
  for i in (0, config.num_hidden_layers - 1):
    ours, theirs = f"model.layers.{i}", f"blk.{i}"
    q_rows = stored[f"{theirs}.attn_q.weight"]
    k_rows = stored[f"{theirs}.attn_k.weight"]
    pairs |= {
      f"{ours}.self_attn.q_proj": unpermuted(q_rows, q),
      f"{ours}.self_attn.k_proj": unpermuted(k_rows, k),
      f"{ours}.self_attn.v_proj": stored[f"{theirs}.attn_v.weight"],
      f"{ours}.self_attn.o_proj": stored[f"{theirs}.attn_output.weight"],
      f"{ours}.mlp.gate_proj": stored[f"{theirs}.ffn_gate.weight"],
      f"{ours}.mlp.up_proj": stored[f"{theirs}.ffn_up.weight"],
      f"{ours}.mlp.down_proj": stored[f"{theirs}.ffn_down.weight"],
      f"{ours}.input_layernorm": stored[f"{theirs}.attn_norm.weight"],
    }
  for name, expected in pairs.items():
    np.testing.assert_array_equal(
      state[f"{name}.weight"].numpy(), expected, err_msg=name
    )


@torch.no_grad()
def continue_greedily(model, prompt_ids):
  """Returns the new token ids and the logits that chose each of them."""
  ids, cache, logits = list(prompt_ids), None, []
  for _ in range(NUM_NEW_TOKENS):
    fed = ids if cache is None else ids[-1:]
    out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    logits.append(out.logits[0, -1])
    ids.append(int(logits[-1].argmax()))
  logits = torch.stack(logits)
  # The cache must not matter: the whole sequence at once gives the same.
  whole = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
  whole = whole[len(prompt_ids) - 1 :]
  torch.testing.assert_close(whole, logits, rtol=0, atol=2e-4)
  return ids[len(prompt_ids) :], logits


def logits_rows(logits):
  """Returns some logits as plain numbers; step 0 ends the prompt."""
  return [
    {
      "step": step,
      "first": logits[step, :NUM_LOGITS].tolist(),
      "max": logits[step].max().item(),
      "logsumexp": logits[step].double().logsumexp(-1).item(),
    }
    for step in LOGITS_STEPS
  ]


def reference(path):
  """Returns the contents of the JSON file."""
  tokenizer, model = load(path)
  check_weights(path, model)
  chat = tokenizer.apply_chat_template(
    CONVERSATION, tokenize=False, add_generation_prompt=True
  )
  prompts, logits_of = [], {}
  for name, text in (PROMPTS | {"chat": chat}).items():
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    token_ids, logits_of[name] = continue_greedily(model, prompt_ids)
    best, second = logits_of[name].topk(2).values.T
    min_margin = (best - second).min().item()
    print(f"{name}: {len(prompt_ids)} tokens, {min_margin=:.4g}")
    print(f"  {tokenizer.decode(token_ids)!r}")
    if min_margin < MIN_MARGIN:
      raise ValueError(f"prompt {name!r}: {min_margin=} < {MIN_MARGIN}.")
    prompts.append(
      {
        "name": name,
        "text": text,
        "prompt_token_ids": prompt_ids,
        "token_ids": token_ids,
        "min_margin": min_margin,
      }
    )
  return {
    "model": path.name,
    "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    "versions": {
      "python": platform.python_version(),
      "torch": torch.__version__,
      "transformers": transformers.__version__,
      "tokenizers": tokenizers.__version__,
    },
    "prompts": prompts,
    "logits": {
      "prompt": LOGITS_PROMPT,
      "rows": logits_rows(logits_of[LOGITS_PROMPT]),
    },
    "chat": {
      "messages": CONVERSATION,
      "text": chat,
      "text_without_generation_prompt": tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False
      ),
    },
    "encodings": [
      {
        "text": text,
        "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
      }
      for text in TEXTS
    ],
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("model", type=Path, help="the GGUF file")
  args = parser.parse_args()
  written = json.dumps(reference(args.model), indent=1, ensure_ascii=False)
  OUTPUT.write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
