"""Measures prefill attention over pages on a GPU, in microseconds and TFLOP/s.

The batches are whole prompts, prompt chunks on top of a context, and mixtures
with decode. Some run with several Configs of the kernel, and some also over
pages of int8 and float8_e4m3fn. TFLOP/s count visible keys only, so nothing
above the diagonal: 4 * head_dim * num_q_heads for each query and key.

Pages lie at random places of a larger pool, whose unused pages hold NaN. Times
are those of a compiled loop, measured on the host, divided by the number of
calls, and include the list of work items, which each call computes again. The
last output of each loop is compared with plain JAX before the loop is timed.

  python -m benchmarks.ragged

Results: benchmarks/results/h200/ragged.json
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax

import paged_jax
from benchmarks.harness import command, queries, results
from benchmarks.harness.attention import measured, reference, relative_error
from benchmarks.harness.batches import Batch
from benchmarks.harness.cases import attempt, failures, walk
from benchmarks.harness.queries import make
from benchmarks.harness.table import line
from paged_jax.kv.dtypes import QUANTISED_DTYPES
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec
from pallas_kernels.ragged import kernel as ragged_kernel
from pallas_kernels.ragged.config import Config, default_config, padded_group

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "numpy"]
# Estimates, to choose the number of calls in a loop.
GUESS = 5e8  # FLOPs in a microsecond
CALL_COST = 20  # least microseconds of a call
LOOP_US = 100_000  # about; the host sees the end of a loop 1 ms late
NUM_LOOPS = 5
COLUMNS = {
  "us": "{[median]:9.1f} us",
  "tflop_per_s": "{:7.0f} TFLOP/s",
  "relative_error": "  error {:.1e}",
}


@dataclasses.dataclass(frozen=True)
class Case(queries.Case):
  """A batch, and whether it is timed with several Configs."""

  all_configs: bool = False  # compiles two more loops


def _quantised(name: str, case: Case) -> dict[str, Case]:
  """Returns a case over quantised pages of each dtype, by name."""
  return {
    f"{name}, {dtype}": dataclasses.replace(case, kv_dtype=dtype.name)
    for dtype in QUANTISED_DTYPES
  }


MIXED = Case((512, 300) + (1,) * 62, (8192, 0) + (2048,) * 62)
CASES = {
  "1 x 4k": Case((4096,), (0,), all_configs=True),
  **_quantised("1 x 4k", Case((4096,), (0,))),
  "4 x 4k": Case((4096,) * 4, (0,) * 4),
  "4 x 4k, page 64": Case((4096,) * 4, (0,) * 4, page_size=64),
  "1 x 16k": Case((16384,), (0,), all_configs=True),
  **_quantised("1 x 16k", Case((16384,), (0,))),
  "1 x 16k, page 64": Case((16384,), (0,), page_size=64),
  "1 x 4k, 32 KV heads": Case((4096,), (0,), heads=(32, 32)),
  "8 x 1k": Case((1024,) * 8, (0,) * 8),
  "8 x 512 on 4k": Case((512,) * 8, (4096,) * 8, all_configs=True),
  **_quantised("8 x 512 on 4k", Case((512,) * 8, (4096,) * 8)),
  "8 x 512 on 4k, page 64": Case((512,) * 8, (4096,) * 8, page_size=64),
  "1 x 512 on 128k": Case((512,), (131072,), all_configs=True),
  "1 x 512 on 128k, 4 and 1 heads": Case((512,), (131072,), heads=(4, 1)),
  "2 prompts, 62 decoding": MIXED,
  **_quantised("2 prompts, 62 decoding", MIXED),
  "1 x 16k, window 4k": Case((16384,), (0,), sliding_window=4096),
  "4 x 4k, head_dim 64": Case((4096,) * 4, (0,) * 4, head_dim=64),
  "4 x 4k, head_dim 256": Case((4096,) * 4, (0,) * 4, head_dim=256),
}
SMALL = Case((70, 3), (0, 40), head_dim=64, heads=(4, 2))
SMALL_CASES = {
  "small": dataclasses.replace(SMALL, all_configs=True),
  "small, int8": dataclasses.replace(SMALL, kv_dtype="int8"),
}


def main() -> None:
  """Times all cases, prints the figures and writes the record."""
  args, environment = command.start_on_gpu("ragged", __doc__, PACKAGES)
  record = results.keep(
    "ragged",
    records(SMALL_CASES if args.small else CASES, small=args.small),
    args,
    environment,
  )
  command.finish(failures(record["cases"]))


def records(cases: dict[str, Case], *, small: bool) -> Iterator[dict]:
  """Yields the record with all figures so far, after each case; prints them."""
  record: dict = {"cases": {}}
  for name, case in cases.items():
    record["cases"][name] = by_config = attempt(timed, case, small=small)
    for path, figures in walk(by_config):
      text = line(name, figures, COLUMNS, width=40)
      print(text, *path, sep="  ", flush=True)
    yield record


def configs(case: Case) -> tuple[Config, ...]:
  """Returns the Configs to time, the default first."""
  num_kv_heads = case.heads[1]
  group = padded_group(*case.heads, case.head_dim)
  default = default_config(
    sum(case.q_lens),
    num_kv_heads,
    group,
    case.head_dim,
    is_quantised=case.kv_dtype is not None,
  )
  if not case.all_configs:
    return (default,)
  change = functools.partial(dataclasses.replace, default)
  return (
    default,
    change(splits=not default.splits),
    change(block_kv=64, num_stages=3 if case.head_dim <= 128 else 2),
  )


def timed(case: Case, *, small: bool) -> dict:
  """Returns the figures of a case by Config; uses plain JAX if small."""
  batch = make(case)
  expected = reference(plain(case), batch)
  guess = case.flops / GUESS + CALL_COST
  steps = 1 if small else max(1, round(LOOP_US / guess))
  by_config = {}
  for config in configs(case):
    attend = plain(case) if small else kernel(case, config)
    by_config[str(config)] = attempt(
      _timed, case, batch, attend, steps, expected
    )
  return by_config


def plain(case: Case) -> Callable[..., jax.Array]:
  """Returns attention in plain JAX, on the arrays of a `Batch`."""
  op = functools.partial(
    paged_jax.ragged_paged_attention,
    scale=case.head_dim**-0.5,
    sliding_window=case.sliding_window,
    return_lse=True,
    implementation="xla",
  )

  def attend(q, k, v, kv_lens, table, starts, count, *scales):
    named = dict(zip(("k_scales", "v_scales"), scales, strict=False))
    return op(q, k, v, kv_lens, table, starts, count, **named)[0]

  return attend


def kernel(case: Case, config: Config) -> Callable[..., jax.Array]:
  """Returns attention by the kernel, with the signature of `plain`."""
  spec = AttentionSpec(
    scale=case.head_dim**-0.5, sliding_window=case.sliding_window
  )

  def attend(q, k, v, kv_lens, table, starts, count, *scales):
    k_scales, v_scales = scales or (None, None)
    kv = PagedKV(k, v, k_scales, v_scales, None, kv_lens, table)
    return ragged_kernel.attend(
      q,
      kv.with_layer_axis(),
      starts,
      count,
      AttentionArrays(),
      spec=spec,
      config=config,
    )[0]

  return attend


def _timed(case: Case, batch: Batch, attend, steps: int, expected) -> dict:
  check = functools.partial(relative_error, expected)
  figures, _ = measured(batch, attend, steps, NUM_LOOPS, check)
  figures["tflop_per_s"] = case.flops / figures["us"]["median"] / 1e6
  return figures


if __name__ == "__main__":
  main()
