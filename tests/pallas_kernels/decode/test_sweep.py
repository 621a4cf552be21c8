"""The decode kernel on a Hopper GPU, with sampled combinations of options.

Each program is compiled once and runs eight batches of different lengths.
"""

import dataclasses

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import paged_jax
from pallas_kernels.common import limits
from pallas_kernels.decode import config as decode_config

pytestmark = pytest.mark.gpu

NUM_PROGRAMS, NUM_BATCHES, NUM_SEQS = 56, 8, 5
MOST = 700  # longest sequence
KV_DTYPES = None, None, "int8", "float8_e4m3fn"
GROUPS = (1, 2, 3, 4, 7, 8, 9, 16, 32, 64)


def _sample(seed):
  """Returns the shapes and the options of a program."""
  rng = np.random.default_rng(seed)
  pick = lambda *values: values[rng.integers(len(values))]
  while True:
    head_dim, group = pick(*limits.HEAD_DIMS), pick(*GROUPS)
    max_q_len = pick(1, 1, 1, 2, 4, 5, 8)
    shape = head_dim, 16, group, 1, "bfloat16"
    if decode_config.unsupported(*shape, max_q_len=max_q_len) is None:
      break
  num_kv_heads = pick(1, 2, 3)
  window = pick(None, None, 1, 37, 256)
  shapes = dict(
    num_q_heads=group * num_kv_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    page_size=pick(8, 16, 24, 32, 64, 128, 256),
    dtype=pick("bfloat16", "float16"),
  )
  options = dict(
    scale=pick(0.05, 0.125, 0.3),
    sliding_window=window,
    num_sink_tokens=0 if window is None else pick(0, 1, 5, 100),
    logits_soft_cap=pick(None, None, 2.0, 30.0),
    batch_invariant=pick(False, False, True),
  )
  more = dict(
    has_sinks=pick(False, True),
    kv_dtype=pick(*KV_DTYPES),
    has_alibi=pick(False, False, True),
  )
  return shapes, options, max_q_len, rng, more


def _problem(shapes, max_q_len, rng):
  """Returns a batch whose shapes do not depend on its lengths."""
  size = shapes["page_size"]
  edges = [0, 1, 63, 64, 65, size - 1, size, size + 1, MOST]
  drawn = [*rng.choice(edges, 3), *rng.integers(0, MOST, NUM_SEQS - 3)]
  kv_lens = [int(n) for n in rng.permutation(drawn)]
  q_lens = [min(int(rng.integers(0, max_q_len + 1)), n) for n in kv_lens]
  if max_q_len == 1:
    q_lens = [1] * NUM_SEQS
  pages = -(-MOST // size)
  used = sum(-(-n // size) for n in kv_lens)
  problem = cases.make(
    kv_lens=kv_lens,
    q_lens=q_lens,
    spare_pages=NUM_SEQS * pages + 1 - used,
    spare_tokens=max_q_len * NUM_SEQS - sum(q_lens),
    seed=int(rng.integers(2**31)),
    **shapes,
  )
  width = pages - problem.page_indices.shape[1] + 1
  if width > 0:
    nothing = len(problem.k_pages)
    problem.page_indices = np.pad(
      problem.page_indices, ((0, 0), (0, width)), constant_values=nothing
    )
  return problem


def _without_pages(problem, window, num_sink_tokens, max_q_len):
  """Unmaps the pages that no query sees."""
  size = problem.k_pages.shape[2]
  for row, kv_len in zip(problem.page_indices, problem.kv_lens, strict=True):
    first = max(int(kv_len) - (max_q_len - 1) - window, 0) // size
    row[-(-num_sink_tokens // size) : first] = len(problem.k_pages)


def _shuffled(problem, scales, rng):
  """Returns the same problem and scales with pages in another order."""
  num_pages = len(problem.k_pages)
  place = rng.permutation(num_pages)
  source = np.argsort(place)
  shuffled = dataclasses.replace(
    problem,
    k_pages=problem.k_pages[source],
    v_pages=problem.v_pages[source],
    page_indices=np.append(place, num_pages)[problem.page_indices].astype(
      np.int32
    ),
  )
  return shuffled, {name: x[source] for name, x in scales.items()}


@pytest.mark.parametrize("seed", range(NUM_PROGRAMS))
def test_sampled_options_match_oracle(seed):
  shapes, options, max_q_len, rng, sampled = _sample(seed)
  num_heads, arrays = shapes["num_q_heads"], {}
  if sampled["has_sinks"]:
    arrays["sinks"] = rng.normal(size=num_heads).astype(np.float32)
  if sampled["has_alibi"]:
    slopes = rng.uniform(-0.02, 0.5, num_heads)
    arrays["alibi_slopes"] = slopes.astype(np.float32)
  more = options | cases.on_device(arrays)
  more |= dict(return_lse=True, implementation="mosaic_gpu")

  def attend(args, scales):
    if max_q_len == 1:
      return paged_jax.paged_attention(*args[:5], **more, **scales)
    return paged_jax.ragged_paged_attention(
      *args, max_q_len=max_q_len, **more, **scales
    )

  compiled, judged = None, dict(options)
  del judged["batch_invariant"]
  for _ in range(NUM_BATCHES):
    problem, scales = _problem(shapes, max_q_len, rng), {}
    window = options["sliding_window"]
    if window is not None:
      _without_pages(problem, window, options["num_sink_tokens"], max_q_len)
    if sampled["kv_dtype"] is not None:
      problem, scales = cases.quantise(problem, sampled["kv_dtype"])
    on_device = {name: jnp.asarray(x) for name, x in scales.items()}
    if compiled is None:
      lowered = jax.jit(attend).lower(problem.args(), on_device)
      compiled = lowered.compile()
      assert "mosaic_gpu" in compiled.as_text()
    out, lse = compiled(problem.args(), on_device)
    expected = oracle.ragged_paged_attention(
      *dataclasses.astuple(problem), **arrays, **judged, **scales
    )
    cases.assert_matches(out, lse, *expected, shapes["dtype"])
    for again in ((problem, on_device), _shuffled(problem, on_device, rng)):
      cases.assert_same_bits(compiled(again[0].args(), again[1]), (out, lse))


def test_a_pool_of_more_than_2_to_the_31_elements():
  problem = cases.make(
    kv_lens=[700, 3], num_q_heads=4, num_kv_heads=1, dtype="bfloat16"
  )
  few, *page = problem.k_pages.shape
  first = 2**31 // int(np.prod(page)) + 5  # the pages move here

  @jax.jit
  def high(pages):
    pool = jnp.zeros((first + few, *page), pages.dtype)
    return jax.lax.dynamic_update_slice(pool, pages, (first, 0, 0, 0))

  q, k_pages, v_pages, kv_lens, page_indices = problem.decode_args()
  out, lse = paged_jax.paged_attention(
    q,
    high(k_pages),
    high(v_pages),
    kv_lens,
    page_indices + first,
    return_lse=True,
    implementation="mosaic_gpu",
  )
  expected = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], scale=64**-0.5
  )
  cases.assert_matches(out, lse, *expected, "bfloat16")


def test_a_loop_of_1000_steps_never_asks_the_host():
  problem = cases.make(
    kv_lens=[1500, 1100, 1001], num_kv_heads=1, dtype="bfloat16"
  )
  q, *pools, kv_lens, page_indices = problem.decode_args()

  @jax.jit
  def attend(lens):
    return paged_jax.paged_attention(
      q, *pools, lens, page_indices, implementation="mosaic_gpu"
    ).astype(jnp.float32)

  @jax.jit
  @chex.assert_max_traces(1)
  def loop(lens):
    step = lambda i, total: total + attend(lens + i)
    return jax.lax.fori_loop(0, 1000, step, jnp.zeros(q.shape, jnp.float32))

  start = kv_lens - 999
  compiled = loop.lower(start).compile()
  with jax.transfer_guard("disallow"):
    total = jax.block_until_ready(compiled(start))
  apart = sum(np.asarray(attend(kv_lens - i), np.float64) for i in range(1000))
  assert cases.relative_error(total, apart) < 1e-5
