"""Tests of the benchmark of writing K and V."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import cases
from benchmarks.kv_write import __main__ as bench_kv_write
from benchmarks.kv_write import batch as kv_write_batch
from benchmarks.kv_write import rival as kv_write_rival
from paged_jax.kv import pool as kv_pool

SIZES = kv_write_batch.SMALL


def _figures(sizes):
  *_, record = bench_kv_write.records(sizes)
  return json.loads(json.dumps(record))


def test_figures_of_every_kind_are_taken(capsys):
  record = _figures(SIZES)
  assert not cases.failures(record, bench_kv_write.RIVAL)
  for sides in record["write"].values():
    assert "error" in sides.pop(bench_kv_write.RIVAL)  # it needs a GPU
    assert len(sides) == 1 + 2 * len(SIZES.dtypes)
    assert all("percent_of_copy" in side for side in sides.values())
  num_sides = sum(1 + len(sides) for sides in record["write"].values())
  assert len(capsys.readouterr().out.splitlines()) == 1 + num_sides


def test_what_fails_is_named_and_the_others_are_timed(capsys):
  # Rows of 3 bytes, which the kernel takes on no device.
  some = dict(batches=((2, 3),), dtypes=("int8",), head_dim=3)
  sizes = dataclasses.replace(SIZES, implementation="mosaic_gpu", **some)
  record = _figures(sizes)
  assert cases.failures(record, bench_kv_write.RIVAL) == [
    "write, 6 tokens, int8, mosaic_gpu"
  ]
  assert "NotImplementedError" in capsys.readouterr().out


@pytest.mark.parametrize(("num_seqs", "num_new"), [(5, 1), (3, 29)])
def test_tokens_lie_at_distinct_slots_that_the_rival_sees_too(
  num_seqs, num_new
):
  batch = kv_write_batch.make(SIZES, num_seqs, num_new)
  page_size = SIZES.page_size
  assert len(set(batch.slots.tolist())) == num_seqs * num_new
  assert batch.slots.max() < batch.num_pages * page_size
  assert (batch.positions[::num_new] % page_size).any()
  seqs, positions, pages, ends, last = kv_write_rival._arguments(SIZES, batch)
  page = pages[ends[seqs] + positions // page_size]
  np.testing.assert_array_equal(
    page * page_size + positions % page_size, batch.slots
  )
  lens = (np.diff(ends) - 1) * page_size + last
  np.testing.assert_array_equal(lens, positions[num_new - 1 :: num_new] + 1)


@pytest.mark.parametrize("dtype", SIZES.dtypes)
def test_faults_are_found(dtype):
  batch = kv_write_batch.make(SIZES, 3, 5)
  shape = SIZES.num_kv_heads, SIZES.page_size, SIZES.head_dim
  pool = kv_pool.init(batch.num_pages, 2, *shape, jnp.dtype(dtype))
  write = lambda pool, layer: kv_pool.write(
    pool, layer, batch.k, batch.v, jnp.asarray(batch.slots)
  )
  once = write(pool, 0)
  with pytest.raises(RuntimeError, match="of k is wrong"):
    bench_kv_write.check(batch, once)
  right = write(once, 1)
  bench_kv_write.check(batch, right)
  spare = np.setdiff1d(np.arange(batch.num_pages), batch.tables)[0]
  wrong = dataclasses.replace(right, v=right.v.at[spare].set(1))
  with pytest.raises(RuntimeError, match="of v is wrong"):
    bench_kv_write.check(batch, wrong)
