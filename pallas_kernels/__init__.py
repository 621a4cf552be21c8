"""Pallas Mosaic GPU kernels for Hopper: arrays in, arrays out.

common   code that the kernels share: operands, schedule, numerics, warps
decode   attention of at most 8 query tokens per sequence (split-KV)
ragged   attention of any number of query tokens per sequence (prefill)
pages    writes tokens into pages of the KV pool, and copies pages

`decode`, `ragged` and `pages` import `common` and not each other. None of them
knows page allocation, models or requests: they read a page table as an array.
The docstring of each package names the functions that the library calls.
"""
