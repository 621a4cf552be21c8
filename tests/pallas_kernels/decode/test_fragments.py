"""The decode kernel's loads of 8-bit numbers, simulated in NumPy.

`ldmatrix`, the operands and accumulators of wgmma, and the swizzles of TMA are
defined as in NVIDIA's PTX ISA.
"""

import numpy as np
import pytest

from pallas_kernels.common.limits import HEAD_DIMS
from pallas_kernels.decode import fragments
from pallas_kernels.decode.softmax import row_blocks

THREADS = np.arange(128)
WARP, LANE = THREADS // 32, THREADS % 32

shapes = pytest.mark.parametrize(
  ("keys", "head_dim"), [(n, d) for n in (64, 128) for d in HEAD_DIMS]
)


def _memory(tile):
  """Returns the bytes of a tile in shared memory, in the order of TMA.

  TMA writes tiles of 8 rows by `width` bytes, one after the other along a row.
  """
  keys, head_dim = tile.shape
  if not fragments.transforms(head_dim):
    return tile.reshape(-1)
  width = fragments.transforms(head_dim)[1].swizzle
  tiles = tile.reshape(keys // 8, 8, head_dim // width, width)
  flat = tiles.transpose(0, 2, 1, 3).reshape(-1)
  memory = np.empty_like(flat)
  for start in range(0, len(flat), 16):
    row_of_128 = start // 128
    piece = start // 16 ^ row_of_128 % (width // 16)
    memory[16 * piece : 16 * piece + 16] = flat[start : start + 16]
  return memory


def _ldmatrix(memory, addresses, num, is_transposed):
  """Returns bytes [num, thread, 4] of matrices; 8 lanes address the rows."""
  words = np.empty((num, 128, 4), memory.dtype)
  for warp in range(4):
    for i in range(num):
      lanes = 32 * warp + 8 * i + np.arange(8)
      # The hardware reads 8 rows at once only if they are in different banks.
      assert len(set(addresses[lanes] // 16 % 8)) == 8
      rows = np.stack([memory[a : a + 16] for a in addresses[lanes]])
      pairs = rows.reshape(8, 8, 2)
      if is_transposed:
        pairs = pairs.swapaxes(0, 1)
      words[i, 32 * warp : 32 * warp + 32] = pairs.reshape(32, 4)
  return words


def _load(tile, shape, address, loads, is_transposed):
  """Returns the wgmma operand that the threads have in registers."""
  memory, operand = _memory(tile), np.full(shape, -1, int)
  row, column = address(THREADS)
  for load in loads:
    first = fragments.byte_offset(row, column + load.column, tile.shape[1])
    addresses = first + load.row * tile.shape[1]
    num = len(load.registers)
    words = _ldmatrix(memory, addresses, num, is_transposed)
    for word, places in zip(words, load.registers, strict=True):
      for side, (block, eight, half) in enumerate(places):
        rows = 64 * block + 16 * WARP + 8 * half + LANE // 4
        for i in range(2):
          columns = 8 * eight + LANE % 4 * 2 + i
          assert (operand[rows, columns] == -1).all()
          operand[rows, columns] = word[:, 2 * i + side]
  return operand


def _tile(keys, head_dim):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (keys, head_dim), np.uint8)


@shapes
def test_k_meets_queries_in_the_same_order(keys, head_dim):
  tile = _tile(keys, head_dim)
  for start in range(0, head_dim, 64):
    size = min(64, head_dim - start)
    loads = fragments.k_loads(keys, start, size)
    address = fragments.k_address
    k = _load(tile, (keys, size), address, loads, is_transposed=False)
    expected = fragments.permute(tile[:, start : start + size])
    np.testing.assert_array_equal(k, expected)


@shapes
def test_rows_of_v_are_in_that_order_too(keys, head_dim):
  tile = _tile(keys, head_dim)
  for start, size in row_blocks(head_dim):
    loads = fragments.v_loads(keys, start, size)
    v = _load(
      tile, (size, keys), fragments.v_address, loads, is_transposed=True
    )
    expected = fragments.permute(tile[:, start : start + size]).T
    np.testing.assert_array_equal(v, expected)


@shapes
def test_an_address_is_where_tma_wrote(keys, head_dim):
  tile = _tile(keys, head_dim)
  row, column = np.indices(tile.shape)
  found = _memory(tile)[fragments.byte_offset(row, column, head_dim)]
  np.testing.assert_array_equal(found, tile)


@pytest.mark.parametrize("layout", ["_PAIRS", "_ELEMENTS"])
def test_rows_lie_in_registers_as_wgmma_has_them(layout):
  layout = getattr(fragments, layout)
  x = np.arange(128 * 16).reshape(128, 16)  # rows in natural order
  tiled = x
  for tile in layout.tiling.tiles:
    kept, axes = tiled.ndim - len(tile), range(len(tile))
    split = [n // t for n, t in zip(tiled.shape[kept:], tile, strict=True)]
    pairs = [n for pair in zip(split, tile, strict=True) for n in pair]
    tiled = tiled.reshape(*tiled.shape[:kept], *pairs)
    outer, inner = ([kept + 2 * i + j for i in axes] for j in range(2))
    tiled = tiled.transpose(*range(kept), *outer, *inner)
  of_thread = (*layout.warp_dims, *layout.lane_dims)
  tiled = np.moveaxis(tiled, of_thread, range(-3, 0))
  registers = tiled.reshape(-1, 128)
  wgmma = fragments.permute(x.T).T
  expected = [
    wgmma[64 * b + 16 * WARP + 8 * h + LANE // 4, 8 * e + LANE % 4 * 2 + i]
    for b in range(2)
    for e in range(2)
    for h in range(2)
    for i in range(2)
  ]
  np.testing.assert_array_equal(registers, expected)
