"""The paged KV cache: layouts, the pool of pages, the cache and its steps."""
