"""Measures attention of sequences that share a prefix, on a GPU.

Compares `cascade_attention` with `paged_attention` over the same table, which
reads the prefix once for each sequence, and with FlashInfer's cascade if it is
installed (`rival`). Also times the two parts of the cascade alone.

Pages lie at random places of a larger pool, whose unused pages hold NaN. Times
are those of a compiled loop, measured on the host, divided by the number of
calls. All outputs are compared with plain JAX. `at_least_us` is the time that
the GPU needs at the rates of `ROOF` to read all keys and values once and to
compute the products of the shared part.

  python -m benchmarks.cascade

Results: benchmarks/results/h200/cascade.json
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import paged_jax
from benchmarks.cascade import rival
from benchmarks.harness import batches, command, results, table
from benchmarks.harness.attention import (
  decode,
  reference,
  relative_error,
  timed,
)
from benchmarks.harness.batches import Batch, Sizes
from benchmarks.harness.cases import attempt, failures
from pallas_kernels.common.rounding import cdiv

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "numpy", *rival.NAMES]
# Rates of an H200: random 4 KB pages, and bfloat16 products of 8192^3.
ROOF = dict(bytes_per_us=4.6e6, flop_per_us=6.87e8)
RIVAL = "FlashInfer"
COLUMNS = {
  "us": "{[median]:9.1f} us",
  "percent_of_roof": "{:5.0f} % of the roof",
  "relative_error": "  error {:.1e}",
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Groups of sequences, with one shared prefix for each group."""

  num_seqs: int  # sequences of all groups
  num_shared: int  # tokens of a prefix
  num_own: int  # tokens of each sequence after its prefix
  num_groups: int = 1
  page_size: int = 16
  heads: tuple[int, int] = (32, 8)

  @property
  def num_tokens(self) -> int:
    """Number of stored tokens."""
    return self.num_groups * self.num_shared + self.num_seqs * self.num_own

  @property
  def num_seen(self) -> int:
    """Number of visible tokens, summed over all queries."""
    return self.num_seqs * (self.num_shared + self.num_own)

  @property
  def groups(self) -> np.ndarray:
    """Offsets of the groups, as in `cu_group_lens`."""
    size = self.num_seqs // self.num_groups
    return np.arange(0, self.num_seqs + 1, size, dtype=np.int32)


CASES = {
  "128 x 32k + 256": Case(128, 32768, 256),
  "128 x 32k + 256, 32 KV heads": Case(128, 32768, 256, heads=(32, 32)),
  "128 x 2k + 256": Case(128, 2048, 256),
  "8 x 32k + 256": Case(8, 32768, 256),
  "512 x 8k + 256": Case(512, 8192, 256),
  "16 groups of 16, 2k + 512": Case(256, 2048, 512, num_groups=16),
  "64 x 4k + 4k": Case(64, 4096, 4096),
}
SMALL_CASES = {"small": Case(6, 64, 20, num_groups=2, heads=(4, 2))}


def main() -> None:
  """Times all cases, prints the figures and writes the record."""
  args, environment = command.start_on_gpu("cascade", __doc__, PACKAGES)
  record = results.keep(
    "cascade",
    records(SMALL_CASES if args.small else CASES, small=args.small),
    args,
    environment,
  )
  command.finish(failures(record["cases"], RIVAL))


def records(cases: dict[str, Case], *, small: bool) -> Iterator[dict]:
  """Yields the record with all figures so far, after each case; prints them."""
  record: dict = {"roof": ROOF, "cases": {}}
  for name, case in cases.items():
    print(name, flush=True)
    record["cases"][name] = sides = attempt(measured, case, small=small)
    print(" ", sides.get("error", f"speedup {sides.get('speedup')}"))
    yield record


def line(name: str, side: dict, at_least_us: float) -> str:
  """Returns the figures of a side, or its error, as text."""
  if "us" in side:
    side = side | {"percent_of_roof": 100 * at_least_us / side["us"]["median"]}
  return table.line(f"  {name}", side, COLUMNS, width=15)


def measured(case: Case, *, small: bool) -> dict:
  """Returns the figures of a case, and prints those of each side.

  Uses plain JAX if small.
  """
  sizes = dataclasses.replace(
    batches.SMALL if small else batches.FULL,
    num_q_heads=case.heads[0],
    num_kv_heads=case.heads[1],
    head_dim=128,
    page_size=case.page_size,
  )
  batch = make(sizes, case)
  plain = decode(sizes, "xla")
  expected = reference(lambda *args: plain(*args[:5]), batch)
  check = functools.partial(relative_error, expected)
  paged = lambda *args: decode(sizes)(*args[:5])
  num_shared = case.num_groups * case.num_shared
  num_own = case.num_seqs * case.num_own
  time = lambda *args: timed(sizes, batch, *args)[0]
  parts = {
    "cascade": (time, _cascade(sizes), case.num_tokens, check),
    "paged": (time, paged, case.num_seen, check),
    "shared part": (time, _shared(sizes, case), num_shared, None),
    "own part": (time, _own(sizes, case), num_own, None),
    RIVAL: (rival.measure, case, batch, check),
  }
  sides, least = {}, at_least_us(sizes, case)
  for name, part in parts.items():
    sides[name] = side = attempt(*part)
    print(line(name, side, least[name]), flush=True)
  return {
    "case": dataclasses.asdict(case),
    "at_least_us": least,
    "sides": sides,
    "speedup": speedup(sides),
  }


def speedup(sides: dict) -> float | None:
  """Returns the speedup of the cascade over `paged_attention`."""
  us = [sides[name].get("us") for name in ("paged", "cascade")]
  if None in us:
    return None
  return us[0]["median"] / us[1]["median"]


def at_least_us(sizes: Sizes, case: Case) -> dict[str, float]:
  """Returns the microseconds of each side at the rates of `ROOF`."""
  read = lambda num: batches.num_bytes(sizes, num) / ROOF["bytes_per_us"]
  flop = 4 * sizes.head_dim * sizes.num_q_heads * case.num_seqs
  products = flop * case.num_shared / ROOF["flop_per_us"]
  shared = max(read(case.num_groups * case.num_shared), products)
  own = read(case.num_seqs * case.num_own)
  return {
    "cascade": shared + own,
    "shared part": shared,
    "own part": own,
    "paged": read(case.num_seen),
    RIVAL: shared + own,
  }


def _cascade(sizes: Sizes):
  def attend(q, k_pages, v_pages, kv_lens, table, num_shared_pages, groups):
    return paged_jax.cascade_attention(
      q,
      k_pages,
      v_pages,
      kv_lens,
      table,
      num_shared_pages,
      cu_group_lens=groups,
      implementation=sizes.implementation,
    )

  return attend


def _shared(sizes: Sizes, case: Case):
  """Returns attention to the prefixes only."""

  def attend(q, k_pages, v_pages, _, table, num_shared_pages, groups):
    return paged_jax.ragged_paged_attention(
      q,
      k_pages,
      v_pages,
      jnp.full(case.num_groups, num_shared_pages * case.page_size),
      table[case.groups[:-1]],
      groups,
      case.num_groups,
      causal=False,
      implementation=sizes.implementation,
    )

  return attend


def _own(sizes: Sizes, case: Case):
  """Returns attention to the tokens after the prefixes only."""
  first = case.num_shared // case.page_size

  def attend(q, k_pages, v_pages, kv_lens, table, *_):
    lens = kv_lens - case.num_shared
    return decode(sizes)(q, k_pages, v_pages, lens, table[:, first:])

  return attend


def make(sizes: Sizes, case: Case) -> Batch:
  """Returns the sequences of a case, with one query for each.

  `more` holds the number of shared pages and the offsets of the groups.
  """
  lens = [case.num_shared] * case.num_groups + [case.num_own] * case.num_seqs
  apart = batches.make(sizes, np.array(lens))
  size = case.num_seqs // case.num_groups
  num_shared = cdiv(case.num_shared, case.page_size)
  num_own = cdiv(case.num_own, case.page_size)
  prefixes = apart.tables[:, : case.num_groups, :num_shared]
  owns = apart.tables[:, case.num_groups :, :num_own]
  tables = jnp.concatenate([jnp.repeat(prefixes, size, axis=1), owns], axis=2)
  return dataclasses.replace(
    apart,
    q=batches.random_queries(sizes, case.num_seqs),
    kv_lens=jnp.full(case.num_seqs, case.num_shared + case.num_own, jnp.int32),
    tables=tables,
    more=(jnp.int32(num_shared), jnp.asarray(case.groups)),
  )


if __name__ == "__main__":
  main()
