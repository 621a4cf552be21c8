"""Measures the time of a batch: compiling, prefill, decode."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence

from jax import monitoring

from paged_jax.generation import Completion

_COMPILING = "/jax/core/compile/"  # tracing and lowering included


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds that a batch has taken so far.

  Attributes:
    compile_s: Tracing and compiling, or loading cached programs.
    prefill_s: Until all prompts have their first new token, without compiling.
    decode_s: From then on, without compiling.
  """

  compile_s: float = 0.0
  prefill_s: float = 0.0
  decode_s: float = 0.0

  def tokens_per_s(self, completions: Sequence[Completion]) -> float | None:
    """Returns decoded tokens per second, or None if nothing was decoded.

    The first new token of a prompt belongs to its prefill and does not count.
    """
    decoded = sum(max(0, len(c.token_ids) - 1) for c in completions)
    if not decoded or self.decode_s <= 0:
      return None
    return decoded / self.decode_s


def timed(
  steps: Iterator[list[Completion]],
) -> Iterator[tuple[list[Completion], Timing]]:
  """Yields the items of `generation.stream`, and the time they have taken.

  The time that the caller spends between two items is not counted.
  """
  timing = Timing()
  is_prefill = True
  while True:
    with _compile_spans() as spans:
      start = time.perf_counter()
      completions = next(steps, None)
      elapsed = time.perf_counter() - start
    if completions is None:
      return
    compiling = _covered(spans)
    running = max(0.0, elapsed - compiling)
    timing = Timing(
      compile_s=timing.compile_s + compiling,
      prefill_s=timing.prefill_s + running * is_prefill,
      decode_s=timing.decode_s + running * (not is_prefill),
    )
    is_prefill = False
    yield completions, timing


@contextlib.contextmanager
def _compile_spans() -> Generator[list[tuple[float, float]]]:
  """Collects the times in which JAX compiles, as (start, end)."""
  spans = []

  def listen(
    event: str, start_time: float, end_time: float, **_: str | int
  ) -> None:
    if event.startswith(_COMPILING):
      spans.append((start_time, end_time))

  monitoring.register_event_time_span_listener(listen)
  try:
    yield spans
  finally:
    monitoring.unregister_event_time_span_listener(listen)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
  """Returns the length of the union of spans, which may be nested."""
  total, covered_to = 0.0, -math.inf
  for start, end in sorted(spans):
    total += max(0.0, end - max(start, covered_to))
    covered_to = max(covered_to, end)
  return total
