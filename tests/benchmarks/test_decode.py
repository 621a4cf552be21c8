"""What the benchmark of decode attention times does what it says."""

import dataclasses
import json

import bench_decode
import decode_batches
import decode_loop
import decode_parts
import decode_plot
import jax.numpy as jnp
import numpy as np
import pytest

SIZES = decode_batches.SMALL
LENS = np.array([40, 17])


def test_figures_of_every_kind_are_taken_and_failures_show(tmp_path):
  record = json.loads(json.dumps(list(bench_decode.figures(SIZES))[-1]))
  assert not bench_decode.failures(record)
  assert record["rows_apart"]["traces"] == 1
  for name in ("ragged", "chats"):
    waste = record["page_sizes"][name]
    assert waste["8"]["waste_percent"] < waste["16"]["waste_percent"]
  (batch,) = record["batches"].values()
  assert "error" in batch[decode_parts.RIVAL]  # it needs a GPU
  timed = dict(bench_decode.cases(record))
  lines = bench_decode.table(record).splitlines()
  assert len(lines) == len(timed) + 1
  for path, side in timed.items():
    assert "us" in side or path[-1] == decode_parts.RIVAL
  picture = decode_plot.plot(record, tmp_path / "decode.svg")
  assert picture.read_text().startswith("<?xml")


def test_what_fails_is_named_and_the_others_are_timed():
  sizes = dataclasses.replace(
    SIZES, implementation="mosaic_gpu", page_sizes=(8,)
  )
  record = {"page_sizes": decode_parts.page_sizes(sizes)}
  record["ceiling"] = decode_parts.ceiling(sizes)
  failed = bench_decode.failures(record)
  assert failed == [
    f"page_sizes, {name}, 8" for name in ("same", "ragged", "chats")
  ]
  assert "NotImplementedError" in bench_decode.table(record)


def test_chats_waste_from_one_to_a_quarter_of_the_slots():
  lens = decode_batches.chats(decode_batches.FULL.chats)
  assert len(lens) == 256
  waste = [decode_parts.waste_percent(lens, size) for size in (8, 16, 256)]
  assert waste == pytest.approx([0.86, 1.85, 24.16], abs=0.01)
  filled = decode_batches.same(decode_batches.FULL.same)
  assert decode_parts.waste_percent(filled, 256) == 0
  assert decode_parts.waste_percent(np.array([33, 7]), 40) == 50


def test_sequences_hold_the_same_in_pages_of_every_size():
  attend = decode_loop.decode(SIZES)
  batch = decode_batches.make(SIZES, LENS)
  expected = decode_loop.reference(attend, batch)
  other = decode_batches.make(SIZES, LENS, page_size=8)
  out = decode_loop.reference(attend, other)
  assert decode_loop.relative_error(expected, out) < 1e-2
  entries = np.asarray(other.tables)
  used = entries[entries < len(other.k_pages)]
  assert len(set(used.tolist())) == len(used) < len(other.k_pages)
  is_free = np.ones(len(other.k_pages), bool)
  is_free[used] = False
  for pages in (other.k_pages, other.v_pages):
    are_nan = np.isnan(np.asarray(pages, np.float32)).all((1, 2, 3))
    np.testing.assert_array_equal(are_nan, is_free)


def test_faults_are_found():
  attend = decode_loop.decode(SIZES)
  batch = decode_batches.make(SIZES, LENS)
  out = decode_loop.reference(attend, batch)
  other = batch.tables[::-1]
  swapped = dataclasses.replace(batch, tables=other)
  for wrong in (
    out.at[1, 3].multiply(1.02),
    out.at[1, 3, 0].set(jnp.nan),
    decode_loop.reference(attend, swapped),
  ):
    with pytest.raises(RuntimeError, match="the output is wrong"):
      decode_loop.relative_error(out, wrong)


def test_the_last_step_is_of_the_first_table():
  attend = decode_loop.decode(SIZES)
  batch = decode_batches.make(SIZES, LENS)
  expected = decode_loop.reference(attend, batch)
  for loop_us in (10, 20):
    sizes = dataclasses.replace(SIZES, loop_us=loop_us)
    side, out = decode_loop.timed(sizes, batch, attend, 57, check=None)
    assert side["steps"] == loop_us // 10
    decode_loop.relative_error(expected, out)
