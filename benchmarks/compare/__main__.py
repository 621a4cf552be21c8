"""Compares the speed and the outputs of the ops of two checkouts.

`python -m benchmarks.compare FOLDER` needs a Hopper GPU, and another checkout
of this project in a folder. Each case times loops over the op of either
checkout, alternately and five times, in one process, and compares the outputs
bit for bit. Before that, both run for half a second: the clocks of a GPU that
has been idle are higher.

Results: benchmarks/results/h200/compare.json. `--only` keeps the figures of the
other cases, if they are of the same device and versions. `--small` compares
tiny batches in plain JAX on any machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.compare.calls import Call
from benchmarks.compare.cases import all_cases
from benchmarks.compare.checkout import Checkout
from benchmarks.harness import command, results
from benchmarks.harness.cases import attempt, failures
from benchmarks.harness.table import line

NUM_TURNS = 5
LOOP_US = 60_000.0  # approximate time of a loop
WARM_UP_SECONDS = 0.5
PACKAGES = ["jax", "jaxlib"]
COLUMNS = {
  "before_us": "{:10.2f}",
  "after_us": "{:10.2f}",
  "ratio": "{:8.4f}",
  "same_bits": "  {}",
}


def main() -> None:
  """Compares the checkouts and writes the results."""
  args, where = command.start_on_gpu(
    "compare",
    __doc__,
    PACKAGES,
    values={"folder": "the other checkout", "--only": "part of case names"},
  )
  record = results.keep("compare", _records(args, where), args, where)
  other = [
    name
    for name, figures in record["cases"].items()
    if not figures.get("same_bits")
  ]
  command.finish(failures(record) + [f"other bits: {name}" for name in other])


def _records(args: argparse.Namespace, where: dict) -> Iterator[dict]:
  """Yields the record with all figures so far, after each case."""
  before, after = Checkout(args.folder), Checkout()
  figures = _kept(where) if args.only and not args.small else {}
  for name, make in all_cases(small=args.small).items():
    if args.only and args.only not in name:
      continue
    figures[name] = attempt(_compare, make, before, after, args.small)
    print(line(name, figures[name], COLUMNS, width=36), flush=True)
    yield {"turns": NUM_TURNS, "cases": figures}


def _kept(where: dict) -> dict[str, dict]:
  """Returns the figures of an earlier run on the same device and versions."""
  record = json.loads((results.RESULTS / "h200" / "compare.json").read_text())
  return record["cases"] if record["environment"] == where else {}


def _compare(
  make: Callable[[], Call],
  before: Checkout,
  after: Checkout,
  small: bool,
) -> dict:
  """Returns the times of both checkouts, and whether outputs are equal."""
  call = make()
  sides = [_Side(call, each, small) for each in (before, after)]
  outputs = [jax.tree.leaves(side.output) for side in sides]
  same = all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(*outputs, strict=True)
  )
  for side in sides:
    del side.output
  del outputs
  begin = time.perf_counter()
  while not small and time.perf_counter() - begin < WARM_UP_SECONDS:
    for side in sides:
      side.time()
  us: tuple[list[float], list[float]] = [], []
  for turn in range(NUM_TURNS):
    for i in (0, 1) if turn % 2 == 0 else (1, 0):
      us[i].append(sides[i].time())
  medians = [statistics.median(each) for each in us]
  return {
    "same_bits": same,
    "us": {"before": us[0], "after": us[1]},
    "before_us": medians[0],
    "after_us": medians[1],
    "ratio": medians[1] / medians[0],
  }


class _Side:
  """The loop of a case in one checkout.

  Attributes:
    output: The state after a loop.
  """

  def __init__(self, call: Call, checkout: Checkout, small: bool):
    with checkout.active():
      run = call.bind(checkout)
    self._inputs, self._state = call.inputs, call.state
    self._steps = 2 if small else max(2, round(LOOP_US / call.guess_us))

    def loop(state, inputs):
      step = lambda i, s: run(lax.optimization_barrier(s), inputs, i)
      return lax.fori_loop(0, self._steps, step, state)

    self._loop = checkout.compile(
      loop, self._state, self._inputs, donate_argnums=0
    )
    self.output = self._run()[1]

  def time(self) -> float:
    """Returns the microseconds of a call, in one run of the loop."""
    return self._run()[0] / self._steps * 1e6

  def _run(self):
    """Runs the loop; returns its seconds, and the state after it."""
    state = jax.block_until_ready(jax.tree.map(jnp.copy, self._state))
    begin = time.perf_counter()
    state = jax.block_until_ready(self._loop(state, self._inputs))
    return time.perf_counter() - begin, state


if __name__ == "__main__":
  main()
