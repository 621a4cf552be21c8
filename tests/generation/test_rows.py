"""One step of the loops, with a plan that names its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_llama

from paged_jax import CacheConfig, PagedCache, sampling
from paged_jax.generation import SamplingParams, loop, programs
from paged_jax.generation import rows as rows_lib
from paged_jax.generation.rows import Plan, Status

NUM_SEQS, NUM_ENTRIES, NUM_TOKENS, NUM_PAGES = 4, 3, 12, 6
NOBODY = NUM_SEQS
# Row 1 samples; the others take the most likely token. The options of row 1
# must not reach the others.
LENS = {0: 9, 1: 7, 2: 17, 3: 5}
TEMPERATURE, SEED = 100.0, 3
CONFIG = CacheConfig(
  num_pages=NUM_PAGES,
  page_size=8,
  num_seqs=NUM_SEQS,
  max_len=40,
  dtype=jnp.float32,
)


@functools.cache
def _prompt(row):
  return tiny_llama.prompts([LENS[row]], seed=row)[0]


@functools.cache
def _expected(row, num_new=8):
  """Returns the oracle's greedy tokens of a row, and their logprobs."""
  weights = tiny_llama.weights()
  return oracle.llama_greedy(tiny_llama.CONFIG, weights, _prompt(row), num_new)


@functools.partial(jax.jit, static_argnames="structure")
def _jitted(structure, leaves, rows, plan):
  return loop.step(structure.model(leaves), rows, plan)


def _plan(*entries):
  """Returns a plan from entries (row, tokens, whether to sample)."""
  entries += ((NOBODY, [], False),) * (NUM_ENTRIES - len(entries))
  slots, tokens, samples = zip(*entries, strict=True)
  flat = [token for each in tokens for token in each]
  return Plan(
    q_lens=jnp.array([len(each) for each in tokens], jnp.int32),
    slots=jnp.array(slots, jnp.int32),
    tokens=jnp.array(flat + [0] * (NUM_TOKENS - len(flat)), jnp.int32),
    samples=jnp.array(samples),
  )


def _decode(row):
  return row, [-1], True


def _decode_plan(*rows):
  rows += (NOBODY,) * (NUM_ENTRIES - len(rows))
  return Plan(
    q_lens=jnp.ones(NUM_ENTRIES, jnp.int32),
    slots=jnp.array(rows, jnp.int32),
    max_q_len=1,
  )


def _rows(max_new=8, stop=(), with_logprobs=True, capacity=8):
  """Returns empty rows; `stop` are the stop tokens of row 3."""
  params = [SamplingParams()] * NUM_SEQS
  params[1] = SamplingParams(temperature=TEMPERATURE, seed=SEED)
  params[3] = SamplingParams(stop_token_ids=stop)
  return rows_lib.init(
    PagedCache.init(tiny_llama.model().layers, CONFIG),
    sampling.stack(params),
    jnp.full(NUM_SEQS, max_new, jnp.int32),
    capacity=capacity,
    with_logprobs=with_logprobs,
  )


class _Run:
  """Continues rows step by step."""

  def __init__(self, **options):
    self.rows = _rows(**options)
    self.model = programs.flatten(tiny_llama.model())

  def step(self, plan):
    """Runs a step and returns its result, with lists in place of arrays."""
    self.rows, result = _jitted(*self.model, self.rows, plan)
    return jax.tree.map(lambda x: np.asarray(x).tolist(), result)

  def prefilled(self):
    """Prefills all prompts; with one more token each they fill the pool."""
    self.step(_plan((0, _prompt(0), True)))
    self.step(_plan((2, _prompt(2)[:12], False)))
    self.step(_plan((2, _prompt(2)[12:], True), (3, _prompt(3), True)))
    return self

  def of(self, row):
    """Returns the whole state of a row, the contents of its pages included."""
    rows, (group,) = self.rows, self.rows.cache.groups
    pages = group.table.page_indices[row]
    used = np.asarray(pages)[: -(-int(group.table.kv_lens[row]) // 8)]
    return [
      np.asarray(x)
      for x in (
        pages,
        group.table.kv_lens[row],
        group.table.min_lens[row],
        group.pool.k[used],
        group.pool.v[used],
        rows.last_tokens[row],
        rows.status[row],
        rows.num_new[row],
        rows.tokens[row],
        rows.logprobs[row],
      )
    ]


def _assert_same(before, after):
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)


def _assert_matches_oracle(run, row, num_new):
  """Compares the state of a row with the oracle."""
  tokens, logprobs = _expected(row)
  assert int(run.rows.num_new[row]) == num_new
  assert run.rows.tokens[row, :num_new].tolist() == tokens[:num_new]
  assert not np.asarray(run.rows.tokens[row, num_new:]).any()
  assert int(run.rows.last_tokens[row]) == tokens[num_new - 1]
  np.testing.assert_allclose(
    run.rows.logprobs[row, :num_new], logprobs[:num_new], rtol=0, atol=1e-4
  )


def test_a_step_mixes_rows_that_decode_with_chunks_of_prompts():
  run = _Run()
  expected = {row: _expected(row)[0] for row in (0, 2, 3)}
  result = run.step(_plan((0, _prompt(0), True)))
  assert result.tokens[0] == expected[0][:1]
  # Entries are not in the order of the rows; one chunk does not end its prompt.
  chunk = _prompt(2)[:9]
  result = run.step(_plan((2, chunk, False), _decode(0)))
  assert result.num_new == [0, 1, 0]
  assert result.tokens[1] == expected[0][1:2]
  result = run.step(
    _plan((3, _prompt(3), True), _decode(0), (2, _prompt(2)[9:15], False))
  )
  assert result.num_new == [1, 1, 0]
  assert result.tokens[:2] == [expected[3][:1], expected[0][2:3]]
  result = run.step(_plan((2, _prompt(2)[15:], True), _decode(3), _decode(0)))
  assert result.num_new == [1, 1, 1]
  for row, num_new in ((0, 4), (2, 1), (3, 2)):
    _assert_matches_oracle(run, row, num_new)
  assert run.rows.cache.kv_lens.tolist() == [12, 0, 17, 6]
  # The same rows, with plans of decode steps.
  for _ in range(2):
    result = run.step(_decode_plan(3, 0, 2))
  for row, num_new in ((0, 6), (2, 3), (3, 4)):
    _assert_matches_oracle(run, row, num_new)
  assert result.tokens == [
    [expected[r][n]] for r, n in ((3, 3), (0, 5), (2, 2))
  ]
  assert int(run.rows.num_new[1]) == 0


def test_random_numbers_are_those_of_the_row_and_its_number_of_tokens():
  run, tokens = _Run(), list(_prompt(1))
  run.step(_plan((0, _prompt(0), True)))
  plans = [
    _plan((1, tokens, True), _decode(0)),
    _plan(_decode(0), _decode(1)),
    _decode_plan(NOBODY, 0, 1),
    _decode_plan(1, 0),
  ]
  for num_new, plan in enumerate(plans):
    logits = oracle.llama_logits(
      tiny_llama.CONFIG, tiny_llama.weights(), tokens
    )
    key = jax.random.fold_in(jax.random.key(SEED), num_new)
    noise = np.asarray(jax.random.gumbel(key, (tiny_llama.CONFIG.vocab_size,)))
    tokens.append(int(np.argmax(logits[-1] / TEMPERATURE + noise)))
    run.step(plan)
    assert int(run.rows.last_tokens[1]) == tokens[-1]
  _assert_matches_oracle(run, 0, 5)


def test_nothing_is_sampled_inside_a_prompt():
  run = _Run()
  before = run.of(2)
  result = run.step(_plan((2, _prompt(2)[:12], False)))
  assert result.num_new == [0, 0, 0]
  assert result.refused == [False] * 3
  assert result.status[0] == Status.RUNNING
  assert run.rows.cache.kv_lens.tolist() == [0, 0, 12, 0]
  _assert_same(before[5:], run.of(2)[5:])  # except its pages


def test_a_result_has_a_field_for_each_entry():
  run = _Run(max_new=1)
  result = run.step(_plan((3, _prompt(3), True), (2, _prompt(2)[:7], False)))
  assert result.num_new == [1, 0, 0]
  assert result.status == [Status.LENGTH, Status.RUNNING, Status.ABORTED]
  assert result.refused == [False] * 3
  (token, *_), (logprob, *_) = _expected(3)
  assert result.tokens[0] == [token]
  np.testing.assert_allclose(result.logprobs[0], [logprob], rtol=0, atol=1e-4)
  assert [len(x) for x in result.tokens] == [1, 1, 1]


def test_stop_tokens_are_those_of_the_row():
  tokens, _ = _expected(3)
  run = _Run(stop=(tokens[1],)).prefilled()
  result = run.step(_decode_plan(2, 3, 0))
  assert result.num_new == [1, 1, 1]
  assert result.status == [Status.RUNNING, Status.STOP, Status.RUNNING]
  assert int(run.rows.last_tokens[3]) == tokens[1]


@pytest.mark.parametrize(
  "plan",
  [_plan(_decode(2), _decode(3), _decode(0)), _decode_plan(2, 3, 0)],
  ids=["ragged", "decode"],
)
def test_rows_that_have_ended_are_frozen_and_keep_their_pages(plan):
  run = _Run().prefilled()
  ended = jnp.arange(NUM_SEQS, dtype=jnp.int32) == 3
  run.rows = rows_lib.end(run.rows, ended, Status.ABORTED)
  before = run.of(3)
  result = run.step(plan)
  assert result.num_new == [1, 0, 1]
  assert result.refused == [False] * 3
  assert result.status == [Status.RUNNING, Status.ABORTED, Status.RUNNING]
  _assert_same(before, run.of(3))
  for row in (0, 2):
    _assert_matches_oracle(run, row, 2)
  # A row that has ended cannot end a second time.
  assert rows_lib.end(run.rows, ended, Status.ERROR).status[3] == Status.ABORTED
  # Only release_ended gives pages back.
  after = rows_lib.release_ended(run.rows)
  assert after.cache.kv_lens.tolist() == [10, 0, 18, 0]
  assert int(after.cache.groups[0].table.num_free) == 1


def test_a_refused_row_keeps_everything_and_can_try_again():
  run = _Run().prefilled()  # 2, 3 and 1 pages: the pool is full
  for _ in range(3):
    run.step(_decode_plan(0, 2, 3))
  assert run.rows.cache.kv_lens.tolist() == [12, 0, 20, 8]
  for plan in (
    _decode_plan(3, 0, 2),
    _plan(_decode(3), _decode(0), _decode(2)),
  ):
    before, num_new = run.of(3), int(run.rows.num_new[0])
    result = run.step(plan)
    assert result.refused == [True, False, False]
    assert result.num_new == [0, 1, 1]
    assert result.status == [Status.RUNNING] * 3
    _assert_same(before, run.of(3))
    for row in (0, 2):
      _assert_matches_oracle(run, row, num_new + 1)
  ended = jnp.arange(NUM_SEQS, dtype=jnp.int32) == 2
  run.rows = rows_lib.end(run.rows, ended, Status.ABORTED)
  run.rows = rows_lib.release_ended(run.rows)
  result = run.step(_decode_plan(3, 0, 2))
  assert result.refused == [False] * 3
  assert result.num_new == [1, 1, 0]
  _assert_matches_oracle(run, 3, 5)


def test_a_refused_chunk_of_a_prompt_samples_nothing():
  run = _Run().prefilled()
  before = run.of(1)
  result = run.step(_plan((1, [1, 2, 3], True), _decode(0)))
  assert result.refused == [True, False, False]
  assert result.num_new == [0, 1, 0]
  _assert_same(before, run.of(1))
  _assert_matches_oracle(run, 0, 2)


def test_the_second_entry_of_a_row_is_refused():
  run = _Run().prefilled()
  result = run.step(_decode_plan(0, 0, 2))
  assert result.refused == [False, True, False]
  assert result.num_new == [1, 0, 1]
  _assert_matches_oracle(run, 0, 2)


@pytest.mark.parametrize("nobody", [-1, NOBODY + 1])
def test_an_entry_of_a_row_out_of_range_is_empty(nobody):
  run = _Run().prefilled()
  before = run.of(NUM_SEQS - 1)
  result = run.step(_decode_plan(nobody, 0, nobody))
  assert result.num_new == [0, 1, 0]
  assert result.status[0] == result.status[2] == Status.ABORTED
  _assert_same(before, run.of(NUM_SEQS - 1))
  _assert_matches_oracle(run, 0, 2)


def test_rows_keep_at_least_one_token_or_none():
  with pytest.raises(ValueError, match="capacity=0"):
    _rows(capacity=0)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(max_new=[1]), rf"max_new must have shape \({NUM_SEQS},\)"),
    (dict(max_new=[1.5] * NUM_SEQS), "max_new must be integers"),
    (dict(status=[0]), rf"status must have shape \({NUM_SEQS},\)"),
    (dict(count=1), f"sampling_arrays have 1 rows; the cache has {NUM_SEQS}"),
    (dict(capacity=2.5), "capacity=2.5 must be a Python integer"),
  ],
)
def test_what_is_not_of_the_rows_is_named(changes, message):
  count = changes.get("count", NUM_SEQS)
  with pytest.raises(ValueError, match=message):
    rows_lib.init(
      PagedCache.init(tiny_llama.model().layers, CONFIG),
      sampling.stack([SamplingParams()] * count),
      np.asarray(changes.get("max_new", [1] * NUM_SEQS)),
      status=np.asarray(changes.get("status", [0] * NUM_SEQS)),
      capacity=changes.get("capacity"),
    )


def test_there_is_no_batch_without_parameters():
  with pytest.raises(ValueError, match="params is empty"):
    sampling.stack([])


@pytest.mark.slow
def test_a_kind_of_plan_is_compiled_once_whatever_it_holds():
  run = _Run().prefilled()
  for rows in ((0, 2, 3), (3,), (), (2, 0, NOBODY)):
    run.step(_plan(*map(_decode, rows)))
    run.step(_decode_plan(*rows))
    run.step(loop.decode_plan(run.rows))  # of all rows
  # The tests in this file run no other kind.
  assert _jitted._cache_size() == 3


def test_a_step_keeps_the_structure_of_rows_and_no_leaf_is_empty():
  # A leaf of size 0 crashes the compiler under shard_map (jaxlib 0.11.2).
  structure, leaves = programs.flatten(tiny_llama.model())
  run = functools.partial(_jitted, structure)
  ragged, decode = _plan(), _decode_plan()
  for plan, options in (
    (ragged, dict(capacity=None, with_logprobs=False)),
    (decode, dict(capacity=None, with_logprobs=True)),
    (decode, dict(capacity=8, with_logprobs=False)),
    (ragged, dict(capacity=8, with_logprobs=True, stop=(3, 4, 5))),
  ):
    rows = jax.eval_shape(functools.partial(_rows, **options))
    assert all(x.size for x in jax.tree.leaves(rows))
    after, result = jax.eval_shape(run, leaves, rows, plan)
    same = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(same, after) == jax.tree.map(same, rows)
    assert (result.logprobs is not None) == options["with_logprobs"]
