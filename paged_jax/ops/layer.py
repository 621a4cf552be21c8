"""The attention of one layer: writes the keys and values, then attends.

Models of any framework use the cache through `attend_layer` only.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.kv import dtypes, layout
from paged_jax.kv import pool as kv_pool
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.step import Step
from paged_jax.ops import checks
from paged_jax.ops.attention import attend_decode, attend_ragged
from paged_jax.ops.dense import causal_attention
from paged_jax.ops.options import check_arrays, make_spec
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import (
  AttentionArrays,
  AttentionSpec,
  check_count,
)


def attend_layer(
  q: Float[Array, "*tokens num_q_heads head_dim"],
  k: Float[Array, "*tokens num_kv_heads head_dim"] | None,
  v: Float[Array, "*tokens num_kv_heads head_dim"] | None,
  cache: PagedCache | None,
  step: Step | None,
  layer: int,
  *,
  scale: float | None = None,
  sliding_window: int | None = None,
  num_sink_tokens: int = 0,
  logits_soft_cap: float | None = None,
  batch_invariant: bool = False,
  sinks: Float[Array, " num_q_heads"] | None = None,
  alibi_slopes: Float[Array, " num_q_heads"] | None = None,
) -> tuple[Float[Array, "*tokens num_q_heads head_dim"], PagedCache | None]:
  """Writes the keys and values of a step's tokens, then computes attention.

  The caller projects q, k and v and applies the rotary embedding, if any.
  Attention is causal, or follows `step.tree_mask`. See `begin_step` for an
  example.

  Args:
    q: [num_tokens, num_q_heads, head_dim], queries of the step's tokens; or
      [batch, length, num_q_heads, head_dim] after `begin_padded`. bfloat16,
      float16 or float32.
    k: [num_tokens, num_kv_heads, head_dim], keys of the same tokens; None for a
      layer that shares the keys and values of another (`LayerKV.shares`).
    v: Values, like `k`.
    cache: The cache that `begin_step`, `begin_padded` or the previous layer
      returned; do not use it after the call. If None, each sequence of
      [..., length, heads, head_dim] attends to itself only, without a cache;
      this can be differentiated.
    step: The step that `begin_step` or `begin_padded` returned; None if `cache`
      is None.
    layer: Index of the layer in `model.layers`.
    scale: Multiplies the logits; `head_dim ** -0.5` if None.
    sliding_window: See `paged_attention`. If the model declares a window for
      the layer (`LayerKV.sliding_window`), it must be given here and be at most
      that wide.
    num_sink_tokens: See `paged_attention`.
    logits_soft_cap: See `paged_attention`.
    batch_invariant: See `paged_attention`.
    sinks: [num_q_heads]; see `paged_attention`.
    alibi_slopes: [num_q_heads]; see `paged_attention`.

  Returns:
    The output in the shape and dtype of `q`, which is 0 for tokens that are not
    stored, and the next cache (None without a cache).

  Raises:
    ValueError: If only one of `cache` and `step` is None, `layer` is out of
      range, `sliding_window` exceeds the declared one, k or v is missing or is
      given to a layer that shares, a shape or dtype does not fit the step and
      the layer, or an option is out of its range.
    NotImplementedError: If `cache.implementation` cannot serve these arguments
      here; the message says why. If it is differentiated with a cache.
  """
  checks.check_are_arrays(q=q)
  if q.ndim < 3 or 0 in q.shape[-2:]:
    raise ValueError(
      f"{q.shape=} must be the axes of the tokens, then heads and head_dim, of "
      "at least 1."
    )
  check_count("layer", layer, 0)
  spec = make_spec(
    q.shape[-1],
    scale,
    sliding_window=sliding_window,
    num_sink_tokens=num_sink_tokens,
    logits_soft_cap=logits_soft_cap,
    batch_invariant=batch_invariant,
  )
  if cache is None or step is None:
    return _attend_without_cache(
      q, k, v, cache, step, spec, sinks, alibi_slopes
    )
  _check_step(cache, step)
  tree_mask = step.tree_mask
  place = _place(cache, layer, sliding_window)
  group, group_step = cache.groups[place.group], step.groups[place.group]
  _, _, num_kv_heads, _, head_dim = group.pool.k.shape
  _check_given(k, v, layer, place.is_shared)
  tokens, owner = step.positions.shape, f"layer {layer}"
  _check_tokens(q, k, v, tokens, num_kv_heads, head_dim, owner)

  # 1. Flatten the caller's axes to the token axis of the step.
  flat_q = _flatten(q, step)
  arrays = AttentionArrays(sinks, alibi_slopes, tree_mask)
  check_arrays(arrays, flat_q, spec)

  # 2. Write.
  pool = group.pool
  if k is not None and v is not None:
    pool = kv_pool.write(
      pool,
      place.layer,
      _flatten(k, step),
      _flatten(v, step),
      group_step.slots,
      debug=group.table.debug,
      implementation=cache.implementation,
    )
    cache = cache.with_pool(place.group, pool)

  # 3. Attend.
  kv = kv_pool.paged_kv(
    pool, place.layer, step.kv_lens, group_step.page_indices
  )
  flat_q = flat_q.astype(dtypes.query_dtype(q.dtype, pool.k.dtype))
  out = _attend(flat_q, kv, step, arrays, spec, cache.implementation)
  return _unflatten(out.astype(q.dtype), step, q.shape), cache


def _check_step(cache: PagedCache, step: Step) -> None:
  """Raises a ValueError if a step cannot be one of the cache."""
  if not isinstance(cache, PagedCache) or not isinstance(step, Step):
    raise ValueError(
      "cache must be a PagedCache and step a Step, got "
      f"{type(cache).__name__} and {type(step).__name__}."
    )
  shapes = [group.page_indices.shape for group in step.groups]
  expected = [
    (step.num_rows, group.table.pages_per_seq) for group in cache.groups
  ]
  if shapes != expected or step.num_rows > cache.num_seqs:
    raise ValueError(
      f"step is of another cache: its groups have pages {shapes}, and those of "
      f"this cache of {cache.num_seqs} rows {expected}."
    )


def _place(
  cache: PagedCache, layer: int, sliding_window: int | None
) -> layout.Place:
  """Returns the place of a layer's keys and values; checks its window."""
  if layer >= len(cache.layers):
    raise ValueError(
      f"{layer=} must be in [0, {len(cache.layers)}), the layers of the cache."
    )
  declared = cache.layers[layer].sliding_window
  if declared is not None and (
    sliding_window is None or sliding_window > declared
  ):
    raise ValueError(
      f"{sliding_window=} of layer {layer} must be at most {declared}, the "
      "window that the model declares: pages before it may have been released."
    )
  return layout.places(cache.layers)[layer]


def _check_given(
  k: Array | None, v: Array | None, layer: int, is_shared: bool
) -> None:
  """Raises a ValueError if k and v are missing, or given to a sharing layer."""
  if is_shared != (k is None) or (k is None) != (v is None):
    raise ValueError(
      f"k and v of layer {layer} must be "
      f"{'None: it shares those of another layer' if is_shared else 'arrays'}."
    )


def _check_tokens(
  q: Array,
  k: Array | None,
  v: Array | None,
  tokens: tuple[int, ...],
  num_kv_heads: int,
  head_dim: int,
  owner: str,
) -> None:
  """Raises a ValueError if q, k and v do not fit the tokens and the layer.

  Args:
    q: The queries.
    k: The keys, or None.
    v: The values, or None.
    tokens: Sizes of the token axes.
    num_kv_heads: Number of key and value heads.
    head_dim: Width of one head.
    owner: What these numbers belong to, for error messages.
  """
  named = {"q": q}
  if k is not None and v is not None:
    named |= {"k": k, "v": v}
  checks.check_are_arrays(**named)
  for name, x in named.items():
    if x.ndim != len(tokens) + 2 or x.shape[: len(tokens)] != tokens:
      raise ValueError(
        f"{name}.shape={x.shape} must be the axes {tokens} of the tokens, then "
        "heads and head_dim."
      )
    if x.dtype not in dtypes.FLOAT_DTYPES:
      raise ValueError(f"{name}.dtype={x.dtype} must be {dtypes.FLOAT_NAMES}.")
    if x.shape[-1] != head_dim:
      raise ValueError(
        f"{name}.shape={x.shape} must have {head_dim=} of {owner}."
      )
    if name != "q" and x.shape[-2] != num_kv_heads:
      raise ValueError(
        f"{name}.shape={x.shape} must have {num_kv_heads=} of {owner}."
      )
  if q.shape[-2] % num_kv_heads:
    raise ValueError(
      f"{q.shape=} must have a multiple of {num_kv_heads=} query heads."
    )


def _flatten(x: Array, step: Step) -> Array:
  """Returns [num_tokens, heads, head_dim], in the order of the step."""
  flat = x.reshape(-1, *x.shape[-2:])
  if step.padding is None:
    return flat
  return flat.at[step.padding.places].get(mode="fill", fill_value=0)


def _unflatten(x: Array, step: Step, shape: tuple[int, ...]) -> Array:
  """Returns flat tokens in the caller's shape, 0 for padding."""
  if step.padding is not None:
    x = x.at[step.padding.tokens].get(mode="fill", fill_value=0)
  return x.reshape(shape)


def _attend(
  q: Array,
  kv: PagedKV,
  step: Step,
  arrays: AttentionArrays,
  spec: AttentionSpec,
  implementation: str | None,
) -> Array:
  """Returns the output of flat queries, in their dtype."""
  if step.max_q_len == 1 and step.tree_mask is None:
    return attend_decode(q, kv, arrays, spec, implementation)[0]
  num_rows = jnp.int32(step.num_rows)
  return attend_ragged(
    q,
    kv,
    step.cu_q_lens,
    num_rows,
    arrays,
    spec,
    implementation,
    max_q_len=step.max_q_len,
  )[0]


def _attend_without_cache(q, k, v, cache, step, spec, sinks, alibi_slopes):
  """Returns causal attention of whole sequences, and None."""
  if cache is not None or step is not None:
    raise ValueError("cache and step must both be given, or both be None.")
  if k is None or v is None:
    raise ValueError(
      "k and v must be arrays without a cache: for a layer with `shares`, pass "
      "the k and v of that earlier layer."
    )
  checks.check_are_arrays(k=k, v=v)
  if k.ndim != q.ndim or 0 in k.shape[-2:]:
    raise ValueError(
      f"{q.shape=} and {k.shape=} must be [..., length, heads, head_dim]."
    )
  _check_tokens(q, k, v, q.shape[:-2], k.shape[-2], q.shape[-1], "q and k")
  arrays = AttentionArrays(sinks, alibi_slopes)
  flat_q = q.reshape(-1, *q.shape[-2:])
  check_arrays(arrays, flat_q, spec)
  return causal_attention(q, k, v, arrays, spec), None
