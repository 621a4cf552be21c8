"""Writes of K and V in docs/performance.md."""

from benchmarks.harness.markdown import origin, read, section, table, us


def kv_write() -> str:
  """Returns the section on writes of K and V to pages."""
  record = read("h200/kv_write")
  settings = record["settings"]
  batches = record["write"]
  names = {
    "plain copy": "plain copy of the bytes",
    "bfloat16, mosaic_gpu": "bfloat16, kernel",
    "bfloat16, xla": "bfloat16, XLA",
    "flashinfer.append_paged_kv_cache": "bfloat16, FlashInfer",
    "int8, mosaic_gpu": "int8, kernel",
    "int8, xla": "int8, XLA",
    "float8_e4m3fn, mosaic_gpu": "float8_e4m3fn, kernel",
    "float8_e4m3fn, xla": "float8_e4m3fn, XLA",
  }
  return section(
    "Writing K and V",
    f"""`kv.pool.write` of one layer, in microseconds:
    {settings["num_kv_heads"]} KV heads of width {settings["head_dim"]}, pages
    of {settings["page_size"]} tokens. Quantised pages are left to XLA unless
    the kernel is requested by name.""",
    table(
      ["pages and writer", *batches],
      [
        [label, *(us(sides[name]) for sides in batches.values())]
        for name, label in names.items()
      ],
    ),
    origin("h200/kv_write", "benchmarks.kv_write"),
  )
