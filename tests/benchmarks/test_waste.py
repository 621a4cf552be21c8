"""The waste benchmark counts right, and its results are those of its data."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks.harness.data import requests
from benchmarks.waste import __main__ as bench_waste
from benchmarks.waste import count, replay

ROOT = pathlib.Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks/results/cpu/waste.json").read_text())
SIZES = [8, 16]


def _as_lists(figures):
  return {name: values.tolist() for name, values in figures.items()}


def _lens(*shape):
  # Around the ends of pages, and down to one token.
  return np.random.default_rng(1).integers(1, 34, shape).tolist()


def _parents(num_groups, num_steps):
  parents = np.random.default_rng(2).integers(0, 4, (num_groups, num_steps, 4))
  parents[:, 0] = 0
  return parents.tolist()


def test_a_request_grows_by_one_token_a_step():
  figures = count.batching([7, 9], [3, 1], num_rows=1, page_size=8)
  assert _as_lists(figures) == {
    "live_rows": [1, 1, 1, 1],
    "pages": [1, 1, 2, 2],  # 7, 8, 9 and 9 tokens
    "waste": [1, 0, 7, 7],
  }


def test_a_long_request_takes_two_buffers():
  figures = count.contiguous([8, 9], [1, 1], num_rows=2, buffer_len=8)
  assert _as_lists(figures) == {"slots": [24], "waste": [7]}


def test_samples_share_what_the_prompt_fills():
  figures = count.sampling([9], [[1, 2, 3]], num_groups=1, page_size=8)
  assert _as_lists(figures) == {
    "pages": [2, 3, 2],  # all shared; 1 shared and 2; 1 and 1
    "unshared_pages": [6, 4, 2],
  }


def test_beams_share_the_pages_of_a_common_past():
  # 15, 16 and 17 tokens: both beams write the page that the prompt leaves half
  # empty, and the winner's two full pages are then shared.
  parents = [[[0, 0], [0, 1], [1, 1]]]
  assert _as_lists(count.beams([14], parents, page_size=8)) == {
    "pages": [3, 3, 4],  # at last 2 shared, and 1 for each
    "unshared_pages": [4, 4, 6],
    "copied_tokens": [8, 0, 0],  # a full page is not written again
  }


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("page_size", SIZES)
def test_batching_uses_the_pages_counted(page_size):
  bench_waste.checked("batching", _lens(12), _lens(12), 4, page_size)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("page_size", SIZES)
def test_sampling_uses_the_pages_counted(page_size):
  bench_waste.checked("sampling", _lens(6), _lens(6, 3), 2, page_size)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", SIZES)
def test_beams_use_the_pages_counted(page_size):
  bench_waste.checked("beams", [5, 8, 16], _parents(3, 20), page_size)


def test_a_wrong_count_is_found(monkeypatch):
  right = count.batching

  def wrong(*args):
    figures = right(*args)
    figures["waste"][-1] += 1
    return figures

  monkeypatch.setattr(count, "batching", wrong)
  with pytest.raises(RuntimeError, match="waste"):
    bench_waste.checked("batching", [5], [4], 1, 8)


def test_a_pool_that_is_too_small_is_found():
  with pytest.raises(RuntimeError, match="refused"):
    replay.batching([5, 5], [5, 5], 2, 8, num_pages=2)


def test_committed_results_are_those_of_the_data(monkeypatch):
  count_only = lambda name, *args: getattr(count, name)(*args)
  monkeypatch.setattr(bench_waste, "checked", count_only)
  sizes, num_groups = (
    bench_waste.PAGE_SIZES,
    RESULT["settings"]["num_rows"] // 4,
  )
  chats, samples = requests(), bench_waste.samples()
  searches = bench_waste.searches()
  assert RESULT["settings"] == bench_waste.settings()
  assert RESULT["batching"] == bench_waste.batching(*chats, 256, sizes)
  assert RESULT["sampling"] == bench_waste.sampling(*samples, num_groups, sizes)
  assert RESULT["beams"] == bench_waste.beams(*searches, sizes)


def test_pages_of_16_tokens_waste_less_than_4_percent():
  assert RESULT["batching"]["page_sizes"]["16"]["waste_percent"] < 4


def test_recorded_parents_are_beams():
  prompt_lens, parents = bench_waste.searches()
  froms = np.array(parents)
  assert froms.shape == (len(prompt_lens), 96, 4)
  assert ((froms >= 0) & (froms < 4)).all()
  assert (froms[:, 0] == 0).all()  # the prompt is one beam
  assert min(prompt_lens) > 0


def test_lengths_are_positive():
  prompts, outputs = requests()
  assert len(prompts) == len(outputs) == 1000
  assert min(*prompts, *outputs) > 0
