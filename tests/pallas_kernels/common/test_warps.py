"""Copies of the producer warpgroup, by warp."""

import itertools

import pytest

from pallas_kernels.common import gpu, warps


# The largest numbers of chunks and of columns of Q, and fewer than warps.
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16])
@pytest.mark.parametrize("num_columns", [1, 4])
def test_each_chunk_is_copied_by_one_warp(num_chunks, num_columns):
  chunks = list(range(num_chunks))
  places = list(itertools.product(range(3), range(num_columns)))
  copies = warps.Copies(chunks, chunks, places)
  parts = [warps.part_of(copies, warp) for warp in range(gpu.WARPS)]
  for name in copies._fields:
    copied = itertools.chain(*(getattr(part, name) for part in parts))
    assert sorted(copied) == getattr(copies, name)
  sizes = [sum(map(len, part)) for part in parts]
  assert max(sizes) - min(sizes) <= 1


def test_pages_are_those_of_the_chunks_of_keys_and_of_values():
  copies = warps.Copies(k=[2], v=[1, 2], q=[])
  assert copies.chunks == [1, 2]
  assert copies.pages([70, 80]) == ({2: 80}, {1: 70, 2: 80})
