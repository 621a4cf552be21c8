"""What is said of machines that are not at hand, and what is made for them."""

import types

import jax.numpy as jnp
import pytest
from jax.extend import backend

from paged_jax import devices
from paged_jax.cli import info, main

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
  """Makes the default device another one."""

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
def test_other_gpus_take_xla_for_want_of_wgmma(
  become, capsys, kind, capability
):
  become(kind, compute_capability=capability, core_count=100)
  lines = _info(capsys)
  assert lines["decode attention"] == (
    f"xla, since {kind!r} has compute capability {capability}, and the kernels "
    "multiply with wgmma, which only Hopper (9.0) has."
  )
  assert lines["prefill attention"].startswith("xla, since")


@pytest.mark.parametrize(("kind", "num_sms"), HOPPERS)
def test_hopper_takes_the_kernel(become, capsys, kind, num_sms):
  become(kind, compute_capability="9.0", core_count=num_sms)
  assert _info(capsys)["decode attention"] == (
    "mosaic_gpu, since its kernel serves bfloat16 with head_dim=64 on "
    f"{kind!r}."
  )


def test_a_cpu_takes_xla(become, capsys):
  become("cpu", platform="cpu")
  assert _info(capsys)["decode attention"] == (
    "xla, since the default device is 'cpu', not an NVIDIA GPU."
  )


def test_a_kernel_that_is_not_served_says_which_shape(become):
  become("NVIDIA H200", compute_capability="9.0", core_count=132)
  assert devices.why_not_hopper() is None
  reason = info.why_not_kernel("decode", dtype=jnp.bfloat16, head_dim=72)
  assert reason.startswith("head_dim=72 is not one of")
