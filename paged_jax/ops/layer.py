"""The attention of one layer of a model: write its tokens, then attend.

Every model, whatever its framework, reaches its cache through `attend_layer`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.kv import dtypes, layout
from paged_jax.kv import pool as kv_pool
from paged_jax.kv.cache import PagedCache
from paged_jax.kv.step import Step
from paged_jax.ops import checks
from paged_jax.ops.attention import attend_decode, attend_ragged
from paged_jax.ops.options import check_arrays, make_spec
from paged_jax.ops.plain import causal_attention
from pallas_kernels.common.paged_kv import PagedKV
from pallas_kernels.common.spec import AttentionArrays, AttentionSpec


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
  """Writes keys and values of a step's tokens, and attends with its queries.

  The caller has projected and rotated q, k and v. Attention is causal.

  Args:
    q: [num_tokens, num_q_heads, head_dim] queries of the step's flat tokens; or
      [batch, length, ...] after `begin_padded`.
    k: The keys of the same tokens; None for a layer that shares those of
      another.
    v: The values; None with `k`.
    cache: The cache, after `begin_step` or `begin_padded`. None attends without
      a cache, each sequence `[..., length, heads, width]` to itself, and can be
      differentiated.
    step: What they returned; None with `cache`.
    layer: The model's number of the layer.
    scale: See `paged_jax.paged_attention`, as for the next six.
    sliding_window: At most the window that the model declares for the layer.
    num_sink_tokens: First tokens that stay visible besides the window.
    logits_soft_cap: Soft cap of the logits.
    batch_invariant: Whether a row must not depend on other rows.
    sinks: [num_q_heads], one more logit per head in the denominator.
    alibi_slopes: [num_q_heads], slopes of ALiBi.

  Returns:
    The output in the shape and dtype of `q`, 0 for tokens without a place, and
    the next cache.

  Raises:
    ValueError: If a shape, dtype or option is wrong, or does not fit the layer.
    NotImplementedError: If the implementation of the cache cannot serve.
  """
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
  tree_mask = step.tree_mask
  place = _place(cache, layer, sliding_window)
  group, group_step = cache.groups[place.group], step.groups[place.group]
  _, _, num_kv_heads, _, head_dim = group.pool.k.shape
  _check_given(k, v, layer, place.is_shared)
  tokens, owner = step.positions.shape, f"layer {layer}"
  _check_tokens(q, k, v, tokens, num_kv_heads, head_dim, owner)

  # 1. From the caller's axes to the flat tokens of the step.
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


def _place(
  cache: PagedCache, layer: int, sliding_window: int | None
) -> layout.Place:
  """Returns where a layer's keys and values are, after checks of its window."""
  if not 0 <= layer < len(cache.layers):
    raise ValueError(
      f"{layer=} must be in [0, {len(cache.layers)}), the layers of the cache."
    )
  declared = cache.layers[layer].sliding_window
  if declared is not None and (
    sliding_window is None or sliding_window > declared
  ):
    raise ValueError(
      f"{sliding_window=} of layer {layer} must be at most {declared}, which "
      "the model declares: pages behind that window may be gone."
    )
  return layout.places(cache.layers)[layer]


def _check_given(
  k: Array | None, v: Array | None, layer: int, is_shared: bool
) -> None:
  """Raises a ValueError if k and v are given to a layer that shares, or not."""
  if is_shared != (k is None) or (k is None) != (v is None):
    raise ValueError(
      f"k and v of layer {layer} must be "
      f"{'None: it shares those of another' if is_shared else 'arrays'}."
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
    tokens: The axes of tokens.
    num_kv_heads: Key and value heads.
    head_dim: Width of one head.
    owner: Whose they are, for messages.
  """
  named = {"q": q}
  if k is not None and v is not None:
    named |= {"k": k, "v": v}
  checks.check_are_arrays(**named)
  for name, x in named.items():
    if x.ndim != len(tokens) + 2 or x.shape[: len(tokens)] != tokens:
      raise ValueError(
        f"{name}.shape={x.shape} must be the axes {tokens} of the tokens, and "
        "heads and width."
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
  """Returns [num_tokens, heads, width], in the order of the step."""
  flat = x.reshape(-1, *x.shape[-2:])
  if step.padding is None:
    return flat
  return flat.at[step.padding.places].get(mode="fill", fill_value=0)


def _unflatten(x: Array, step: Step, shape: tuple[int, ...]) -> Array:
  """Returns flat tokens on the caller's axes, 0 for padding."""
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
  """Returns causal attention of whole sequences, and no cache."""
  if cache is not None or step is not None:
    raise ValueError("cache and step must both be given, or both be None.")
  if k is None or v is None:
    raise ValueError(
      "k and v must be arrays without a cache: hand the layer those that it "
      "shares."
    )
  if q.ndim < 3 or k.ndim != q.ndim:
    raise ValueError(
      f"{q.shape=} and {k.shape=} must be [..., length, heads, width]."
    )
  _check_tokens(q, k, v, q.shape[:-2], k.shape[-2], q.shape[-1], "q and k")
  arrays = AttentionArrays(sinks, alibi_slopes)
  flat_q = q.reshape(-1, *q.shape[-2:])
  check_arrays(arrays, flat_q, spec)
  return causal_attention(q, k, v, arrays, spec), None
