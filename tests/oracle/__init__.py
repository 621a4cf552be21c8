"""Paged attention in plain NumPy: float64, one query at a time.

Shares no code with the library; every implementation is compared with it.
"""

import numpy as np


def attend_one(
  q,
  keys,
  values,
  visible,
  *,
  scale,
  logits_soft_cap=None,
  sinks=None,
  alibi_slopes=None,
  position=None,
):
  """Attends with one query token, all its heads, to a contiguous context.

  q [num_q_heads, head_dim]; keys, values [context, num_kv_heads, head_dim];
  visible bool[context]; position of the query, if there are slopes. Returns out
  [num_q_heads, head_dim], lse [num_q_heads].
  """
  num_q_heads, head_dim = q.shape
  num_kv_heads = keys.shape[1]
  out = np.zeros((num_q_heads, head_dim))
  lse = np.full(num_q_heads, -np.inf)
  where = np.flatnonzero(visible)
  if where.size == 0:
    return out, lse
  for head in range(num_q_heads):
    kv_head = head // (num_q_heads // num_kv_heads)
    logits = keys[where, kv_head].astype(np.float64) @ q[head].astype(
      np.float64
    )
    logits = logits * scale
    if logits_soft_cap is not None:
      logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
    if alibi_slopes is not None:
      logits = logits + np.float64(alibi_slopes[head]) * (where - position)
    if sinks is not None:
      logits = np.append(logits, np.float64(sinks[head]))
    top = logits.max()
    weights = np.exp(logits - top)
    lse[head] = top + np.log(weights.sum())
    weights = weights / weights.sum()
    weights = weights[: where.size]
    out[head] = weights @ values[where, kv_head].astype(np.float64)
  return out, lse


def context_of(pages, row, kv_len, scales=None):
  """Gathers a context [kv_len, num_kv_heads, head_dim] and its mapped[kv_len].

  Scales [num_pages, num_kv_heads, page_size] multiply quantised pages.
  """
  num_pages, num_kv_heads, page_size, head_dim = pages.shape
  context = np.zeros((kv_len, num_kv_heads, head_dim), np.float64)
  mapped = np.zeros(kv_len, bool)
  for position in range(kv_len):
    page = int(row[position // page_size])
    if 0 <= page < num_pages:
      context[position] = pages[page, :, position % page_size]
      if scales is not None:
        factors = np.float64(scales[page, :, position % page_size])
        context[position] *= factors[:, None]
      mapped[position] = True
  return context, mapped


def ragged_paged_attention(
  q,
  k_pages,
  v_pages,
  kv_lens,
  page_indices,
  cu_q_lens,
  num_active,
  *,
  causal=True,
  tree_mask=None,
  k_scales=None,
  v_scales=None,
  scale=None,
  sliding_window=None,
  num_sink_tokens=0,
  logits_soft_cap=None,
  sinks=None,
  alibi_slopes=None,
):
  """Supports all options of the public op. Returns float64 out and lse."""
  q = np.asarray(q, np.float64)
  k_pages = np.asarray(k_pages, np.float64)
  v_pages = np.asarray(v_pages, np.float64)
  if scale is None:
    scale = q.shape[-1] ** -0.5
  out = np.zeros(q.shape)
  lse = np.full(q.shape[:2], -np.inf)
  for seq in range(int(num_active)):
    kv_len = int(kv_lens[seq])
    row = page_indices[seq]
    keys, mapped = context_of(k_pages, row, kv_len, k_scales)
    values, _ = context_of(v_pages, row, kv_len, v_scales)
    start, end = int(cu_q_lens[seq]), int(cu_q_lens[seq + 1])
    for i in range(end - start):
      context = kv_len - (end - start)
      pos = context + i
      key = np.arange(kv_len)
      visible = mapped & (key <= pos) if causal else mapped
      if tree_mask is not None:
        new = np.flatnonzero(tree_mask[start + i, : end - start])
        pos, visible = context + len(new) - 1, mapped & (key < context)
      if sliding_window is not None:
        visible &= (key > pos - sliding_window) | (key < num_sink_tokens)
      if tree_mask is not None:
        visible |= mapped & np.isin(key, context + new)
      out[start + i], lse[start + i] = attend_one(
        q[start + i],
        keys,
        values,
        visible,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        position=pos,
      )
  return out, lse


def paged_attention(q, k_pages, v_pages, kv_lens, page_indices, **options):
  """Attends with one query per sequence, at its last position."""
  num_seqs = len(kv_lens)
  # A sequence of length 0 has a query that sees no key.
  return ragged_paged_attention(
    q,
    k_pages,
    v_pages,
    kv_lens,
    page_indices,
    np.arange(num_seqs + 1),
    num_seqs,
    **options,
  )


def _rms_norm(x, weight, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x, positions, theta):
  """Rotates pairs (i, i + half) of x [num_tokens, num_heads, head_dim]."""
  half = x.shape[-1] // 2
  angle = positions[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def llama_logits(config, weights, tokens):
  """Returns logits [num_tokens, vocab_size] of one sequence, recomputed.

  `weights` have their Hugging Face names; matrices are [out, in].
  """
  w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
  n = len(tokens)
  positions = np.arange(n)
  x = w["model.embed_tokens.weight"][np.asarray(tokens)]
  for i in range(config.num_layers):
    at = f"model.layers.{i}"
    h = _rms_norm(x, w[f"{at}.input_layernorm.weight"], config.rms_norm_eps)
    heads = lambda name, h=h, at=at: (
      h @ w[f"{at}.self_attn.{name}_proj.weight"].T
    ).reshape(n, -1, config.head_dim)
    q = rotate(heads("q"), positions, config.rope_theta)
    k = rotate(heads("k"), positions, config.rope_theta)
    v = heads("v")
    out = [
      attend_one(q[j], k, v, positions <= j, scale=config.head_dim**-0.5)[0]
      for j in range(n)
    ]
    out = np.stack(out).reshape(n, -1)
    x = x + out @ w[f"{at}.self_attn.o_proj.weight"].T
    h = _rms_norm(
      x, w[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps
    )
    gate = h @ w[f"{at}.mlp.gate_proj.weight"].T
    up = h @ w[f"{at}.mlp.up_proj.weight"].T
    x = (
      x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    )
  x = _rms_norm(x, w["model.norm.weight"], config.rms_norm_eps)
  head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return x @ head.T


def llama_greedy(config, weights, prompt, num_new):
  """Continues a prompt greedily. Returns token ids and their logprobs."""
  tokens, logprobs = list(prompt), []
  for _ in range(num_new):
    logits = llama_logits(config, weights, tokens)[-1]
    token = int(logits.argmax())
    top = logits.max()
    logprobs.append(logits[token] - top - np.log(np.exp(logits - top).sum()))
    tokens.append(token)
  return tokens[len(prompt) :], logprobs
