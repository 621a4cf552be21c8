"""Times every Config of a grid for shapes of decode attention, on this GPU.

The Config of the rule is verified against plain JAX, and every other against
its output. Batches, loops and clock are those of `bench_decode.py`.

  python benchmarks/tune_decode.py --write-table

Results: benchmarks/results/<device>/tuned_decode.json. With --write-table, the
entries of this kind of device in pallas_kernels/decode_table.py are replaced.
"""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import sys

import harness
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from decode_batches import FULL, SMALL, Batch, Sizes, make, same
from decode_loop import MAX_ERROR, decode, reference, relative_error, timed
from decode_parts import attempt

from pallas_kernels.common import gpu
from pallas_kernels.decode import config as decode_config
from pallas_kernels.decode import kernel as decode_kernel
from pallas_kernels.decode import table as decode_table
from pallas_kernels.decode.config import Config

PACKAGES = ["jax", "jaxlib", "jax-cuda13-plugin", "numpy"]
TABLE = pathlib.Path(decode_table.__file__)
SIZES = dataclasses.replace(FULL, loop_us=50_000)
MIN_GAIN = 1.02  # over the rule, for an entry of the table


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sequences of one length."""

  num_seqs: int
  kv_len: int
  num_q_heads: int
  num_kv_heads: int
  head_dim: int
  page_size: int = 16
  dtype: str = "bfloat16"

  @property
  def item(self) -> tuple[int, int, str]:
    """Queries of an item, head_dim and dtype."""
    return self.num_q_heads // self.num_kv_heads, self.head_dim, self.dtype

  @property
  def num_items(self) -> int:
    """KV heads of all sequences."""
    return self.num_seqs * self.num_kv_heads

  @property
  def key(self) -> decode_table.Key:
    """The key in the table."""
    queries, head_dim, dtype = self.item
    padded = decode_config.padded_queries(queries)
    return decode_table.key(self.num_items, padded, head_dim, dtype)


@dataclasses.dataclass(frozen=True)
class Search:
  """What is timed, and on what device."""

  device: gpu.Gpu
  sizes: Sizes = SIZES
  # Several lengths of a key: an entry must be good for all of them.
  shapes: tuple[Shape, ...] = (
    Shape(1, 8192, 32, 8, 128),
    Shape(1, 131072, 32, 8, 128),
    Shape(8, 4096, 32, 8, 128),
    Shape(64, 2048, 32, 8, 128),
    Shape(64, 8192, 32, 8, 128),
    Shape(256, 1024, 32, 8, 128),
    Shape(64, 4096, 32, 32, 128),
    Shape(64, 4096, 32, 1, 128),
    Shape(64, 4096, 64, 8, 64),
    Shape(64, 2048, 9, 3, 64),
    Shape(64, 4096, 16, 8, 256),
  )
  block_kv: tuple[int, ...] = (64, 128)
  num_stages: tuple[int, ...] = (2, 3, 4, 5, 6)
  programs_per_sm: tuple[int, ...] = (1, 2, 3)
  interpret: plgpu.InterpretGPUParams | None = None

  def configs(self, shape: Shape) -> list[Config]:
    """Returns the Configs that shared memory has room for."""
    grid = itertools.product(
      self.block_kv, self.num_stages, self.programs_per_sm
    )
    configs = [
      (Config(block_kv, num_stages, count * self.device.num_sms), count)
      for block_kv, num_stages, count in grid
    ]
    most = decode_config.programs_per_sm
    return [c for c, count in configs if count <= most(c, *shape.item)]


def main() -> None:
  """Times everything, writes the figures, and the table if asked to."""
  args, environment = harness.start_on_gpu(
    __doc__.splitlines()[0],
    PACKAGES,
    on_cpu=jax.default_backend() == "cpu",
    flags={"write-table": "replace the entries of this kind of device"},
  )
  search = small() if args.small else Search(gpu.at_hand())
  record = figures(search)
  record["environment"] = environment
  entries = best_by_key(record["shapes"])
  if not args.small:
    name = search.device.kind.removeprefix("NVIDIA ").lower().replace(" ", "_")
    print("written to", harness.save(name, "tuned_decode", record, args.out))
  print(f"faster than the rule by {MIN_GAIN}:", entries)
  if failed := failures(record):
    sys.exit(f"failed: {', '.join(failed)}")
  if args.write_table and not args.small:
    text = table_text(TABLE.read_text(), search.device.kind, entries)
    TABLE.write_text(text)
    print("written to", TABLE)


def small() -> Search:
  """Returns a search that the interpreter can do, where there is no GPU."""
  on_cpu = jax.default_backend() == "cpu"
  return Search(
    gpu.Gpu("small", 2),
    dataclasses.replace(SMALL, loop_us=1, num_loops=1),
    shapes=(Shape(2, 70, 4, 2, 64, page_size=32),),
    num_stages=(2, 3),
    programs_per_sm=(1,),
    interpret=plgpu.InterpretGPUParams() if on_cpu else None,
  )


def figures(search: Search) -> dict:
  """Returns the figures of all shapes."""
  settings = dict(
    device=dataclasses.asdict(search.device),
    loop_us=search.sizes.loop_us,
    num_loops=search.sizes.num_loops,
    configs="block_kv, num_stages, num_programs",
    us="median microseconds of a call, by Config",
    gain="time of the rule's Config over that of the best",
    max_relative_error=MAX_ERROR,
  )
  shapes = []
  for shape in search.shapes:
    side = dataclasses.asdict(shape) | {"key": shape.key}
    side |= attempt(tune, search, shape)
    print(json.dumps({k: v for k, v in side.items() if k != "us"}), flush=True)
    shapes.append(side)
  return {"settings": settings, "shapes": shapes}


def tune(search: Search, shape: Shape) -> dict:
  """Verifies and times every Config for a shape, that of the rule first."""
  fields = "num_q_heads", "num_kv_heads", "head_dim", "page_size"
  sizes = dataclasses.replace(
    search.sizes, **{name: getattr(shape, name) for name in fields}
  )
  lens = same((shape.num_seqs, shape.kv_len))
  batch = _cast(make(sizes, lens), shape.dtype)

  def run(config: Config, expected: jax.Array) -> dict:
    attend = _attend(config, shape.head_dim**-0.5, search.interpret)
    check = functools.partial(relative_error, expected)
    side, out = timed(sizes, batch, attend, lens.sum(), check)
    return {"us": side["us"]["median"], "out": out}

  rule = decode_config.default_rule(
    shape.num_items, *shape.item, device=search.device
  )
  first = run(rule, reference(decode(sizes, "xla"), batch))
  sides = {rule: first}
  for config in search.configs(shape):
    if config != rule:
      sides[config] = attempt(run, config, first["out"])
  us = {_name(c): side["us"] for c, side in sides.items() if "us" in side}
  best = min(us, key=us.__getitem__)
  return dict(
    rule=_name(rule),
    rule_us=first["us"],
    best=best,
    best_us=us[best],
    gain=first["us"] / us[best],
    us=us,
    errors={
      _name(c): side["error"] for c, side in sides.items() if "error" in side
    },
  )


def best_by_key(shapes: list[dict]) -> dict[decode_table.Key, Config]:
  """Returns the entries of the table.

  The Config whose least gain over the shapes of a key is largest, where it
  exceeds `MIN_GAIN`.

  Args:
    shapes: As in the figures.
  """
  sides_of = collections.defaultdict(list)
  for side in shapes:
    sides_of[tuple(side["key"])].append(side)
  entries = {}
  for key, sides in sides_of.items():
    timed_in_all = set.intersection(
      *(set(side.get("us", ())) for side in sides)
    )
    least = {
      name: min(side["rule_us"] / side["us"][name] for side in sides)
      for name in sorted(timed_in_all)
    }
    best = max(least, key=least.__getitem__, default=None)
    if best is not None and least[best] > MIN_GAIN:
      entries[key] = Config(*(int(field) for field in best.split()))
  return entries


def table_text(
  source: str, kind: str, entries: dict[decode_table.Key, Config]
) -> str:
  """Returns the source of the table with the entries of a device replaced.

  Args:
    source: Of `decode_table`, whose last statement is the table.
    kind: Of the device.
    entries: All that there are for it.
  """
  tables = dict(decode_table.CONFIGS)
  tables[kind] = {k: dataclasses.astuple(c) for k, c in entries.items()}
  head, _ = source.split("] = {")
  lines = []
  for name, table in sorted(tables.items()):
    if table:
      quoted = (
        f"    ({', '.join(json.dumps(x) for x in key)}): {fields},"
        for key, fields in sorted(table.items())
      )
      lines += [f"  {json.dumps(name)}: {{", *quoted, "  },"]
  body = "\n".join(["{", *lines, "}"]) if lines else "{}"
  return f"{head}] = {body}\n"


def failures(record: dict) -> list[str]:
  """Returns what has an error in place of its time."""
  return [
    f"{side['key']}: {error}"
    for side in record["shapes"]
    for error in (
      *(f"{name}: {text}" for name, text in side.get("errors", {}).items()),
      *([side["error"]] if "error" in side else []),
    )
  ]


def _attend(config, scale, interpret):
  def attend(*args):
    out, _ = decode_kernel.paged_decode(
      *args,
      scale=scale,
      sliding_window=None,
      num_sink_tokens=0,
      logits_soft_cap=None,
      sinks=None,
      config=config,
      interpret=interpret,
    )
    return out

  return attend


def _cast(batch: Batch, dtype: str) -> Batch:
  arrays = {name: getattr(batch, name) for name in ("q", "k_pages", "v_pages")}
  return dataclasses.replace(
    batch, **{name: x.astype(dtype) for name, x in arrays.items()}
  )


def _name(config: Config) -> str:
  return " ".join(str(field) for field in dataclasses.astuple(config))


if __name__ == "__main__":
  main()
