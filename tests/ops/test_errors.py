"""Errors of the attention ops."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax


def _decode_arguments():
  names = ("q", "k_pages", "v_pages", "kv_lens", "page_indices")
  return dict(
    zip(names, cases.make(kv_lens=[5, 40]).decode_args(), strict=True)
  )


BAD_ARRAYS = {
  "rank of q": ("q", lambda x: x[0], "q.shape"),
  "rank of k_pages": ("k_pages", lambda x: x[0], "k_pages.shape"),
  "rank of kv_lens": ("kv_lens", lambda x: x[None], "kv_lens.shape"),
  "dtype of q": ("q", lambda x: x.astype(jnp.int32), "q.dtype=int32"),
  "q unlike pages": ("q", lambda x: x.astype(jnp.bfloat16), "q.dtype=bfloat16"),
  "v unlike k": ("v_pages", lambda x: x.astype(jnp.bfloat16), "v_pages.dtype"),
  "fewer v pages": ("v_pages", lambda x: x[1:], "v_pages.shape"),
  "head_dim": ("q", lambda x: x[..., :32], "must have head_dim=64"),
  "heads": ("q", lambda x: x[:, :3], "num_q_heads=3"),
  "queries": ("q", lambda x: x[:1], r"q.shape=\(1, 4, 64\)"),
  "float lengths": (
    "kv_lens",
    lambda x: x.astype(jnp.float32),
    "kv_lens.dtype",
  ),
  "float pages": (
    "page_indices",
    lambda x: x.astype(jnp.float32),
    "page_indices.dtype",
  ),
  "rows of the table": ("page_indices", lambda x: x[:1], "page_indices.shape"),
}


@pytest.mark.parametrize(
  ("name", "spoil", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arrays_are_named(name, spoil, message):
  arguments = _decode_arguments()
  arguments[name] = spoil(arguments[name])
  with pytest.raises(ValueError, match=message):
    paged_jax.paged_attention(**arguments)


@pytest.mark.usefixtures("unchecked_shapes")
def test_page_size_must_be_a_multiple_of_8():
  arguments = _decode_arguments()
  for name in ("k_pages", "v_pages"):
    arguments[name] = arguments[name][:, :, :12]
  with pytest.raises(ValueError, match="page_size=12"):
    paged_jax.paged_attention(**arguments)


BAD_OPTIONS = {
  "scale": (dict(scale=float("nan")), "scale=nan"),
  "huge scale": (dict(scale=1e300), "scale=1e"),
  "sinks as a list": (dict(sinks=[0.0] * 4), "sinks must be an array"),
  "scale array": (dict(scale=np.ones(2)), "scale="),
  "window": (dict(sliding_window=0), "sliding_window=0"),
  "float window": (dict(sliding_window=4.0), "sliding_window=4.0"),
  "sink tokens": (dict(num_sink_tokens=-1), "num_sink_tokens=-1"),
  "batch invariant": (dict(batch_invariant="no"), "batch_invariant='no'"),
  "batch invariant array": (
    dict(batch_invariant=jnp.array(True)),
    "batch_invariant=Array",
  ),
  "soft cap": (dict(logits_soft_cap=0.0), "logits_soft_cap=0.0"),
  "soft cap of float64": (dict(logits_soft_cap=1e39), r"cap=1e\+39"),
  "subnormal soft cap": (dict(logits_soft_cap=1e-40), "logits_soft_cap=1e-40"),
  "soft cap bool": (dict(logits_soft_cap=True), "logits_soft_cap=True"),
  "sinks": (dict(sinks=jnp.zeros(3)), r"sinks.shape=\(3,\)"),
  "sinks dtype": (dict(sinks=jnp.zeros(4, jnp.int32)), "sinks.dtype=int32"),
  "slopes as a list": (
    dict(alibi_slopes=[0.5] * 4),
    "alibi_slopes must be an array",
  ),
  "slopes": (dict(alibi_slopes=jnp.zeros((4, 1))), "alibi_slopes.shape="),
  "slopes dtype": (
    dict(alibi_slopes=jnp.zeros(4, jnp.int8)),
    "alibi_slopes.dtype=int8",
  ),
  "implementation": (dict(implementation="cuda"), "implementation='cuda'"),
}


@pytest.mark.parametrize(
  ("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    paged_jax.paged_attention(**_decode_arguments(), **options)
  problem = cases.make(kv_lens=[5, 40], q_lens=[2, 3])
  with pytest.raises(ValueError, match=message):
    paged_jax.ragged_paged_attention(*problem.args(), **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_offsets_of_a_ragged_batch_must_fit():
  args = list(cases.make(kv_lens=[5, 40], q_lens=[2, 3]).args())
  for cu_q_lens in (args[5][:2], args[5].astype(jnp.float32)):
    with pytest.raises(ValueError, match="cu_q_lens"):
      paged_jax.ragged_paged_attention(*args[:5], cu_q_lens, args[6])
  with pytest.raises(ValueError, match="num_active"):
    paged_jax.ragged_paged_attention(*args[:6], jnp.zeros(2, jnp.int32))


def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason():
  # head_dim 32 on a GPU, no GPU elsewhere.
  problem = cases.make(kv_lens=[5], head_dim=32)
  with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu'"):
    paged_jax.paged_attention(
      *problem.decode_args(), implementation="mosaic_gpu"
    )
  with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu'"):
    paged_jax.ragged_paged_attention(
      *problem.args(), implementation="mosaic_gpu"
    )
