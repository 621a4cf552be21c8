"""The benchmark of quantised pages scores right, and its results hold."""

import json
import pathlib

import jax
import numpy as np
import oracle
import pytest
import tiny_llama

from benchmarks.quantised import __main__ as bench_quantised

ROOT = pathlib.Path(__file__).parents[2]
RESULT = json.loads(
  (ROOT / "benchmarks/results/cpu/quantised.json").read_text()
)


@pytest.fixture(autouse=True)
def usual_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


def _losses(dtype, chunk=16):
  (tokens,) = tiny_llama.prompts([50])
  return bench_quantised.token_losses(tiny_llama.model(), tokens, dtype, chunk)


@pytest.mark.slow
def test_losses_are_those_of_the_next_tokens():
  (tokens,) = tiny_llama.prompts([50])
  weights = tiny_llama.weights()
  logits = oracle.llama_logits(tiny_llama.CONFIG, weights, tokens[:-1])
  logits -= logits.max(-1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -log_probs[np.arange(49), tokens[1:]]
  np.testing.assert_allclose(_losses("float32"), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_chunks_do_not_matter_but_pages_do():
  exact = _losses("float32")
  np.testing.assert_allclose(_losses("float32", 7), exact, rtol=0, atol=1e-4)
  for dtype, least, most in (
    ("bfloat16", 1e-4, 0.02),
    ("int8", 1e-4, 0.02),
    ("float8_e4m3fn", 1e-3, 0.1),
  ):
    change = np.abs(_losses(dtype) - exact).mean()
    assert least < change < most, dtype


def test_figures_are_those_of_the_losses():
  losses = dict(float32=[1.0, 3.0], bfloat16=[2.0, 2.0], int8=[2.0, 2.2])
  losses = {dtype: np.array(values) for dtype, values in losses.items()}
  figures = bench_quantised.figures(tiny_llama.CONFIG, losses)
  int8 = figures["int8"]
  assert int8["perplexity"] == pytest.approx(np.exp(2.1))
  assert int8["percent_above_bfloat16"] == pytest.approx(10.517, abs=1e-3)
  assert figures["float32"]["mean_change_of_loss"] == 1.0
  # 2 layers of 2 heads of 16 numbers, of K and of V.
  bytes_per_token = {name: x["bytes_per_token"] for name, x in figures.items()}
  assert bytes_per_token == dict(float32=512, bfloat16=256, int8=160)


def test_committed_results_are_of_this_text_and_reach_the_goals():
  model = RESULT["settings"]["model"]
  assert RESULT["settings"] == bench_quantised.settings(model)
  assert len(bench_quantised.text()) > 4 * bench_quantised.NUM_TOKENS
  assert list(RESULT["pages"]) == list(bench_quantised.DTYPES)
  for dtype, goal in bench_quantised.GOALS.items():
    assert abs(RESULT["pages"][dtype]["percent_above_bfloat16"]) < goal
