"""Random paged problems: permuted tables, uneven lengths, poisoned memory."""

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from paged_jax import devices

# Largest ||out - oracle|| / ||oracle||, by dtype of the pages: P and the output
# are rounded to that dtype. For float32 only the order of the sums differs.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 1e-3}

# Kernels are interpreted if no Hopper GPU can run them.
ON_HOPPER = devices.why_not_hopper() is None
INTERPRET = None if ON_HOPPER else plgpu.InterpretGPUParams()
PLAIN = dict(
  scale=0.125, sliding_window=None, num_sink_tokens=0, logits_soft_cap=None
)

# Options that the attention ops get for pages of any dtype.
LENS = [0, 1, 15, 16, 17, 40, 300]
OPTIONS = {
  "plain": {},
  "scale": dict(scale=0.3),
  "window": dict(sliding_window=20),
  "window_of_one": dict(sliding_window=1),
  "window_and_sink_tokens": dict(sliding_window=20, num_sink_tokens=5),
  "far_window_and_sink_tokens": dict(sliding_window=16, num_sink_tokens=20),
  "soft_cap": dict(logits_soft_cap=1.5),
  "all": dict(
    scale=0.2, sliding_window=33, num_sink_tokens=4, logits_soft_cap=2.0
  ),
}


@dataclasses.dataclass
class Problem:
  """The arguments of `ragged_paged_attention`, as NumPy arrays."""

  q: np.ndarray
  k_pages: np.ndarray
  v_pages: np.ndarray
  kv_lens: np.ndarray
  page_indices: np.ndarray
  cu_q_lens: np.ndarray
  num_active: int

  def args(self):
    return tuple(jnp.asarray(x) for x in dataclasses.astuple(self))

  def decode_args(self):
    return self.args()[:5]


def make(
  *,
  kv_lens,
  q_lens=None,
  num_q_heads=4,
  num_kv_heads=2,
  head_dim=64,
  page_size=16,
  dtype="float32",
  spare_pages=3,
  spare_tokens=0,
  num_active=None,
  poison=np.nan,
  seed=0,
):
  """Returns a Problem in which all memory that must not be read is `poison`.

  That is: page tails, pages that no sequence names, the pages of sequences
  from `num_active` on, and query tokens that belong to no sequence.
  """
  rng = np.random.default_rng(seed)
  q_lens = [1] * len(kv_lens) if q_lens is None else q_lens
  num_active = len(kv_lens) if num_active is None else num_active
  pages_of = [-(-n // page_size) for n in kv_lens]
  num_pages = max(1, sum(pages_of) + spare_pages)
  width = max(1, *pages_of) + 1
  order = rng.permutation(num_pages)
  table = np.full((len(kv_lens), width), num_pages, np.int32)
  shape = (num_pages, num_kv_heads, page_size, head_dim)
  k_pages, v_pages = np.full(shape, poison), np.full(shape, poison)
  at = 0
  for seq, kv_len in enumerate(kv_lens):
    table[seq, : pages_of[seq]] = order[at : at + pages_of[seq]]
    at += pages_of[seq]
    if seq >= num_active:
      continue
    for position in range(kv_len):
      page, offset = table[seq, position // page_size], position % page_size
      k_pages[page, :, offset] = rng.standard_normal((num_kv_heads, head_dim))
      v_pages[page, :, offset] = rng.standard_normal((num_kv_heads, head_dim))
  cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
  num_tokens = int(cu_q_lens[-1]) + spare_tokens
  q = rng.standard_normal((num_tokens, num_q_heads, head_dim))
  q[cu_q_lens[num_active] :] = poison
  cast = lambda x: np.asarray(jnp.asarray(x, dtype))
  return Problem(
    q=cast(q),
    k_pages=cast(k_pages),
    v_pages=cast(v_pages),
    kv_lens=np.asarray(kv_lens, np.int32),
    page_indices=table,
    cu_q_lens=cu_q_lens,
    num_active=num_active,
  )


def quantise(problem, kv_dtype):
  """Returns a Problem of quantised pages, and their scales as options.

  A row that is not finite gets poison as all of its data: 127, or NaN.
  """
  pages, scales = {}, {}
  for name in ("k", "v"):
    rows = getattr(problem, f"{name}_pages").astype(np.float64)
    data, scale = quantise_rows(rows, kv_dtype)
    pages[f"{name}_pages"], scales[f"{name}_scales"] = data, scale
  return dataclasses.replace(problem, **pages), scales


def dequantise(problem, scales):
  """Returns a Problem of pages of data * scale, rounded to the dtype of q."""
  pages = {}
  for name in ("k", "v"):
    data = getattr(problem, f"{name}_pages").astype(np.float32)
    rows = data * scales[f"{name}_scales"][..., None]
    pages[f"{name}_pages"] = rows.astype(problem.q.dtype)
  return dataclasses.replace(problem, **pages)


def quantise_rows(rows, kv_dtype):
  """Returns data and f32 scales of float64 rows, in NumPy."""
  kv_dtype = jnp.dtype(kv_dtype)
  largest, poison = (127, 127) if kv_dtype == np.int8 else (448, np.nan)
  scales = (np.abs(rows).max(-1) / largest).astype(np.float32)
  usable = np.isfinite(scales) & (scales > 0)
  data = rows / np.where(usable, scales, 1).astype(np.float64)[..., None]
  if kv_dtype == np.int8:
    data = np.rint(data)
  data = np.clip(data, -largest, largest)
  data = np.where(np.isfinite(scales)[..., None], data, poison)
  return data.astype(kv_dtype), scales


def assert_same_bits(a, b):
  """Asserts that pairs of arrays have the same bits, NaN included."""
  for x, y in zip(a, b, strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def on_device(options):
  """Returns the same options, with their arrays as JAX arrays."""
  return {
    name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    for name, x in options.items()
  }


def relative_error(out, expected):
  """Returns ||out - expected|| / ||expected||, Inf if `out` is not finite."""
  out = np.asarray(out, np.float64)
  assert out.shape == expected.shape, (out.shape, expected.shape)
  if not np.isfinite(out).all():
    return np.inf
  norm = np.linalg.norm(expected)
  return np.linalg.norm(out - expected) / (norm if norm else 1.0)


def assert_matches(out, lse, expected, expected_lse, dtype):
  """Asserts that output and LSE match the oracle up to rounding."""
  tolerance = TOLERANCE[str(dtype)]
  assert relative_error(out, expected) < tolerance
  empty = np.isneginf(expected_lse)
  np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), empty)
  assert not np.asarray(out, np.float64)[empty].any()
  seen = ~empty
  # Logits are sums of unrounded products, so one tolerance fits all dtypes.
  np.testing.assert_allclose(
    np.asarray(lse)[seen], expected_lse[seen], rtol=0, atol=2e-5
  )
