"""Tests of the benchmark of decode steps."""

import json
import sys

import jax
import pytest

from benchmarks.step import __main__ as bench_step


@pytest.mark.slow
def test_stream_and_loop_give_the_same_tokens(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["step", "--small"])
  with jax.numpy_dtype_promotion("standard"):
    bench_step.main()
    *_, record = bench_step.records(bench_step.SMALL)
  assert "tiny, B2" in capsys.readouterr().out
  (side,) = json.loads(json.dumps(record))["steps"].values()
  assert side["same_tokens"]
  assert len(side["us"]["stream"]) == bench_step.SMALL.turns
  assert side["stream_to_loop"] > 0
