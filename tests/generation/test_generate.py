import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_llama
from flax import nnx

from paged_jax.generation import (
  CacheConfig,
  SamplingParams,
  generate,
  join,
  programs,
  stream,
)
from paged_jax.models import llama

LENS = [1, 7, 8, 9, 17, 30]
NUM_NEW = 20


def _greedy(lens=LENS, num_new=NUM_NEW, with_logprobs=False, **config):
  return generate(
    tiny_llama.model(),
    tiny_llama.prompts_of(lens),
    SamplingParams(max_new_tokens=num_new),
    cache=CacheConfig(**config),
    with_logprobs=with_logprobs,
  )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
def test_greedy_tokens_match_oracle(page_size, prefill_chunk):
  result = _greedy(page_size=page_size, prefill_chunk=prefill_chunk)
  for length, completion in zip(LENS, result, strict=True):
    assert list(completion.token_ids) == tiny_llama.greedy(length, NUM_NEW)[0]
    assert completion.finish_reason == "length"
    assert completion.logprobs is None


@pytest.mark.slow
def test_a_sequence_is_the_same_alone():
  for length in (1, 9, 30):
    (alone,) = _greedy([length])
    assert list(alone.token_ids) == tiny_llama.greedy(length, NUM_NEW)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dtype", "most"), [("int8", 0.02), ("float8_e4m3fn", 0.1)]
)
def test_quantised_pages_hardly_change_probabilities(dtype, most):
  result = _greedy(num_new=2, with_logprobs=True, dtype=dtype, prefill_chunk=7)
  errors = [
    completion.logprobs[0] - tiny_llama.greedy(length, NUM_NEW)[1][0]
    for length, completion in zip(LENS, result, strict=True)
  ]
  assert 1e-5 < np.abs(errors).max() < most


@pytest.mark.slow
def test_untied_heads_are_used():
  config = dataclasses.replace(tiny_llama.CONFIG, tie_word_embeddings=False)
  (prompt,) = tiny_llama.prompts([5])
  (completion,) = generate(
    tiny_llama.model(config), [prompt], SamplingParams(max_new_tokens=6)
  )
  weights = tiny_llama.weights(config)
  expected, _ = oracle.llama_greedy(config, weights, prompt, 6)
  assert list(completion.token_ids) == expected


@pytest.mark.slow
def test_logprobs_match_oracle():
  result = _greedy(with_logprobs=True)
  for length, completion in zip(LENS, result, strict=True):
    np.testing.assert_allclose(
      completion.logprobs,
      tiny_llama.greedy(length, NUM_NEW)[1],
      rtol=0,
      atol=1e-4,
    )


@pytest.mark.slow
def test_stop_tokens_end_their_own_sequence_and_are_kept():
  tokens = tiny_llama.greedy(9, NUM_NEW)[0]
  stop = tokens[5]
  first = tokens.index(stop)
  result = generate(
    tiny_llama.model(),
    tiny_llama.prompts_of([9, 17]),
    [
      SamplingParams(max_new_tokens=NUM_NEW, stop_token_ids=(95, stop)),
      SamplingParams(max_new_tokens=NUM_NEW),
    ],
  )
  assert result[0].finish_reason == "stop"
  assert list(result[0].token_ids) == tokens[: first + 1]
  assert list(result[1].token_ids) == tiny_llama.greedy(17, NUM_NEW)[0]


@pytest.mark.slow
def test_each_sequence_has_its_own_number_of_new_tokens():
  numbers = [1, 2, 20, 9, 1, 13]
  params = [SamplingParams(max_new_tokens=n) for n in numbers]
  result = generate(tiny_llama.model(), tiny_llama.prompts_of(LENS), params)
  for length, n, completion in zip(LENS, numbers, result, strict=True):
    assert (
      list(completion.token_ids) == tiny_llama.greedy(length, NUM_NEW)[0][:n]
    )
    assert completion.finish_reason == "length"


@pytest.mark.slow
def test_a_sequence_ends_at_the_length_of_the_table():
  # The last of the 32 tokens is sampled, but never stored.
  result = _greedy([9, 30], max_len=32, page_size=8)
  assert [len(c.token_ids) for c in result] == [20, 3]
  assert list(result[1].token_ids) == tiny_llama.greedy(30, NUM_NEW)[0][:3]
  assert result[1].finish_reason == "length"


@pytest.mark.slow
def test_without_a_page_the_last_sequence_stops_and_the_others_go_on():
  # In the end each of the three needs 5 pages of 8 tokens, 15 in all, but the
  # pool has 2 * 5 + 2.
  result = _greedy([17, 17, 17], page_size=8, num_pages=12)
  assert [c.finish_reason for c in result] == [
    "length",
    "length",
    "out_of_pages",
  ]
  for completion in result[:2]:
    assert list(completion.token_ids) == tiny_llama.greedy(17, NUM_NEW)[0]
  # Its tokens so far are right: 17 + 15 tokens fill four pages.
  got = list(result[2].token_ids)
  assert got == tiny_llama.greedy(17, NUM_NEW)[0][: len(got)]
  assert 0 < len(got) < NUM_NEW


@pytest.mark.slow
def test_a_prompt_without_pages_stops_and_the_others_go_on():
  # 30 tokens need 4 pages of 8 tokens; the other prompts fit in the pool of 4.
  result = _greedy([30, 9, 1], page_size=8, num_pages=4, num_new=3)
  reasons = [c.finish_reason for c in result]
  assert reasons == ["length", "out_of_pages", "out_of_pages"]
  result = _greedy([9, 30, 1], page_size=8, num_pages=4, num_new=3)
  reasons = [c.finish_reason for c in result]
  assert reasons == ["length", "out_of_pages", "length"]
  assert result[1].token_ids == ()
  assert list(result[0].token_ids) == tiny_llama.greedy(9, NUM_NEW)[0][:3]
  assert list(result[2].token_ids) == tiny_llama.greedy(1, NUM_NEW)[0][:3]


def test_generate_hands_the_implementation_to_its_cache():
  with pytest.raises(NotImplementedError, match="'mosaic_gpu' is not avail"):
    _greedy([9], implementation="mosaic_gpu")
  with pytest.raises(ValueError, match="implementation='cuda'"):
    CacheConfig(implementation="cuda")


def test_stream_yields_what_generate_returns_step_by_step():
  whole = _greedy(with_logprobs=True)
  params = SamplingParams(max_new_tokens=NUM_NEW)
  items = list(
    stream(
      tiny_llama.model(),
      tiny_llama.prompts_of(LENS),
      params,
      with_logprobs=True,
    )
  )
  assert len(items) == NUM_NEW
  assert join(items) == whole
  for item in items:
    assert [len(completion.token_ids) for completion in item] == [1] * 6
    assert [len(completion.logprobs) for completion in item] == [1] * 6
  assert {c.finish_reason for item in items[:-1] for c in item} == {None}


@pytest.mark.slow
def test_stream_says_nothing_of_rows_that_have_ended():
  params = [SamplingParams(max_new_tokens=n) for n in (2, 5)]
  items = list(
    stream(tiny_llama.model(), tiny_llama.prompts_of([9, 17]), params)
  )
  lens = [[len(completion.token_ids) for completion in item] for item in items]
  assert lens == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 1]]
  assert [item[0].finish_reason for item in items] == [None] + ["length"] * 4


@pytest.mark.slow
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch():
  sampled = lambda lens, seeds: [
    c.token_ids
    for c in generate(
      tiny_llama.model(),
      tiny_llama.prompts_of(lens),
      [
        SamplingParams(max_new_tokens=12, temperature=1.0, top_k=20, seed=s)
        for s in seeds
      ],
    )
  ]
  together = sampled([9, 17, 9, 9], [1, 2, 1, 3])
  assert together[0] == together[2] != together[3]
  assert sampled([9], [1]) == [together[0]]


@pytest.mark.slow
def test_batches_of_a_bucket_share_their_programs():
  compiled = lambda: [
    f._cache_size() for f in (programs.prefill_step, programs.decode_step)
  ]
  before = compiled()
  for lens, num_new in [([1, 9, 30], 3), ([17, 8, 7, 1], 20), ([5, 5, 5], 60)]:
    _greedy(lens, num_new, page_size=24)  # a size that no other test has
    assert compiled() == [n + 1 for n in before]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    (["2024"], r"prompts\[0\]='2024'"),
    ([[1], [3.7]], r"prompts\[1\]=\[3.7\]"),
    ([1, 2], r"prompts\[0\]=1"),
    ([], "prompts is empty"),
    ([[1], []], r"prompts\[1\] is empty"),
    ([[1, 96]], r"prompts\[0\] has token 96"),
    ([[1], [-1]], r"prompts\[1\] has token -1"),
    ([[1] * 129], r"prompts\[0\] has 129 tokens; max_len=128"),
  ],
)
def test_wrong_prompts_are_named(prompts, message):
  with pytest.raises(ValueError, match=message):
    generate(tiny_llama.model(), prompts)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(page_size=12), "page_size=12"),
    (dict(num_pages=0), "num_pages=0"),
    (dict(max_len=-1), "max_len=-1"),
    (dict(prefill_chunk=0), "prefill_chunk=0"),
    (dict(dtype=jnp.int16), "dtype="),
  ],
)
def test_wrong_cache_sizes_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    CacheConfig(**changes)


class _Breaks(nnx.Module):
  """A model whose logits have a NaN wherever one token is the most likely."""

  def __init__(self, model, token):
    self.model, self.token = model, token

  layers = property(lambda self: self.model.layers)
  vocab_size = property(lambda self: self.model.vocab_size)
  max_len = property(lambda self: self.model.max_len)

  def __call__(self, tokens, cache, step):
    return self.model(tokens, cache, step)

  def logits(self, hidden):
    logits = self.model.logits(hidden)
    breaks = jnp.argmax(logits, -1, keepdims=True) == self.token
    column = jnp.arange(logits.shape[-1])
    return jnp.where(breaks & (column == 40)[None], jnp.nan, logits)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_a_nan_ends_its_row_and_no_other(temperature):
  lens = 9, 17
  expected = [tiny_llama.greedy(n, 8)[0] for n in lens]
  token = next(t for t in expected[0][1:] if t not in expected[1])
  kept = expected[0].index(token)
  completions = generate(
    _Breaks(tiny_llama.model(), token),
    tiny_llama.prompts_of(lens),
    SamplingParams(max_new_tokens=8, temperature=temperature),
    cache=CacheConfig(page_size=8),
    with_logprobs=True,
  )
  assert [c.finish_reason for c in completions] == ["error", "length"]
  assert completions[0].token_ids == tuple(expected[0][:kept])
  assert completions[1].token_ids == tuple(expected[1])
  assert np.isfinite(completions[0].logprobs).all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_arguments_of_another_type_are_named():
  model = tiny_llama.model()
  with pytest.raises(TypeError, match=r"params\[1\] must be SamplingParams"):
    generate(model, [[1], [2]], [SamplingParams(), None])
  with pytest.raises(TypeError, match="cache must be a CacheConfig, got dict"):
    generate(model, [[1]], cache={"page_size": 8})


def test_parameters_must_be_one_or_one_for_each_prompt():
  for params in ([SamplingParams()] * 3, []):
    with pytest.raises(ValueError, match=r"len\(params\)="):
      generate(tiny_llama.model(), [[1], [2]], params)


def test_a_length_beyond_the_models_is_refused():
  with pytest.raises(ValueError, match="max_len=129"):
    generate(tiny_llama.model(), [[1]], cache=CacheConfig(max_len=129))


def test_a_pool_that_does_not_fit_in_memory_is_refused(monkeypatch):
  monkeypatch.setattr("paged_jax.devices.free_bytes", lambda device: 100)
  with pytest.raises(MemoryError, match="page_bytes=8192"):
    generate(tiny_llama.model(), [[1]])
  with pytest.raises(MemoryError, match="num_pages=5 take 40960 bytes"):
    generate(tiny_llama.model(), [[1]], cache=CacheConfig(num_pages=5))


def test_batch_invariance_reaches_every_layer():
  model = llama.from_weights(
    tiny_llama.CONFIG, tiny_llama.weights(), batch_invariant=True
  )
  assert all(block.attention.batch_invariant for block in model.blocks)
