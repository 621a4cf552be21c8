"""The benchmark cases of the comparison of two checkouts."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from benchmarks.compare import calls
from benchmarks.compare.calls import Call
from benchmarks.harness import batches
from benchmarks.harness.batches import Sizes
from benchmarks.harness.queries import Case as QueryCase


def all_cases(*, small: bool) -> dict[str, Callable[[], Call]]:
  """Returns a constructor for the call of each case, by name."""
  if small:
    return _small()
  sizes = Sizes()
  made: dict[str, Callable[[], Call]] = {}
  fixed = {
    "decode 64 x 8k": (sizes, 64, 8192),
    "decode 64 x 8k, pages of 64": (_with(sizes, page_size=64), 64, 8192),
    "decode 64 x 2k": (sizes, 64, 2048),
    "decode 256 x 1k": (sizes, 256, 1024),
    "decode 16 x 32k": (sizes, 16, 32768),
    "decode 1 x 128k": (sizes, 1, 131072),
    "decode 8 x 4k": (sizes, 8, 4096),
    "decode 1 x 8k": (sizes, 1, 8192),
    "decode 64 x 4k, 32 KV heads": (_with(sizes, num_kv_heads=32), 64, 4096),
    "decode 64 x 4k, 1 KV head": (_with(sizes, num_kv_heads=1), 64, 4096),
  }
  for name, (each, count, length) in fixed.items():
    lens = np.full(count, length)
    made[name] = functools.partial(calls.decode, each, lens)
  rng = np.random.default_rng(7)
  ragged = np.exp(rng.uniform(np.log(128), np.log(16384), 128)).astype(int)
  made["decode 128, 128 to 16k"] = functools.partial(
    calls.decode, sizes, ragged
  )
  long = np.full(64, 8192)
  for dtype in ("int8", "float8_e4m3fn"):
    made[f"decode 64 x 8k, {dtype}"] = functools.partial(
      calls.decode, sizes, long, dtype=dtype
    )
  made["decode 64 x 8k, batch-invariant"] = functools.partial(
    calls.decode, sizes, long, batch_invariant=True
  )
  made["decode 64 x 8k, sinks, ALiBi, cap"] = functools.partial(
    calls.decode, sizes, long, per_head=True, logits_soft_cap=30.0
  )
  made["decode 8 x 128k, window of 4k"] = functools.partial(
    calls.decode,
    sizes,
    np.full(8, 131072),
    sliding_window=4096,
    num_sink_tokens=4,
  )
  made["64 x 8k, 4 query tokens"] = functools.partial(
    calls.ragged, QueryCase((4,) * 64, (8188,) * 64), max_q_len=4
  )
  prompts = {
    "1 x 4k": QueryCase((4096,), (0,)),
    "4 x 4k": QueryCase((4096,) * 4, (0,) * 4),
    "1 x 16k": QueryCase((16384,), (0,)),
    "8 x 1k": QueryCase((1024,) * 8, (0,) * 8),
    "8 x 512 on 4k": QueryCase((512,) * 8, (4096,) * 8),
    "1 x 4k, 32 KV heads": QueryCase((4096,), (0,), heads=(32, 32)),
    "4 x 4k, int8": QueryCase((4096,) * 4, (0,) * 4, kv_dtype="int8"),
    "mixed, 64 x 4k and 2 x 2k": QueryCase(
      (1,) * 64 + (2048,) * 2, (4095,) * 64 + (0,) * 2
    ),
    "few, 3 x 100 on 2k": QueryCase((100,) * 3, (2048,) * 3),
  }
  for name, query in prompts.items():
    made[f"prefill {name}"] = functools.partial(calls.ragged, query)
  for count in (64, 8192):
    for dtype in ("bfloat16", "int8"):
      made[f"write {count} tokens, {dtype}"] = functools.partial(
        calls.write, sizes, count, dtype
      )
  for num_layers, shape in ((30, (9, 3, 64)), (32, (32, 8, 128))):
    for count in (8, 256):
      made[f"{num_layers} layers, {count} x 1k"] = functools.partial(
        calls.layers, num_layers, shape, np.full(count, 1024)
      )
  return made


def _small() -> dict[str, Callable[[], Call]]:
  sizes, lens = batches.SMALL, np.array([9, 17, 30])
  query = QueryCase((5, 9), (0, 7), head_dim=16, heads=(4, 2))
  return {
    "decode": functools.partial(calls.decode, sizes, lens),
    "prefill": functools.partial(calls.ragged, query, implementation="xla"),
    "write": functools.partial(calls.write, sizes, 5, "bfloat16"),
    "layers": functools.partial(
      calls.layers, 3, (4, 2, 16), lens, implementation="xla"
    ),
  }


def _with(sizes: Sizes, **changes) -> Sizes:
  return dataclasses.replace(sizes, **changes)
