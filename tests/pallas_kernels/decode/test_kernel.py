"""The decode kernel: compiled on a Hopper GPU, elsewhere interpreted."""

import dataclasses
import functools

import cases
import decode_runs
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import kernel_calls
import numpy as np
import oracle
import pytest

from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.decode.config import Config

pytestmark = pytest.mark.slow


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
  ("head_dim", "heads", "page_size", "dtype", "config"),
  [
    (64, (2, 2), 8, "bfloat16", Config(128, 2, 4)),
    (64, (64, 1), 128, "float16", Config(64, 4, 2)),
    (80, (9, 1), 40, "bfloat16", Config(64, 2, 5)),
    (96, (9, 3), 32, "float16", Config(64, 3, 3)),
    (128, (4, 1), 24, "bfloat16", Config(64, 2, 3)),
    (192, (16, 1), 256, "bfloat16", Config(64, 2, 4)),
    (256, (8, 1), 64, "float16", Config(64, 2, 1)),
  ],
)
def test_matches_oracle_for_shapes(head_dim, heads, page_size, dtype, config):
  problem = decode_runs.make(
    [0, 1, page_size - 1, page_size, page_size + 1, 200],
    num_q_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    page_size=page_size,
    dtype=dtype,
  )
  decode_runs.check(problem, config=config)


@pytest.mark.parametrize(
  ("options", "sinks"),
  [
    (dict(sliding_window=1), None),
    (dict(sliding_window=70, num_sink_tokens=5), [-2, 0, 1, 5]),
    (dict(logits_soft_cap=30.0, scale=4.0), [-2, 0, 1, 40]),
    (
      dict(sliding_window=100, num_sink_tokens=64, logits_soft_cap=2.0),
      None,
    ),
    (dict(alibi_slopes=[0.5, 0.1, -0.05, 0.004]), None),
    (
      dict(
        sliding_window=100,
        num_sink_tokens=64,
        logits_soft_cap=2.0,
        alibi_slopes=[0.02, 0.1, -0.01, 0.004],
      ),
      [-2, 0, 1, 5],
    ),
  ],
  ids=str,
)
def test_matches_oracle_for_options(options, sinks):
  decode_runs.check(decode_runs.make([0, 64, 330]), sinks=sinks, **options)


def test_slopes_are_those_of_the_query_heads():
  problem = decode_runs.make([0, 1, 330], num_q_heads=6, num_kv_heads=2)
  problem.page_indices[2, [0, 7, 20]] = len(problem.k_pages)
  decode_runs.check(problem, alibi_slopes=2.0 ** -np.arange(1, 7))


def test_slopes_of_any_size_and_distance_leave_no_nan():
  problem = decode_runs.make([0, 1, 330])
  problem.page_indices[2, 18:] = len(problem.k_pages)
  slopes = [3e38, -3e38, 2.0**95, -1e30]
  out, lse = decode_runs.run(problem, alibi_slopes=slopes)
  # A single key has all the weight: the nearest, or the farthest.
  expected, _ = oracle.paged_attention(
    *dataclasses.astuple(problem)[:5], **cases.PLAIN, alibi_slopes=slopes
  )
  assert cases.relative_error(out, expected) < cases.TOLERANCE["bfloat16"]
  assert np.isfinite(lse[1:]).all()
  problem.kv_lens[2] = 2**31 - 1
  for x in decode_runs.run(problem, alibi_slopes=slopes):
    assert np.isfinite(x[1:].astype(np.float32)).all()


# Comments show the range of each program, as tiles of sequences a, b and c.
@pytest.mark.parametrize(
  ("num_programs", "many_kv_lens"),
  [
    (1, [(64, 333, 0), (0, 0, 0)]),
    (
      3,
      [
        (128, 128, 128),  # aa|bb|cc
        (64, 400, 64),  # abb|bbb|bbc
        (333, 64, 130),  # aaaa|aab|ccc
        (0, 333, 0),  # abb|bbb|bc, where a and c write zeros
        (0, 0, 0),
      ],
    ),
    (
      7,
      [
        (192, 192, 192),  # aa|ab|b|b|c|c|c
        (400, 1, 0),  # aa|aa|a|a|a|b|c: more partials than are loaded at once
        (5, 30, 64),  # a|b|c and four programs without tiles
      ],
    ),
  ],
)
def test_any_split_of_tiles_over_programs_matches_oracle(
  num_programs, many_kv_lens
):
  options = decode_runs.SHARED | dict(config=Config(64, 2, num_programs))
  for kv_lens in many_kv_lens:
    decode_runs.check(decode_runs.make_shared(*kv_lens), **options)


@pytest.mark.parametrize(
  ("kv_lens", "num_kv_heads", "num_programs"),
  [([200, 70], 2, 5), ([570], 1, 9)],  # aaa|aAA|AA|bb|BB and a|a|a|a|a|a|a|a|a
)
def test_any_split_of_heads_over_programs_matches_oracle(
  kv_lens, num_kv_heads, num_programs
):
  problem = decode_runs.make(kv_lens, num_kv_heads=num_kv_heads)
  decode_runs.check(problem, config=Config(64, 2, num_programs))


def test_holes_are_skipped():
  problem = decode_runs.make_shared(330, 64, 300)
  num_pages, table = len(problem.k_pages), problem.page_indices
  table[0, [0, 3, 8, 9]] = -1, num_pages + 7, 2**31 - 1, -(2**31)
  table[1, :] = num_pages
  table[2, 2:6] = num_pages
  decode_runs.check(problem, **decode_runs.SHARED)
  options = dict(sliding_window=150, num_sink_tokens=20)
  decode_runs.check(problem, **decode_runs.SHARED, **options)


# The interpreter multiplies with NumPy, which warns of Inf - Inf.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_unused_memory_leaves_no_trace(poison):
  clean, poisoned = (
    decode_runs.run(
      decode_runs.make([1, 70, 201], dtype="float16", poison=filler),
      config=Config(64, 2, 3),
    )
    for filler in (0.0, poison)
  )
  cases.assert_same_bits(clean, poisoned)


def test_keys_left_of_the_window_leave_no_trace():
  problem = decode_runs.make([300], head_dim=80)
  options = dict(sliding_window=100, num_sink_tokens=3)
  clean = decode_runs.run(problem, **options)
  problem.k_pages, problem.v_pages = (
    np.array(x) for x in (problem.k_pages, problem.v_pages)
  )
  for position in range(3, 200):
    page = problem.page_indices[0, position // 16]
    problem.k_pages[page, :, position % 16] = np.nan
    problem.v_pages[page, :, position % 16] = np.nan
  cases.assert_same_bits(clean, decode_runs.run(problem, **options))


# Columns of a tile after the group hold the next group's queries.
def test_queries_of_others_leave_no_trace():
  problem = decode_runs.make_shared(70, 330, 70)
  clean = decode_runs.run(problem, **decode_runs.SHARED)
  problem.q = np.array(problem.q)
  problem.q[[0, 2]] = np.nan
  poisoned = decode_runs.run(problem, **decode_runs.SHARED)
  cases.assert_same_bits([x[1] for x in clean], [x[1] for x in poisoned])


def test_fewer_queries_than_columns_of_a_tile():
  problem = decode_runs.make([70, 130], num_q_heads=3)
  decode_runs.check(problem)


@pytest.mark.quick
def test_two_runs_are_bitwise_equal():
  problem = decode_runs.make_shared(7, 333, 80)
  cases.assert_same_bits(
    decode_runs.run(problem, **decode_runs.SHARED),
    decode_runs.run(problem, **decode_runs.SHARED),
  )


def test_the_order_of_pages_does_not_matter():
  problem = decode_runs.make_shared(7, 333, 80)
  expected = decode_runs.run(problem, **decode_runs.SHARED)
  order = np.random.default_rng(1).permutation(len(problem.k_pages))
  problem.k_pages = problem.k_pages[order]
  problem.v_pages = problem.v_pages[order]
  to = np.append(np.argsort(order), len(order)).astype(np.int32)
  problem.page_indices = to[problem.page_indices]
  cases.assert_same_bits(
    expected, decode_runs.run(problem, **decode_runs.SHARED)
  )


def test_row_in_one_range_does_not_depend_on_other_rows():
  together = decode_runs.run(
    decode_runs.make_shared(400, 64, 64), **decode_runs.SHARED
  )  # aaa|aaa|abc
  apart = decode_runs.run(
    decode_runs.make_shared(0, 64, 333), **decode_runs.SHARED
  )  # abc|ccc|cc
  cases.assert_same_bits([x[1] for x in together], [x[1] for x in apart])


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_fixed_splits_do_not_depend_on_the_batch(kv_dtype):
  kv_lens = [1100, 64, 333, 0, 700]  # 18, 1, 6, 1 and 11 tiles: 5, 1, 2, 1, 3
  problem, scales = decode_runs.make(kv_lens), {}
  if kv_dtype:
    problem, scales = cases.quantise(problem, kv_dtype)
  run = functools.partial(
    decode_runs.run,
    batch_invariant=True,
    **{name: jnp.asarray(x) for name, x in scales.items()},
  )
  together = run(problem, config=Config(64, 2, 4))
  if kv_dtype is None:
    decode_runs.check(problem, config=Config(64, 2, 4), batch_invariant=True)
  rows = [4, 0, 1]
  fewer = dataclasses.replace(
    problem,
    q=problem.q[rows],
    kv_lens=problem.kv_lens[rows],
    page_indices=problem.page_indices[rows],
  )
  for num_programs in (1, 7):
    apart = run(fewer, config=Config(64, 3, num_programs))
    cases.assert_same_bits([x[rows] for x in together], apart)


def test_lengths_out_of_range_are_cut():
  problem = decode_runs.make_shared(26 * 16, 80, 0)
  assert problem.page_indices.shape == (3, 26)
  problem.page_indices[0, -1] = problem.page_indices[0, 0]
  expected = decode_runs.run(problem, **decode_runs.SHARED)
  problem.kv_lens[:] = 1000, 80, -3
  cases.assert_same_bits(
    expected, decode_runs.run(problem, **decode_runs.SHARED)
  )


@pytest.mark.quick
def test_no_sequences_and_no_pages_are_fine():
  problem = decode_runs.make([3, 4])
  problem.page_indices = problem.page_indices[:, :0]
  out, lse = decode_runs.run(problem)
  assert not out.any()
  assert np.isneginf(lse).all()
  problem.q, problem.kv_lens = problem.q[:0], problem.kv_lens[:0]
  problem.page_indices = problem.page_indices[:0]
  out, _ = decode_runs.run(problem)
  assert out.shape == (0, 4, 64)


def test_all_lengths_share_one_trace():
  traces = []

  @jax.jit
  def attend(*args):
    traces.append(args)
    return kernel_calls.call(
      decode_kernel.paged_decode,
      *args,
      sinks=None,
      config=decode_runs.SMALL,
      interpret=cases.INTERPRET,
      **cases.PLAIN,
    )

  for kv_lens in ((0, 0, 0), (17, 99, 1)):
    attend(*decode_runs.make_shared(*kv_lens).decode_args())
  assert len(traces) == 1


@pytest.mark.quick
def test_dtypes_must_agree():
  problem = decode_runs.make([3])
  problem.v_pages = problem.v_pages.astype(np.float16)
  with pytest.raises(ValueError, match="they must match"):
    decode_runs.run(problem)


@pytest.mark.skipif(
  cases.ON_HOPPER, reason="only the interpreter looks for races"
)
# In tiles of one chunk, different warps copy K, V and Q. 8-bit pages are left
# out: the interpreter reports a race if a copy follows a load.
@pytest.mark.parametrize(
  ("head_dim", "page_size"), [(64, 16), (80, 16), (64, 64)]
)
def test_no_memory_is_reused_before_it_was_read(head_dim, page_size, capfd):
  problem = decode_runs.make(
    [70, 200, 0], head_dim=head_dim, page_size=page_size
  )
  config = Config(64, 2, 2)  # three tiles for each of two programs
  # Only in this test do threads of the interpreter stand for the warps that
  # copy (`warps`).
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  run = functools.partial(decode_runs.run, problem, config=config)
  each_warp = run(interpret=interpret)
  assert "RACE" not in capfd.readouterr().out
  cases.assert_same_bits(each_warp, run())
