"""Paged decode attention: at most 8 query tokens per sequence, split-KV.

The library calls `kernel.paged_decode` for one query token per sequence and
`short_queries.attend` for up to 8 (speculative verification). Before that, it
asks `config.unsupported` whether the kernel supports the shapes.

  short_queries.attend           groups query tokens by sequence, and ungroups
  kernel.paged_decode
    kernel.attend                sizes (problem), tiles (config), schedule
      kernel._launch             first kernel: one program per range of KV tiles
        kernel._body
          load.run               producer warpgroup: page ids, Q, K, V
            ring.load            chunks of a KV tile into a stage of a ring
          compute.run            consumer warpgroup
            tile.fold            S = K Q^T, mask, P, O += V^T P
              softmax.fold       m, l and P of a tile of scores
            partials.write_*     output, or partial softmax state of a split
      partials.merge_partials    second kernel: merges the splits of items

kernel         the public function, operands by the kernel's layout, the launch
config         supported shapes, tile sizes, bytes of shared memory
problem        static sizes, inputs, outputs, shared memory and barriers
load           producer: loads the tiles of each split; the shared tile loop
ring           producer and consumer: ring of KV tiles and its barriers
compute        consumer: attends each split tile by tile
tile           consumer: folds one KV tile into the softmax
softmax        consumer: the online softmax, keys in rows, queries in columns
fragments      consumer: 8-bit tiles as wgmma operands in registers
partials       consumer: writes outputs and partials; the merging kernel
short_queries  several query tokens per sequence as more columns of a tile
"""
