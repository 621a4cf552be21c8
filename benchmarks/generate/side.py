"""Times one side of the benchmark, in its own process. Prints JSON.

Arguments: side, model file, batch, prompt length, new tokens, calls. The
rival's side does not import paged_jax, and ours does not import PyTorch.
"""

import json
import sys
import time

import numpy as np

from benchmarks.harness import results


def main() -> None:
  """Loads the model, warms up with one call, and times the others."""
  side, path = sys.argv[1:3]
  batch, prompt_len, num_new, calls = map(int, sys.argv[3:])
  load, packages = {
    "paged_jax": (_load_paged_jax, ["jax", "jaxlib", "flax", "numpy"]),
    "transformers": (_load_transformers, ["torch", "transformers", "numpy"]),
  }[side]
  generate = load(path)
  # Leaves out control tokens, which are at the start of the vocabulary.
  prompts = np.random.default_rng(0).integers(1000, 40_000, (batch, prompt_len))
  token_ids = generate(prompts, num_new)
  _reset_peak()
  speeds = []
  for _ in range(calls):
    start = time.perf_counter()
    generate(prompts, num_new)
    speeds.append(batch * num_new / (time.perf_counter() - start))
  print(
    json.dumps(
      {
        "tokens_per_s": speeds,
        "peak_mb": _peak_kb() / 1e3,
        "token_ids": token_ids,
        "environment": results.environment(packages, on_cpu=True),
      }
    )
  )


def _load_paged_jax(path: str):
  import jax.numpy as jnp

  from paged_jax.checkpoints import gguf
  from paged_jax.generation import CacheConfig, SamplingParams, generate
  from paged_jax.models import llama

  checkpoint = gguf.load(path)
  model = llama.from_weights(
    checkpoint.config, checkpoint.weights, param_dtype=jnp.float32
  )
  del checkpoint

  def run(prompts, num_new):
    params = SamplingParams(max_new_tokens=num_new)
    cache = CacheConfig(max_len=prompts.shape[1] + num_new)
    result = generate(model, prompts.tolist(), params, cache=cache)
    return [list(completion.token_ids) for completion in result]

  return run


def _load_transformers(path: str):
  import pathlib

  import torch
  import transformers

  file = pathlib.Path(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  ).eval()

  def run(prompts, num_new):
    with torch.inference_mode():
      ids = torch.from_numpy(prompts)
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
      )
    return out[:, prompts.shape[1] :].tolist()

  return run


def _reset_peak() -> None:
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak of resident memory


def _peak_kb() -> int:
  with open("/proc/self/status") as file:
    fields = dict(line.split(":", 1) for line in file)
  return int(fields["VmHWM"].split()[0])


if __name__ == "__main__":
  main()
