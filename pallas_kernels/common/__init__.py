"""What the kernels share. Nothing here knows of a particular kernel.

limits     shapes and dtypes that the kernels take, memory of the GPU
spec       the options of an attention op, as two values that travel whole
paged_kv   the pool, the page table and the lengths, as one pytree
problem    the static facts of a launch over paged KV
schedule   splits the KV tiles of a ragged batch evenly between programs
kv_tiles   which KV tiles a query visits, and what it sees of them
tree_bits  masks of speculative trees, as bits
base2      the softmax in base 2, whatever axis the queries are on
wgmma      matrix products by the tensor cores
warps      splits the copies of the producer warpgroup between its warps
gpu, pdl   the device; overlap with the kernel launched before
"""
