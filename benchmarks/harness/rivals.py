"""Times beside other projects, in one run on one GPU.

The program that compares is not part of this repository. It calls the ops of
`paged_jax` inside jit, and writes a record for each time. Imports nothing but
the standard library.
"""

import dataclasses
from collections.abc import Iterable

from benchmarks.harness.markdown import machine, read

# Names of the cases of decode by label: batch x context, and the difference.
DECODE = {
  "64 x 8k": "d_b64_8k",
  "64 x 8k, pages of 64": "d_b64_8k_p64",
  "64 x 2k": "d_b64_2k",
  "256 x 1k": "d_b256_1k",
  "128 x 128 to 16k": "d_ragged128",
  "16 x 32k": "d_b16_32k",
  "1 x 128k": "d_b1_128k",
  "8 x 4k": "d_b8_4k",
  "1 x 8k": "d_b1_8k",
  "64 x 4k, 32 KV heads": "d_b64_4k_mha",
  "64 x 4k, 1 KV head": "d_b64_4k_mqa",
}
PREFILL = {
  "1 x 4k": "p_b1_4k",
  "4 x 4k": "p_b4_4k",
  "1 x 16k": "p_b1_16k",
  "8 x 1k": "p_b8_1k",
  "8 x 512 on 4k": "p_b8_512on4k",
  "1 x 4k, 32 KV heads": "p_b1_4k_mha",
}
# Prefixes of the names of a side's kernels.
OURS, FLASHINFER = "ours", "fi_"
CUDNN_PAGED, CUDNN, GATHER = "jax_cudnn_paged", "jax_cudnn", "gather_cudnn"
JAX = "jax_builtin"

# Results: all sides, then the ops and FlashInfer again, then the op again.
ALL = "h200/rivals"
AGAIN = "h200/rivals_flashinfer"
LONG = "h200/decode_long_batches"
SHAPE = (
  "bfloat16, 32 query heads, head_dim 128, pages of 16 tokens, and 8 KV heads "
  "unless the case says otherwise"
)
PROGRAM = (
  "The program that compares is not part of this repository; it calls the op "
  "inside jit."
)


@dataclasses.dataclass(frozen=True)
class Run:
  """The records of one run."""

  records: list[dict]

  def fastest(self, case: str, side: str) -> dict | None:
    """Returns the fastest kernel's record of a side; None without any."""
    return min(
      (
        record
        for record in self.records
        if record["type"] == "time"
        and record["case"] == case
        and record["peer"].startswith(side)
      ),
      key=lambda record: record["us"],
      default=None,
    )

  def us(self, case: str, side: str) -> float:
    """Returns the microseconds of the fastest kernel of a side.

    Raises:
      KeyError: If the side was not timed.
    """
    found = self.fastest(case, side)
    if found is None:
      raise KeyError(f"{side} has no time for {case}.")
    return found["us"]

  def ceiling(self, name: str, unit: str) -> float:
    """Returns the speed of the GPU in the test whose name contains `name`."""
    (speed,) = (
      record[unit]
      for record in self.records
      if record["type"] == "ceil" and name in record["name"]
    )
    return speed

  def spread(self, case: str, sides: Iterable[str]) -> float:
    """Returns the largest relative spread of the times of a side.

    The spread of a side is `max / min - 1`, for its fastest kernel.
    """
    found = [self.fastest(case, side) for side in sides]
    return max(x["max"] / x["min"] - 1 for x in found if x is not None)

  @property
  def random_pages(self) -> float:
    """GB/s at which the GPU read 4 KB pages in random order."""
    return self.ceiling("4 KB", "GBps")

  @property
  def product(self) -> float:
    """TFLOP/s of a large product of bfloat16 matrices."""
    return self.ceiling("8192^3", "TFLOPs")

  def machine(self) -> str:
    """Returns device, driver and versions."""
    found = {
      record["what"]: record["result"]
      for record in self.records
      if record["type"] == "env"
    }
    torch = found["torch device"].split(", ")[-2]
    flashinfer = found["flashinfer"].split(",")[0]
    # The run does not record its driver and JAX; the run right after it does.
    return f"{machine(read(LONG))}, {torch}, flashinfer {flashinfer}"


def run(name: str) -> Run:
  """Returns a run by the name of its result."""
  return Run(read(name)["records"])


def long_batches() -> dict[str, dict]:
  """Returns our records of decode in long batches of calls, by case."""
  return {record["case"]: record for record in read(LONG)["cases"]}


def host_delay() -> tuple[list[float], list[float]]:
  """Returns the delay with which the host sees the end of a batch of calls.

  A batch of `n` calls takes `n` times the time of a call, plus the delay. Short
  and long batches of the same calls give both.

  Returns:
    The delay of each case: milliseconds a batch, and microseconds a call.
  """
  longs, a_batch, a_call = long_batches(), [], []
  for case in DECODE.values():
    short, long = run(AGAIN).fastest(case, OURS), longs.get(case)
    if short is None or long is None:
      continue
    share = 1 - short["n"] / long["n"]
    a_call.append((short["us"] - long["us"]) / share)
    a_batch.append(a_call[-1] * short["n"] / 1000)
  return a_batch, a_call
