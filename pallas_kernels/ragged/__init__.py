"""Paged attention of any number of query tokens per sequence (prefill).

The library calls `kernel.attend`. Before that, it asks `config.unsupported`
whether the kernel supports the shapes.

  kernel.attend                  sizes (problem), tiles (config)
    query_tiles.list_tiles       the list of query tiles, sorted by cost
    schedule.split_evenly        if items are split between programs
    kernel._launch               first kernel: persistent programs
      kernel._body
        load.run                 producer warpgroup: page ids, Q, K, V
        load_quantised.run       producer warpgroup for 8-bit pages, instead
          dequantise.dequantise  8-bit rows -> 16-bit wgmma operand
        compute.run              consumer warpgroups, 64 query rows each
          softmax.fold_scores    m, l and P of a tile of scores
          output.write           output, or partial softmax state of a split
    output.merge_partials        second kernel, if items are split: merges them

kernel          the public function, operands by the kernel's layout, the launch
config          supported shapes, tile sizes, registers, shared memory
problem         static sizes, inputs, outputs, shared memory, the work item
query_tiles     cuts queries into tiles, and assigns them to programs
load            producer: copies Q, K and V of each item
load_quantised  producer for 8-bit pages: copies, and dequantises K and V
dequantise      producer for 8-bit pages: dequantises slices, in PTX
compute         consumer: attends each item tile by tile
softmax         consumer: the online softmax, queries in rows, keys in columns
output          consumer: writes outputs and partials; the merging kernel
"""
