"""Cascade attention by the kernels: compiled, interpreted, or lowered only."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import prefixes
import pytest

import paged_jax
from paged_jax import devices
from paged_jax.ops import cascade
from pallas_kernels.common import gpu
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.ragged import config as ragged_config
from pallas_kernels.ragged import kernel as ragged_kernel

pytestmark = pytest.mark.slow

DECODE_CONFIG = decode_config.Config(64, 2, num_programs=3)
RAGGED_CONFIG = ragged_config.Config(64, 2, num_programs=3, splits=True)


def _with_kernels(monkeypatch):
  """Makes the ops call the kernels: compiled on a GPU, else interpreted."""
  how = dict(interpret=cases.INTERPRET)

  def decode(q, kv, arrays, spec, implementation):
    del implementation
    return decode_kernel.paged_decode(
      q, kv.with_layer_axis(), arrays, spec=spec, config=DECODE_CONFIG, **how
    )

  def ragged(q, kv, *offsets_and_arrays, max_q_len):
    *args, spec, _ = offsets_and_arrays
    assert max_q_len is None
    return ragged_kernel.attend(
      q, kv.with_layer_axis(), *args, spec=spec, config=RAGGED_CONFIG, **how
    )

  monkeypatch.setattr(cascade, "attend_decode", decode)
  monkeypatch.setattr(cascade, "attend_ragged", ragged)


def test_kernels_match_oracle(monkeypatch):
  _with_kernels(monkeypatch)
  kv_lens = [80, 130, 0, 97, 64, 200, 161]
  problem = cases.make(
    kv_lens=kv_lens, page_size=prefixes.PAGE, dtype="bfloat16"
  )
  problem = prefixes.share(problem, {0: [1, 3]}, 5)
  problem = prefixes.share(problem, {5: [6]}, 10)
  options = dict(scale=0.125, logits_soft_cap=None)
  counts = jnp.array([5, 10], jnp.int32)
  prefixes.check(
    problem, counts, groups=[0, 4, 7], sinks=prefixes.SINKS, **options
  )


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("num_shared", "heads"), [(128, (32, 8)), (515, (8, 2)), (515, (2, 2))]
)
def test_kernels_match_oracle_for_real_sizes(num_shared, heads):
  own_lens = np.random.default_rng(0).integers(0, 300, 24).tolist()
  problem = prefixes.make(
    num_shared,
    own_lens,
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=128,
    dtype="bfloat16",
  )
  prefixes.check(problem, num_shared, implementation="mosaic_gpu")


def _lowered(monkeypatch, kv_dtype, **options):
  """Returns the program lowered for Hopper; no GPU is needed."""
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  pages = jax.ShapeDtypeStruct((99, 8, 16, 128), kv_dtype)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  q = jax.ShapeDtypeStruct((128, 32, 128), jnp.bfloat16)
  scales = {}
  if pages.dtype != q.dtype:
    shape = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)
    scales = dict(k_scales=shape, v_scales=shape)
  run = jax.jit(
    lambda *args, **scales: paged_jax.cascade_attention(
      *args, **scales, **options
    )
  )
  args = q, pages, pages, ints(128), ints(128, 40), ints()
  lowered = run.trace(*args, **scales).lower(lowering_platforms=("cuda",))
  return lowered.as_text()


def test_both_parts_take_the_kernels_on_hopper(monkeypatch):
  text = _lowered(monkeypatch, jnp.bfloat16, implementation="mosaic_gpu")
  for name in ("ragged_attention", "merge_ragged_partials", "paged_decode"):
    assert name in text


def test_quantised_pages_take_the_kernel_for_own_keys(monkeypatch):
  assert "paged_decode" in _lowered(monkeypatch, jnp.int8)


def test_one_prefix_is_split_over_all_multiprocessors():
  config = ragged_config.default_config(128, 8, 4, 128, device=gpu.Gpu("", 132))
  assert config.splits
  assert config.num_programs == 132
