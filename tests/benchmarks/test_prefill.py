"""Tests of the benchmark of prefill."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.harness import cases, queries
from benchmarks.prefill import __main__ as bench_prefill
from paged_jax.models.llama import Llama

SIZES = bench_prefill.SMALL


@pytest.fixture(autouse=True)
def usual_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.slow
def test_figures_of_every_kind_are_taken(capsys):
  *_, record = bench_prefill.records(SIZES)
  record = json.loads(json.dumps(record))
  assert not cases.failures(record)
  timed = [", ".join(path) for path, _ in cases.walk(record)]
  assert timed == [
    "ceiling",
    "mixed, loop",
    "mixed, chunks",
    "mixed, decodes",
    "mixed, mixed",
    "model, 32",
    "model, 96",
  ]
  assert len(capsys.readouterr().out.splitlines()) == len(timed)
  assert record["mixed"]["mixed"]["mixed_to_sum"] > 0
  for side in record["model"].values():
    assert side["relative_error"] < bench_prefill.MAX_ERROR_OF_LOGITS
    flops = side["tflop_per_s"] / side["tokens_per_s"]
    total = 1e12 * flops * SIZES.num_prompts * SIZES.prompt_len
    assert total == pytest.approx(bench_prefill.model_flops(SIZES))
    assert side["percent_of_ceiling"] > 0


def test_what_fails_is_named_and_the_others_are_timed():
  sizes = dataclasses.replace(SIZES, implementation="mosaic_gpu")
  record = {"mixed": bench_prefill.mixed(sizes)}
  failed = cases.failures(record)
  assert failed == ["mixed, chunks", "mixed, decodes", "mixed, mixed"]
  assert "NotImplementedError" in bench_prefill.table(record)


@pytest.mark.parametrize("sizes", [SIZES, bench_prefill.FULL])
def test_flops_are_those_of_the_parameters_and_of_the_keys_seen(sizes):
  config = sizes.config
  state = nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
  kernels = {
    path: np.prod(variable.shape)
    for path, variable in nnx.to_flat_state(state)
    if path[-1] == "kernel"
  }
  head = kernels.pop(("lm_head", "kernel"))
  count, length = sizes.num_prompts, sizes.prompt_len
  pairs = count * length * (length + 1) / 2
  attend = 4 * pairs * config.num_q_heads * config.head_dim
  expected = 2 * count * (length * sum(kernels.values()) + head)
  expected += config.num_layers * attend
  assert bench_prefill.model_flops(sizes) == pytest.approx(expected)


def test_both_kinds_are_those_of_the_mixture():
  batch = queries.make(bench_prefill.mixed_case(SIZES))
  chunks, decodes = bench_prefill.split(batch, 2)
  np.testing.assert_array_equal(chunks.kv_lens, [29, 7])
  np.testing.assert_array_equal(decodes.kv_lens, [33] * 3)
  np.testing.assert_array_equal(chunks.more[0], [0, 20, 27])
  assert chunks.more[1] == 2
  np.testing.assert_array_equal(
    jnp.concatenate([chunks.q, decodes.q]).astype(jnp.float32),
    batch.q.astype(jnp.float32),
  )
  np.testing.assert_array_equal(
    jnp.concatenate([chunks.tables, decodes.tables], axis=1), batch.tables
  )
