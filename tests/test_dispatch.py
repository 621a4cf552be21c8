"""Choices and reasons for devices that this machine does not have."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.extend import backend

import paged_jax
from paged_jax import devices
from paged_jax.cli import info, main
from pallas_kernels.common import gpu
from pallas_kernels.decode import config as decode_config

OTHERS = [
  ("NVIDIA A100-SXM4-80GB", "8.0"),
  ("NVIDIA RTX 6000 Ada Generation", "8.9"),
  ("NVIDIA B200", "10.0"),
  ("NVIDIA GeForce RTX 5090", "12.0"),
]
HOPPERS = [
  ("NVIDIA H100 80GB HBM3", 132),
  ("NVIDIA H100 PCIe", 114),
  ("NVIDIA H200", 132),
  ("NVIDIA GH200 480GB", 132),
]


@pytest.fixture
def become(monkeypatch, unchecked_shapes):
  """Replaces the default device by another one."""

  def run(kind, platform="gpu", **attributes):
    device = types.SimpleNamespace(
      device_kind=kind, platform=platform, **attributes
    )
    monkeypatch.setattr(backend, "get_default_device", lambda: device)

  return run


def _info(capsys):
  assert main(["info"]) == 0
  out = capsys.readouterr().out
  return dict(line.split(": ", 1) for line in out.splitlines())


@pytest.mark.parametrize(("kind", "capability"), OTHERS)
def test_other_gpus_take_xla_because_they_lack_wgmma(
  become, capsys, kind, capability
):
  become(kind, compute_capability=capability, core_count=100)
  lines = _info(capsys)
  assert lines["decode attention"] == (
    f"xla, since {kind!r} has compute capability {capability}; the kernels use "
    "wgmma instructions, which only Hopper (9.0) has."
  )
  assert lines["prefill attention"].startswith("xla, since")


@pytest.mark.parametrize(("kind", "num_sms"), HOPPERS)
def test_hopper_takes_the_kernel_for_its_multiprocessors(
  become, capsys, kind, num_sms
):
  become(kind, compute_capability="9.0", core_count=num_sms)
  assert _info(capsys)["decode attention"] == (
    "mosaic_gpu, since its kernel supports bfloat16 with head_dim=64 on "
    f"{kind!r}."
  )
  assert gpu.default_gpu() == gpu.Gpu(kind, num_sms)
  few, many = (
    decode_config.default_config(8 * num_seqs, 4, 80, jnp.bfloat16)
    for num_seqs in (1, 300)
  )
  assert few.num_programs == num_sms
  assert many.num_programs == 2 * num_sms


def test_a_cpu_takes_xla_and_lowers_for_an_h200(become, capsys):
  become("cpu", platform="cpu")
  assert _info(capsys)["decode attention"] == (
    "xla, since the default device is 'cpu', not an NVIDIA GPU."
  )
  assert gpu.default_gpu() == gpu.Gpu(kind="", num_sms=132)


def test_a_gpu_that_does_not_tell_its_multiprocessors_counts_as_an_h200(
  become,
):
  become("NVIDIA H200", compute_capability="9.0")
  assert gpu.default_gpu() == gpu.Gpu("NVIDIA H200", 132)


def test_a_kernel_that_is_not_served_says_which_shape(become):
  become("NVIDIA H200", compute_capability="9.0", core_count=132)
  assert devices.why_not_hopper() is None
  reason = info.why_not_kernel("decode", dtype=jnp.bfloat16, head_dim=72)
  assert reason.startswith("head_dim=72 is not one of")


def test_the_kernel_of_prefill_takes_few_queries_that_decode_cannot(become):
  become("NVIDIA H200", compute_capability="9.0", core_count=132)
  q = jax.ShapeDtypeStruct((8, 16, 64), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((4, 1, 16, 64), jnp.bfloat16)
  i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

  def attend(*args):
    return paged_jax.ragged_paged_attention(*args, max_q_len=8)

  lens = i32(1), i32(1, 4), i32(2), i32()
  traced = jax.jit(attend).trace(q, pages, pages, *lens)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") >= 1
