import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from paged_jax import PagedCache, devices, sampling
from paged_jax.generation import (
  CacheConfig,
  SamplingParams,
  loop,
  programs,
)
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.batch import Batch
from paged_jax.generation.rows import Plan, Status

LENS = [1, 7, 8, 9, 17, 30]
NUM_NEW = 20


class _Loop:
  """Calls the compiled loops on the tiny model, as an application would."""

  def __init__(
    self,
    lens,
    num_new,
    num_pages=64,
    rows=4,
    config=None,
    kv_dtype=None,
    chunk=32,
    implementation=None,
  ):
    dtype = "float32" if config is None else "bfloat16"
    self.model = tiny_llama.model(config or tiny_llama.CONFIG, dtype)
    self.lens = jnp.asarray(lens + [0] * (rows - len(lens)), jnp.int32)
    self.chunk = chunk
    cache_config = CacheConfig(
      num_pages=num_pages,
      page_size=8,
      num_seqs=rows,
      max_len=128,
      dtype=kv_dtype or dtype,
      implementation=implementation,
    )
    self.rows = rows_lib.init(
      PagedCache.init(self.model.layers, cache_config),
      sampling.stack([SamplingParams()] * rows),
      jnp.asarray(num_new + [1] * (rows - len(num_new)), jnp.int32),
      status=jnp.where(self.lens > 0, Status.RUNNING, Status.LENGTH),
      capacity=32,
    )
    flat = [token for prompt in tiny_llama.prompts_of(lens) for token in prompt]
    self.tokens = (
      jnp.zeros(64, jnp.int32).at[: len(flat)].set(jnp.asarray(flat, jnp.int32))
    )

  def prefilled(self):
    return jax.jit(loop.prefill, static_argnames="chunk")(
      self.model, self.rows, self.tokens, self.lens, chunk=self.chunk
    )

  def decoded(self, rows=None, num_steps=100):
    rows = self.prefilled() if rows is None else rows
    return loop.decode(self.model, rows, num_steps)


def _table(rows):
  return rows.cache.groups[0].table


def test_a_prompt_that_is_refused_on_the_device_never_samples():
  # The pool has 4 pages. The first prompt needs 2 and the second 3: the second
  # chunk of the second is refused, and no later chunk is stored in its place.
  run = _Loop([9, 23, 5], [3, 3, 3], num_pages=4, chunk=16)
  rows = run.prefilled()
  assert rows.status.tolist()[:3] == [
    Status.RUNNING,
    Status.OUT_OF_PAGES,
    Status.RUNNING,
  ]
  assert rows.num_new.tolist() == [1, 0, 1, 0]
  assert rows.cache.kv_lens.tolist() == [9, 0, 5, 0]
  rows = run.decoded(rows)
  for row, length in ((0, 9), (2, 5)):
    assert (
      rows.tokens[row, :3].tolist() == tiny_llama.greedy(length, NUM_NEW)[0][:3]
    )
  assert not rows.tokens[1].any()


def _kernels(implementation):
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64, num_layers=1)
  run = _Loop([9], [3], config=config, implementation=implementation)
  traced = (
    jax.jit(loop.prefill, static_argnames="chunk").trace(
      run.model, run.rows, run.tokens, run.lens, chunk=32
    ),
    jax.jit(loop.decode).trace(run.model, run.rows, 100),
  )
  texts = [
    program.lower(lowering_platforms=("cuda",)).as_text() for program in traced
  ]
  names = "ragged_attention", "paged_decode", "write_tokens", "copy_pages"
  return tuple({n for n in names if n in text} for text in texts)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(chunk=24), r"tokens.shape=\(64,\) must be a multiple of chunk=24"),
    (dict(chunk=0), r"chunk=0 must be in \[1, "),
    (dict(chunk=8.0), "chunk=8.0 must be a Python integer"),
    (dict(lens=[1, 2, 3]), r"prompt_lens must have shape \(4,\)"),
    (dict(lens=[60, 5, 0, 0]), r"prompt_lens=\[60, 5, 0, 0\] .* most 64 tok"),
    (dict(lens=[-3, 5, 0, 0]), r"prompt_lens=\[-3, 5, 0, 0\] must be at le"),
    (dict(lens=[1.0, 2.0, 0.0, 0.0]), "prompt_lens must be integers"),
  ],
)
def test_prompts_that_do_not_fit_are_named(changes, message):
  run = _Loop([9], [3])
  lens = jnp.asarray(changes.pop("lens", [9, 0, 0, 0]))
  args = dict(chunk=32) | changes
  with pytest.raises(ValueError, match=message):
    loop.prefill(run.model, run.rows, run.tokens, lens, **args)


def test_a_prefill_step_has_all_rows():
  run = _Loop([9], [3])
  plan = Plan(q_lens=jnp.ones(1, jnp.int32), slots=jnp.zeros(1, jnp.int32))
  with pytest.raises(ValueError, match=r"plan.slots must be None"):
    loop.prefill_step(run.model, run.rows, plan)


def test_chunks_of_the_host_are_those_of_the_loop():
  prompts = tuple((1,) * n for n in [5, 3, 40, 27, 64])
  lens = np.array([5, 0, 40, 27, 64, 0, 0, 0], np.int32)  # two rows do not run
  status = np.where(lens, Status.RUNNING, Status.OUT_OF_PAGES)
  batch = Batch(prompts, (SamplingParams(),) * 8, (1,) * 8, 128)
  plans = list(batch.chunks(status, 64))
  assert len(plans) == 3
  tokens = jnp.concatenate([plan.tokens for plan in plans])
  for i, plan in enumerate(plans):
    expected = loop.chunk_plan(tokens, jnp.cumsum(lens), jnp.int32(i), 64)
    chex.assert_trees_all_equal(plan, expected)


@pytest.mark.slow
def test_the_implementation_of_the_cache_is_that_of_every_op(monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    assert _kernels("xla") == (set(), set())
    both = {"write_tokens", "copy_pages"}
    for implementation in (None, "mosaic_gpu"):
      assert _kernels(implementation) == (
        both | {"ragged_attention"},
        both | {"paged_decode"},
      )


@pytest.mark.slow
def test_swapping_two_live_pages_changes_the_tokens():
  # The pages are of two sequences. Within one, keys keep the positions with
  # which they were written, and attention does not depend on their order.
  run = _Loop([30, 17], [NUM_NEW, NUM_NEW])
  rows = run.prefilled()
  right = run.decoded(rows)
  assert right.tokens[0, :NUM_NEW].tolist() == tiny_llama.greedy(30, NUM_NEW)[0]
  assert right.tokens[1, :NUM_NEW].tolist() == tiny_llama.greedy(17, NUM_NEW)[0]
  table = _table(rows)
  swapped = table.page_indices.at[:2, 0].set(table.page_indices[1::-1, 0])
  table = dataclasses.replace(table, page_indices=swapped)
  rows = dataclasses.replace(rows, cache=rows.cache.with_tables([table]))
  wrong = run.decoded(rows)
  assert wrong.tokens[0, :NUM_NEW].tolist() != tiny_llama.greedy(30, NUM_NEW)[0]
  assert wrong.tokens[1, :NUM_NEW].tolist() != tiny_llama.greedy(17, NUM_NEW)[0]


@pytest.mark.slow
def test_every_page_is_free_when_all_have_ended():
  table = _table(_Loop([30, 9, 1], [3, 20, 7]).decoded())
  assert int(table.num_free) == table.num_pages
  assert not np.asarray(table.ref_counts).any()
  assert not np.asarray(table.kv_lens).any()


@pytest.mark.slow
def test_the_decode_loop_is_traced_once_whatever_the_lengths():
  chex.clear_trace_counter()
  decode = jax.jit(chex.assert_max_traces(loop.decode, n=1))
  for lens, num_new in [([30, 9, 1], [3, 20, 7]), ([5], [32]), ([1] * 4, [2])]:
    run = _Loop(lens, num_new)
    rows = decode(run.model, run.prefilled(), 100)
    for row, length in enumerate(lens):
      n = num_new[row] if row < len(num_new) else 1
      got = rows.tokens[row, : int(rows.num_new[row])].tolist()
      assert got == tiny_llama.greedy(length, 32)[0][:n]


def _compiled_decode(run):
  """Returns the decode loop's program, and the pool that it carries."""
  decode = jax.jit(loop.decode, donate_argnames="rows")
  lowered = decode.lower(run.model, run.rows, 100)
  return lowered.compile(), run.rows.cache.groups[0].pool.k


def _compiled_step(run):
  """Returns the program of one decode step, and the pool that it carries."""
  structure, leaves = programs.flatten(run.model)
  lowered = programs.decode_step.lower(structure, leaves, run.rows)
  return lowered.compile(), run.rows.cache.groups[0].pool.k


def _assert_keeps_one_pool(compiled, pool):
  memory = compiled.memory_analysis()
  pool_bytes = 2 * pool.size * pool.dtype.itemsize
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 20
  for line in compiled.as_text().splitlines():
    if " copy(" in line or " copy-start(" in line:
      shape = line.split(" copy")[0].split("[")[1].split("]")[0]
      elements = np.prod([int(n) for n in shape.split(",") if n])
      assert elements < pool.size, line


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_the_decode_loop_keeps_one_pool_and_calls_no_host(kv_dtype):
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096, kv_dtype=kv_dtype)
  compiled, pool = _compiled_decode(run)
  _assert_keeps_one_pool(compiled, pool)
  hlo = compiled.as_text()
  assert "while" in hlo
  for word in ("callback", "outfeed", "infeed", "send("):
    assert word not in hlo


def test_a_dispatched_step_keeps_one_pool():
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096)
  compiled, pool = _compiled_step(run)
  _assert_keeps_one_pool(compiled, pool)
  # Rows reuse the memory of their inputs; all other outputs are on the host.
  rows, packed = compiled.output_shardings
  assert compiled.as_text().count("may-alias") == len(jax.tree.leaves(rows))
  assert packed.memory_kind == "pinned_host"


@pytest.mark.gpu
def test_a_dispatched_step_is_straight_line():
  # Needs the kernels: in plain JAX, attention is a loop whose length is data.
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64)
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096, config=config)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    hlo = _compiled_step(run)[0].as_text()
  for word in (" while(", " conditional("):
    assert word not in hlo


@pytest.mark.gpu
def test_the_decode_loop_calls_the_kernel_on_the_pool_in_place():
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64)
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=65536, config=config)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    compiled, pool = _compiled_decode(run)
  assert pool.dtype == jnp.bfloat16
  assert "mosaic_gpu" in compiled.as_text()
  _assert_keeps_one_pool(compiled, pool)


def _launches_of_integers(hlo):
  """Returns the launches of a program that output integers or flags only."""
  found = []
  for line in hlo.splitlines():
    launch = re.match(r"\s+(?:ROOT )?\S+ = (.+?) (fusion|custom-call)\(", line)
    if launch and not re.search(r"\b(s8|bf16|f16|f32)\[", launch[1]):
      found.append(line)
  return found


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_schedules_and_tables_are_made_once_for_all_layers(kv_dtype):
  launched = []
  for num_layers in (2, 8):
    config = dataclasses.replace(
      tiny_llama.CONFIG, head_dim=64, num_layers=num_layers
    )
    run = _Loop([30, 9, 1], [3, 20, 7], config=config, kv_dtype=kv_dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
      hlo = _compiled_step(run)[0].as_text()
    assert hlo.count('custom_call_target="mosaic_gpu') >= 2 * num_layers
    launched.append(_launches_of_integers(hlo))
  # XLA may fuse a few of them differently.
  assert 0 < len(launched[1]) <= len(launched[0]) + 2, launched[1]
