"""Tests of the benchmark of shared prefixes."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.cascade import __main__ as bench_cascade
from benchmarks.cascade.__main__ import Case
from benchmarks.harness import batches, cases

CASE = bench_cascade.SMALL_CASES["small"]


@pytest.mark.slow
def test_figures_of_every_side_are_taken_and_failures_show(capsys):
  records = bench_cascade.records({"small": CASE}, small=True)
  (record,) = json.loads(json.dumps(list(records)))
  sides = record["cases"]["small"]
  assert sides["speedup"] > 0
  for name in ("cascade", "paged"):
    assert sides["sides"][name]["relative_error"] < 1e-2
  assert "error" in sides["sides"][bench_cascade.RIVAL]  # it needs a GPU
  assert not cases.failures(record["cases"], bench_cascade.RIVAL)
  assert len(capsys.readouterr().out.splitlines()) == 7
  sides["sides"]["paged"] = {"error": "none"}
  record["cases"]["other"] = {"error": "none"}
  assert cases.failures(record["cases"], bench_cascade.RIVAL) == [
    "small, sides, paged",
    "other",
  ]


def test_rows_of_a_group_share_their_prefix_and_nothing_else():
  sizes = dataclasses.replace(batches.SMALL, page_size=16)
  batch = bench_cascade.make(sizes, CASE)
  tables = np.asarray(batch.tables)
  num_shared, groups = (np.asarray(x) for x in batch.more)
  assert num_shared == 4
  assert groups.tolist() == [0, 3, 6]
  assert batch.kv_lens.tolist() == [84] * 6
  for table in tables:
    for group in (table[:3], table[3:]):
      assert (group[:, :4] == group[:1, :4]).all()
    own = table[:, 4:]
    assert len(np.unique(own)) == own.size == 12
    assert len(np.unique(table)) == 12 + 2 * 4
  assert not np.intersect1d(tables[0], tables[1]).size


def test_the_roof_counts_keys_once_and_the_products_of_the_shared_part():
  case = Case(128, 32768, 256)
  least = bench_cascade.at_least_us(batches.FULL, case)
  # 68.7 GFLOP at 687 TFLOP/s; 134 MB, and 17.3 GB, at 4.6 TB/s.
  assert least["shared part"] == pytest.approx(100.0, abs=0.1)
  assert least["own part"] == pytest.approx(29.2, abs=0.1)
  assert least["paged"] == pytest.approx(3764, abs=1)
  few = dataclasses.replace(case, num_seqs=8)
  least = bench_cascade.at_least_us(batches.FULL, few)
  assert least["shared part"] == pytest.approx(29.2, abs=0.1)
