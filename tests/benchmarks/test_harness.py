"""What a benchmark has measured is kept."""

import argparse
import json

import pytest

from benchmarks.harness import results

ENVIRONMENT = {"device": "some GPU"}


def test_each_figure_is_written_when_it_was_taken(tmp_path):
  path = tmp_path / "h200/some.json"

  def figures():
    record = {"cases": {}}
    for name in ("a", "b"):
      record["cases"][name] = 1
      yield record
      written = json.loads(path.read_text())
      assert written == {"environment": ENVIRONMENT} | record
    raise KeyboardInterrupt

  args = argparse.Namespace(small=False, out=tmp_path)
  with pytest.raises(KeyboardInterrupt):
    results.keep("some", figures(), args, ENVIRONMENT)
  assert json.loads(path.read_text())["cases"] == {"a": 1, "b": 1}
  assert list(path.parent.iterdir()) == [path]


def test_what_is_tried_out_is_not_written(tmp_path):
  args = argparse.Namespace(small=True, out=tmp_path)
  records = [{"cases": {}}, {"cases": {"a": 1}}]
  assert results.keep("some", records, args, ENVIRONMENT) == records[-1]
  assert not list(tmp_path.iterdir())
