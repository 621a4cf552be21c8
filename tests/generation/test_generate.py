import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_llama

from paged_jax import PagedCache, devices, sampling
from paged_jax.generation import (
  CacheConfig,
  SamplingParams,
  generate,
  join,
  loop,
  programs,
  stream,
)
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.rows import Status
from paged_jax.models import llama

LENS = [1, 7, 8, 9, 17, 30]
NUM_NEW = 20


@functools.cache
def _expected(length, num_new=NUM_NEW):
  (prompt,) = tiny_llama.prompts([length], seed=length)
  weights = tiny_llama.weights()
  return oracle.llama_greedy(tiny_llama.CONFIG, weights, prompt, num_new)


def _prompts(lens=LENS):
  return [tiny_llama.prompts([n], seed=n)[0] for n in lens]


def _greedy(lens=LENS, num_new=NUM_NEW, with_logprobs=False, **config):
  return generate(
    tiny_llama.model(),
    _prompts(lens),
    SamplingParams(max_new_tokens=num_new),
    cache=CacheConfig(**config),
    with_logprobs=with_logprobs,
  )


@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
def test_greedy_tokens_are_the_oracles(page_size, prefill_chunk):
  result = _greedy(page_size=page_size, prefill_chunk=prefill_chunk)
  for length, completion in zip(LENS, result, strict=True):
    assert list(completion.token_ids) == _expected(length)[0]
    assert completion.finish_reason == "length"
    assert completion.logprobs is None


def test_a_sequence_is_the_same_alone():
  for length in (1, 9, 30):
    (alone,) = _greedy([length])
    assert list(alone.token_ids) == _expected(length)[0]


@pytest.mark.parametrize(
  ("dtype", "most"), [("int8", 0.02), ("float8_e4m3fn", 0.1)]
)
def test_quantised_pages_hardly_change_probabilities(dtype, most):
  result = _greedy(num_new=2, with_logprobs=True, dtype=dtype, prefill_chunk=7)
  errors = [
    completion.logprobs[0] - _expected(length)[1][0]
    for length, completion in zip(LENS, result, strict=True)
  ]
  assert 1e-5 < np.abs(errors).max() < most


def test_untied_heads_are_used():
  config = dataclasses.replace(tiny_llama.CONFIG, tie_word_embeddings=False)
  (prompt,) = tiny_llama.prompts([5])
  (completion,) = generate(
    tiny_llama.model(config), [prompt], SamplingParams(max_new_tokens=6)
  )
  weights = tiny_llama.weights(config)
  expected, _ = oracle.llama_greedy(config, weights, prompt, 6)
  assert list(completion.token_ids) == expected


def test_logprobs_are_the_oracles():
  result = _greedy(with_logprobs=True)
  for length, completion in zip(LENS, result, strict=True):
    np.testing.assert_allclose(
      completion.logprobs, _expected(length)[1], rtol=0, atol=1e-4
    )


def test_stop_tokens_end_their_own_sequence_and_are_kept():
  tokens = _expected(9)[0]
  stop = tokens[5]
  first = tokens.index(stop)
  result = generate(
    tiny_llama.model(),
    _prompts([9, 17]),
    [
      SamplingParams(max_new_tokens=NUM_NEW, stop_token_ids=(95, stop)),
      SamplingParams(max_new_tokens=NUM_NEW),
    ],
  )
  assert result[0].finish_reason == "stop"
  assert list(result[0].token_ids) == tokens[: first + 1]
  assert list(result[1].token_ids) == _expected(17)[0]


def test_each_sequence_has_its_own_number_of_new_tokens():
  numbers = [1, 2, 20, 9, 1, 13]
  params = [SamplingParams(max_new_tokens=n) for n in numbers]
  result = generate(tiny_llama.model(), _prompts(), params)
  for length, n, completion in zip(LENS, numbers, result, strict=True):
    assert list(completion.token_ids) == _expected(length)[0][:n]
    assert completion.finish_reason == "length"


def test_a_sequence_ends_at_the_length_of_the_table():
  # Of 32 tokens the last is sampled, but never stored.
  result = _greedy([9, 30], max_len=32, page_size=8)
  assert [len(c.token_ids) for c in result] == [20, 3]
  assert list(result[1].token_ids) == _expected(30)[0][:3]
  assert result[1].finish_reason == "length"


def test_without_a_page_the_last_sequence_stops_and_the_others_go_on():
  # Each needs 5 pages of 8 in the end; 2 * 5 + 2 of 15 are there.
  result = _greedy([17, 17, 17], page_size=8, num_pages=12)
  assert [c.finish_reason for c in result] == [
    "length",
    "length",
    "out_of_pages",
  ]
  for completion in result[:2]:
    assert list(completion.token_ids) == _expected(17)[0]
  # What it had is right all the same: 17 + 15 tokens fill four pages.
  got = list(result[2].token_ids)
  assert got == _expected(17)[0][: len(got)]
  assert 0 < len(got) < NUM_NEW


def test_a_prompt_without_pages_stops_and_the_others_go_on():
  # 30 tokens need 4 pages of 8; the others fit in the 4 that there are.
  result = _greedy([30, 9, 1], page_size=8, num_pages=4, num_new=3)
  reasons = [c.finish_reason for c in result]
  assert reasons == ["length", "out_of_pages", "out_of_pages"]
  result = _greedy([9, 30, 1], page_size=8, num_pages=4, num_new=3)
  reasons = [c.finish_reason for c in result]
  assert reasons == ["length", "out_of_pages", "length"]
  assert result[1].token_ids == ()
  assert list(result[0].token_ids) == _expected(9)[0][:3]
  assert list(result[2].token_ids) == _expected(1)[0][:3]


def test_a_prompt_that_is_refused_on_the_device_never_samples():
  # Of 4 pages, the first prompt needs 2 and the second 3: its second chunk is
  # refused, and no later chunk is stored in its place.
  run = _Loop([9, 23, 5], [3, 3, 3], num_pages=4, chunk=16)
  rows = run.prefilled()
  assert rows.status.tolist()[:3] == [
    Status.RUNNING,
    Status.OUT_OF_PAGES,
    Status.RUNNING,
  ]
  assert rows.num_new.tolist() == [1, 0, 1, 0]
  assert rows.cache.kv_lens.tolist() == [9, 0, 5, 0]
  rows = run.decoded(rows)
  for row, length in ((0, 9), (2, 5)):
    assert rows.tokens[row, :3].tolist() == _expected(length)[0][:3]
  assert not rows.tokens[1].any()


def _kernels(implementation):
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64)
  run = _Loop([9], [3], config=config, implementation=implementation)
  traced = (
    jax.jit(loop.prefill, static_argnames="chunk").trace(
      run.model, run.rows, run.tokens, run.lens, chunk=32
    ),
    jax.jit(loop.decode).trace(run.model, run.rows, 100),
  )
  texts = [
    program.lower(lowering_platforms=("cuda",)).as_text() for program in traced
  ]
  names = "ragged_attention", "paged_decode", "write_tokens", "copy_pages"
  return tuple({n for n in names if n in text} for text in texts)


def test_the_implementation_of_the_cache_is_that_of_every_op(monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    assert _kernels("xla") == (set(), set())
    both = {"write_tokens", "copy_pages"}
    for implementation in (None, "mosaic_gpu"):
      assert _kernels(implementation) == (
        both | {"ragged_attention"},
        both | {"paged_decode"},
      )


def test_generate_hands_the_implementation_to_its_cache():
  with pytest.raises(NotImplementedError, match="'mosaic_gpu' is not avail"):
    _greedy([9], implementation="mosaic_gpu")
  with pytest.raises(ValueError, match="implementation='cuda'"):
    CacheConfig(implementation="cuda")


def test_stream_yields_what_generate_returns_step_by_step():
  whole = _greedy(with_logprobs=True)
  params = SamplingParams(max_new_tokens=NUM_NEW)
  items = list(
    stream(tiny_llama.model(), _prompts(), params, with_logprobs=True)
  )
  assert len(items) == NUM_NEW
  assert join(items) == whole
  for item in items:
    assert [len(completion.token_ids) for completion in item] == [1] * 6
    assert [len(completion.logprobs) for completion in item] == [1] * 6
  assert {c.finish_reason for item in items[:-1] for c in item} == {None}


def test_stream_says_nothing_of_rows_that_have_ended():
  params = [SamplingParams(max_new_tokens=n) for n in (2, 5)]
  items = list(stream(tiny_llama.model(), _prompts([9, 17]), params))
  lens = [[len(completion.token_ids) for completion in item] for item in items]
  assert lens == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 1]]
  assert [item[0].finish_reason for item in items] == [None] + ["length"] * 4


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch():
  sampled = lambda lens, seeds: [
    c.token_ids
    for c in generate(
      tiny_llama.model(),
      _prompts(lens),
      [
        SamplingParams(max_new_tokens=12, temperature=1.0, top_k=20, seed=s)
        for s in seeds
      ],
    )
  ]
  together = sampled([9, 17, 9, 9], [1, 2, 1, 3])
  assert together[0] == together[2] != together[3]
  assert sampled([9], [1]) == [together[0]]


class _Loop:
  """The compiled loops on the tiny model, as a caller that embeds them."""

  def __init__(
    self,
    lens,
    num_new,
    num_pages=64,
    rows=4,
    config=None,
    kv_dtype=None,
    chunk=32,
    implementation=None,
  ):
    dtype = "float32" if config is None else "bfloat16"
    self.model = tiny_llama.model(config or tiny_llama.CONFIG, dtype)
    self.lens = jnp.asarray(lens + [0] * (rows - len(lens)), jnp.int32)
    self.chunk = chunk
    cache_config = CacheConfig(
      num_pages=num_pages,
      page_size=8,
      num_seqs=rows,
      max_len=128,
      dtype=kv_dtype or dtype,
      implementation=implementation,
    )
    self.rows = rows_lib.init(
      PagedCache.init(self.model.layers, cache_config),
      sampling.stack([SamplingParams()] * rows),
      jnp.asarray(num_new + [1] * (rows - len(num_new)), jnp.int32),
      status=jnp.where(self.lens > 0, Status.RUNNING, Status.LENGTH),
      capacity=32,
    )
    flat = [token for prompt in _prompts(lens) for token in prompt]
    self.tokens = (
      jnp.zeros(64, jnp.int32).at[: len(flat)].set(jnp.asarray(flat, jnp.int32))
    )

  def prefilled(self):
    return jax.jit(loop.prefill, static_argnames="chunk")(
      self.model, self.rows, self.tokens, self.lens, chunk=self.chunk
    )

  def decoded(self, rows=None, num_steps=100):
    rows = self.prefilled() if rows is None else rows
    return loop.decode(self.model, rows, num_steps)


def _table(rows):
  return rows.cache.groups[0].table


def test_swapping_two_live_pages_changes_the_tokens():
  # Of two sequences: within one, keys keep the position they were written
  # with, and attention does not mind their order.
  run = _Loop([30, 17], [NUM_NEW, NUM_NEW])
  rows = run.prefilled()
  right = run.decoded(rows)
  assert right.tokens[0, :NUM_NEW].tolist() == _expected(30)[0]
  assert right.tokens[1, :NUM_NEW].tolist() == _expected(17)[0]
  table = _table(rows)
  swapped = table.page_indices.at[:2, 0].set(table.page_indices[1::-1, 0])
  table = dataclasses.replace(table, page_indices=swapped)
  rows = dataclasses.replace(rows, cache=rows.cache.with_tables([table]))
  wrong = run.decoded(rows)
  assert wrong.tokens[0, :NUM_NEW].tolist() != _expected(30)[0]
  assert wrong.tokens[1, :NUM_NEW].tolist() != _expected(17)[0]


def test_every_page_is_free_when_all_have_ended():
  table = _table(_Loop([30, 9, 1], [3, 20, 7]).decoded())
  assert int(table.num_free) == table.num_pages
  assert not np.asarray(table.ref_counts).any()
  assert not np.asarray(table.kv_lens).any()


def test_batches_of_a_bucket_share_their_programs():
  compiled = lambda: [
    f._cache_size() for f in (programs.prefill_step, programs.decode_step)
  ]
  before = compiled()
  for lens, num_new in [([1, 9, 30], 3), ([17, 8, 7, 1], 20), ([5, 5, 5], 60)]:
    _greedy(lens, num_new, page_size=24)  # a size that no other test has
    assert compiled() == [n + 1 for n in before]


def test_the_decode_loop_is_traced_once_whatever_the_lengths():
  chex.clear_trace_counter()
  decode = jax.jit(chex.assert_max_traces(loop.decode, n=1))
  for lens, num_new in [([30, 9, 1], [3, 20, 7]), ([5], [32]), ([1] * 4, [2])]:
    run = _Loop(lens, num_new)
    rows = decode(run.model, run.prefilled(), 100)
    for row, length in enumerate(lens):
      n = num_new[row] if row < len(num_new) else 1
      got = rows.tokens[row, : int(rows.num_new[row])].tolist()
      assert got == _expected(length, 32)[0][:n]


def _compiled_decode(run):
  """The decode loop's program, and the pool that it carries."""
  decode = jax.jit(loop.decode, donate_argnames="rows")
  lowered = decode.lower(run.model, run.rows, 100)
  return lowered.compile(), run.rows.cache.groups[0].pool.k


def _compiled_step(run):
  """The program of one decode step, and the pool that it carries."""
  structure, leaves = programs.flatten(run.model)
  lowered = programs.decode_step.lower(structure, leaves, run.rows)
  return lowered.compile(), run.rows.cache.groups[0].pool.k


def _assert_keeps_one_pool(compiled, pool):
  memory = compiled.memory_analysis()
  pool_bytes = 2 * pool.size * pool.dtype.itemsize
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes / 20
  for line in compiled.as_text().splitlines():
    if " copy(" in line or " copy-start(" in line:
      shape = line.split(" copy")[0].split("[")[1].split("]")[0]
      elements = np.prod([int(n) for n in shape.split(",") if n])
      assert elements < pool.size, line


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_the_decode_loop_keeps_one_pool_and_calls_no_host(kv_dtype):
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096, kv_dtype=kv_dtype)
  compiled, pool = _compiled_decode(run)
  _assert_keeps_one_pool(compiled, pool)
  hlo = compiled.as_text()
  assert "while" in hlo
  for word in ("callback", "outfeed", "infeed", "send("):
    assert word not in hlo


def test_a_dispatched_step_keeps_one_pool():
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096)
  compiled, pool = _compiled_step(run)
  _assert_keeps_one_pool(compiled, pool)


@pytest.mark.gpu
def test_a_dispatched_step_is_straight_line():
  # In plain JAX, attention is a loop over tiles whose end is data.
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64)
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=4096, config=config)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    hlo = _compiled_step(run)[0].as_text()
  for word in (" while(", " conditional("):
    assert word not in hlo


@pytest.mark.gpu
def test_the_decode_loop_calls_the_kernel_on_the_pool_in_place():
  config = dataclasses.replace(tiny_llama.CONFIG, head_dim=64)
  run = _Loop([30, 9, 1], [3, 20, 7], num_pages=65536, config=config)
  with jax.numpy_dtype_promotion("standard"):  # Flax promotes in its norms
    compiled, pool = _compiled_decode(run)
  assert pool.dtype == jnp.bfloat16
  assert "mosaic_gpu" in compiled.as_text()
  _assert_keeps_one_pool(compiled, pool)


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
