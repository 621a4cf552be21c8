"""The paged KV cache: the pool, its pages, and the cache of a model."""
