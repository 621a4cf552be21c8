"""What the warps of a memory warpgroup share."""

import itertools

import pytest

from pallas_kernels.common import gpu, warps


# As many chunks and columns of Q as there may be, and fewer than warps.
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16])
@pytest.mark.parametrize("num_columns", [1, 4])
def test_each_chunk_is_copied_by_one_warp(num_chunks, num_columns):
  chunks = list(range(num_chunks))
  places = list(itertools.product(range(3), range(num_columns)))
  share = warps.Share(chunks, chunks, places)
  parts = [warps.part_of(share, warp) for warp in range(gpu.WARPS)]
  for name in share._fields:
    copied = itertools.chain(*(getattr(part, name) for part in parts))
    assert sorted(copied) == getattr(share, name)
  sizes = [sum(map(len, part)) for part in parts]
  assert max(sizes) - min(sizes) <= 1


def test_pages_are_those_of_the_chunks_of_keys_and_of_values():
  share = warps.Share(k=[2], v=[1, 2], q=[])
  assert share.chunks == [1, 2]
  assert share.pages([70, 80]) == ({2: 80}, {1: 70, 2: 80})
