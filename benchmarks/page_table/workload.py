"""Sizes of the page tables of the benchmark, and their first state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import page_table


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases and of their loops."""

  pools: tuple[int, ...] = (2**16, 2**18, 2**20)  # pages
  num_seqs: int = 256
  pages_per_seq: int = 512
  page_size: int = 16
  start_lens: tuple[int, int] = (1000, 4000)  # range of the tokens of a row
  num_steps: int = 1000  # steps of one call
  append_calls: int = 100
  num_calls: int = 30  # calls of another transition
  search_steps: int = 160  # steps with one search of all pages
  slow_steps: int = 16  # steps that go row by row
  slow_calls: int = 20  # calls of all other loops
  num_forks: int = 64
  num_draft: int = 8  # tokens appended and taken back
  sums: tuple[int, ...] = (64, 256, 1024)  # rows
  num_kv_pages: int = 2000
  kv_page: tuple[int, int, int, int] = (
    32,
    8,
    16,
    128,
  )  # bfloat16: 1 MB of K, and 1 MB of V
  num_slots: int = 256  # most copies of a step
  copies: tuple[int, ...] = (0, 1, 16, 64)
  copy_steps: int = 100


FULL = Sizes()
SMALL = Sizes(
  pools=(64, 128),
  num_seqs=8,
  pages_per_seq=9,
  page_size=8,
  start_lens=(5, 30),
  num_steps=16,
  append_calls=2,
  num_calls=2,
  search_steps=16,
  slow_calls=2,
  num_forks=4,
  num_draft=3,
  sums=(4, 16),
  num_kv_pages=16,
  kv_page=(2, 2, 8, 4),
  num_slots=8,
  copies=(0, 1, 3),
  copy_steps=4,
)


def filled(sizes: Sizes, num_pages: int) -> page_table.Appended:
  """Returns a table with rows of random lengths and pages in random order.

  Raises:
    ValueError: If the pool cannot hold the rows at the end of a call, with one
      more token for each step.
  """
  rng = np.random.default_rng(0)
  lens = rng.integers(*sizes.start_lens, sizes.num_seqs)
  longest = lens + sizes.num_steps
  pages = -(-longest // sizes.page_size)
  if pages.sum() > num_pages or pages.max() > sizes.pages_per_seq:
    raise ValueError(f"{num_pages=} cannot hold {pages.sum()} pages.")
  empty = page_table.init(
    num_pages, sizes.page_size, sizes.num_seqs, sizes.pages_per_seq
  )
  stack = jnp.asarray(rng.permutation(num_pages), jnp.int32)
  empty = dataclasses.replace(empty, free_pages=stack)
  return jax.jit(page_table.append)(empty, jnp.asarray(lens, jnp.int32))


def check(table: page_table.PageTable, kv_lens: np.ndarray) -> None:
  """Raises a RuntimeError if a length is wrong or an invariant is broken."""
  invariants = jax.jit(page_table.check)(table)
  if not bool(invariants.valid):
    raise RuntimeError(f"the page table is invalid: {invariants}")
  if not np.array_equal(np.asarray(table.kv_lens), kv_lens):
    raise RuntimeError(f"{table.kv_lens=} should be {kv_lens}")
