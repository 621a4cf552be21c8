"""Kernels that write tokens into pages of the KV pool, and copy pages.

The library calls `write.write_tokens` after each layer's projections, and
`copy.copy_pages` for copy-on-write. Before that, it asks
`limits.unsupported_write` and `limits.unsupported_copy`.

  write.write_tokens   vectors per thread, launch
    write._body        global memory -> registers -> the tokens' slots
  copy.copy_pages      tiles, launch: one program per copy and part of a page
    copy._body         global memory -> shared memory -> the other page

There is no producer and consumer: each thread of `write`, and each program of
`copy`, both reads and writes its part.

limits   supported pools and pages
write    writes K, V and scales of new tokens, in place
copy     copies whole pages of all layers, in place
"""
