"""The tuner of the decode kernel finds what is faster, and writes it down."""

import dataclasses
import json
import runpy

import jax.numpy as jnp
import pytest
import tune_decode
from decode_loop import decode

from pallas_kernels.common import gpu
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import table as decode_table
from pallas_kernels.decode.config import Config

SMALL = tune_decode.small()
H200 = gpu.Gpu("NVIDIA H200", 132)


def _side(key, rule_us, us):
  return {"key": list(key), "rule_us": rule_us, "us": us}


def test_every_config_is_verified_and_timed():
  record = json.loads(json.dumps(tune_decode.figures(SMALL)))
  assert tune_decode.failures(record) == []
  (side,) = record["shapes"]
  assert side["rule"] == "128 2 4"
  assert set(side["us"]) == {
    "64 2 2",
    "64 3 2",
    "128 2 2",
    "128 3 2",
    "128 2 4",
  }
  assert side["best_us"] == side["us"][side["best"]] == min(side["us"].values())
  assert side["gain"] == side["us"]["128 2 4"] / side["best_us"] >= 1


def test_wrong_output_and_errors_are_named_and_never_best(monkeypatch):
  sizes = dataclasses.replace(SMALL.sizes, implementation="xla")
  search = dataclasses.replace(SMALL, sizes=sizes, block_kv=(64,))

  def attend(config, scale, interpret):
    def call(*args):
      if config.num_stages == 3:
        raise ZeroDivisionError("of three\nstages")
      out = decode(sizes)(*args)
      return out if config == rule else out * jnp.asarray(1.05, out.dtype)

    return call

  (shape,) = search.shapes
  rule = decode_config.default_rule(
    shape.num_items, *shape.item, device=gpu.Gpu("small", 2)
  )
  monkeypatch.setattr(tune_decode, "_attend", attend)
  record = tune_decode.figures(search)
  wrong, failed = tune_decode.failures(record)
  assert "64 2 2: RuntimeError: the output is wrong" in wrong
  assert failed.endswith("64 3 2: ZeroDivisionError: of three")
  assert record["shapes"][0]["best"] == "128 2 4"


def test_a_rule_that_fails_leaves_no_entry(monkeypatch):
  monkeypatch.setattr(tune_decode, "_attend", lambda *_: jnp.zeros_like)
  record = tune_decode.figures(SMALL)
  (failed,) = tune_decode.failures(record)
  assert "TypeError" in failed
  assert tune_decode.best_by_key(record["shapes"]) == {}


@pytest.mark.parametrize("shape", tune_decode.Search(H200).shapes, ids=str)
def test_the_grid_holds_what_fits_and_the_rule(shape):
  configs = tune_decode.Search(H200).configs(shape)
  rule = decode_config.default_rule(shape.num_items, *shape.item, device=H200)
  assert rule in configs
  assert len(configs) == len(set(configs))
  for config in configs:
    needed = decode_config.smem_bytes(config, *shape.item)
    assert needed <= decode_config.SMEM_LIMIT
    programs, rest = divmod(config.num_programs, 132)
    assert rest == 0
    assert programs * (needed + 1024) <= decode_config.SM_SMEM


def test_an_entry_is_faster_for_every_shape_of_its_key():
  one, two, three = [(n, 8, 128, "bfloat16") for n in (8, 16, 32)]
  sides = [
    _side(one, 100, {"64 2 264": 90, "64 3 132": 97, "64 4 132": 100}),
    _side(one, 100, {"64 2 264": 99, "64 3 132": 97, "64 4 132": 100}),
    _side(two, 100, {"64 2 264": 98.5, "64 3 132": 100}),
    _side(three, 100, {"64 2 264": 50, "128 2 132": 97}),
    _side(three, 100, {"128 2 132": 95}),
  ]
  assert tune_decode.best_by_key(sides) == {
    one: Config(64, 3, 132),
    three: Config(128, 2, 132),
  }


def test_written_entries_are_those_that_are_read(monkeypatch, tmp_path):
  source = tune_decode.TABLE.read_text()
  key = 512, 8, 128, "bfloat16"
  others = {"NVIDIA H100 PCIe": {key: (64, 3, 114)}, "NVIDIA H200": {key: ()}}
  monkeypatch.setattr(decode_table, "CONFIGS", others)
  entries = {(1024, 8, 64, "float16"): Config(128, 2, 264)}
  entries[key] = Config(128, 3, 132)
  text = tune_decode.table_text(source, "NVIDIA H200", entries)
  assert text.endswith(
    """] = {
  "NVIDIA H100 PCIe": {
    (512, 8, 128, "bfloat16"): (64, 3, 114),
  },
  "NVIDIA H200": {
    (512, 8, 128, "bfloat16"): (128, 3, 132),
    (1024, 8, 64, "float16"): (128, 2, 264),
  },
}
"""
  )
  path = tmp_path / "decode_table.py"
  path.write_text(text)
  written = runpy.run_path(str(path))
  fields = {key: dataclasses.astuple(config) for key, config in entries.items()}
  assert written["CONFIGS"] == others | {"NVIDIA H200": fields}
  assert written["key"](500, *key[1:]) == key


def test_no_entry_leaves_no_device_and_the_table_is_as_it_is_written():
  source = tune_decode.TABLE.read_text()
  assert tune_decode.table_text(source, "no such device", {}) == source
