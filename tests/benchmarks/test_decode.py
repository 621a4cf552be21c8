"""Tests of the benchmark of decode attention."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.decode import __main__ as bench_decode
from benchmarks.decode import parts, plot
from benchmarks.decode.sizes import FULL, SMALL, chats, same
from benchmarks.harness import attention, batches, cases

SIZES = SMALL
LENS = np.array([40, 17])


@pytest.mark.slow
def test_figures_of_every_kind_are_taken_and_failures_show(tmp_path):
  record = json.loads(json.dumps(list(bench_decode.records(SIZES))[-1]))
  assert not cases.failures(record, parts.RIVAL)
  assert record["rows_apart"]["traces"] == 1
  for name in ("ragged", "chats"):
    waste = record["page_sizes"][name]
    assert waste["8"]["waste_percent"] < waste["16"]["waste_percent"]
  (batch,) = record["batches"].values()
  assert "error" in batch[parts.RIVAL]  # it needs a GPU
  timed = dict(cases.walk(record))
  lines = bench_decode.table(record).splitlines()
  assert len(lines) == len(timed) + 1
  for path, side in timed.items():
    assert "us" in side or path[-1] == parts.RIVAL
  picture = plot.plot(record, tmp_path / "decode.svg")
  assert picture.read_text().startswith("<?xml")


def test_what_fails_is_named_and_the_others_are_timed():
  sizes = dataclasses.replace(
    SIZES, implementation="mosaic_gpu", page_sizes=(8,)
  )
  record = {"page_sizes": parts.page_sizes(sizes)}
  record["ceiling"] = parts.ceiling(sizes)
  failed = cases.failures(record, parts.RIVAL)
  assert failed == [
    f"page_sizes, {name}, 8" for name in ("same", "ragged", "chats")
  ]
  assert "NotImplementedError" in bench_decode.table(record)


def test_chats_waste_from_one_to_a_quarter_of_the_slots():
  lens = chats(FULL.chats)
  assert len(lens) == 256
  waste = [parts.waste_percent(lens, size) for size in (8, 16, 256)]
  assert waste == pytest.approx([0.86, 1.85, 24.16], abs=0.01)
  filled = same(FULL.same)
  assert parts.waste_percent(filled, 256) == 0
  assert parts.waste_percent(np.array([33, 7]), 40) == 50


def test_sequences_hold_the_same_in_pages_of_every_size():
  attend = attention.decode(SIZES)
  batch = batches.make(SIZES, LENS)
  expected = attention.reference(attend, batch)
  other = batches.make(SIZES, LENS, page_size=8)
  out = attention.reference(attend, other)
  assert attention.relative_error(expected, out) < 1e-2
  entries = np.asarray(other.tables)
  used = entries[entries < len(other.k_pages)]
  assert len(set(used.tolist())) == len(used) < len(other.k_pages)
  is_free = np.ones(len(other.k_pages), bool)
  is_free[used] = False
  for pages in (other.k_pages, other.v_pages):
    are_nan = np.isnan(np.asarray(pages, np.float32)).all((1, 2, 3))
    np.testing.assert_array_equal(are_nan, is_free)


def test_faults_are_found():
  attend = attention.decode(SIZES)
  batch = batches.make(SIZES, LENS)
  out = attention.reference(attend, batch)
  other = batch.tables[::-1]
  swapped = dataclasses.replace(batch, tables=other)
  for wrong in (
    out.at[1, 3].multiply(1.02),
    out.at[1, 3, 0].set(jnp.nan),
    attention.reference(attend, swapped),
  ):
    with pytest.raises(RuntimeError, match="the output is wrong"):
      attention.relative_error(out, wrong)


@pytest.mark.slow
def test_the_last_step_is_of_the_first_table():
  attend = attention.decode(SIZES)
  batch = batches.make(SIZES, LENS)
  expected = attention.reference(attend, batch)
  for loop_us in (10, 20):
    sizes = dataclasses.replace(SIZES, loop_us=loop_us)
    side, out = attention.timed(sizes, batch, attend, 57, check=None)
    assert side["steps"] == loop_us // 10
    attention.relative_error(expected, out)
