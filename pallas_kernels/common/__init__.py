"""Code that the kernels share. It does not depend on any single kernel.

Operands and options
  types      type aliases: arrays at the launch, references in a kernel
  paged_kv   the KV pool, the page table and the lengths, as one pytree
  spec       the options of an attention op: a static value and a pytree
  checks     checks that K, V and their scales match
  limits     supported shapes and dtypes; shared memory of a Hopper GPU
  problem    the static sizes of a launch over paged KV
  refs       declares outputs, shared memory and barriers
  swizzle    widths of swizzled tiles in shared memory

Schedule
  schedule   splits the KV tiles of a ragged batch evenly between programs
  rounding   ceiling division and rounding up

Page table lookups and masks
  kv_tiles   visited KV tiles, visible positions, page ids of a tile
  tree_bits  tree masks (speculative decoding), packed into bits

Numerics
  base2      the online softmax in base 2, for either orientation of a tile
  wgmma      matrix products by the tensor cores
  ptx        constants and pointers for PTX that is written by hand

GPU and warps
  gpu        the device that tile sizes are chosen for
  warps      distributes the copies of the producer warpgroup over its warps
  pdl        programmatic dependent launch
"""
