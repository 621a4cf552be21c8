"""Generation on a CPU in docs/performance.md."""

from benchmarks.harness.markdown import (
  files,
  machine,
  number,
  read,
  section,
  table,
)


def generate() -> str:
  """Returns the section on generation beside transformers."""
  record = read("cpu/generate")
  settings, where = record["settings"], record["environment"]
  sides = "paged_jax", "transformers"
  heads = ["batch", "tokens/s", "of transformers", "ratio"]
  heads += ["MB of memory", "of transformers", "ratio"]
  rows = []
  for batch, figures in record["batches"].items():
    row = [batch]
    for unit in ("tokens_per_s", "peak_mb"):
      row += [number(figures[side][unit]["median"]) for side in sides]
      row.append(f"{figures['ratio'][unit]:.2f}")
    rows.append(row)
  return section(
    "Generation on a CPU",
    f"""Whole calls of `generate` with the demo model in {settings["dtype"]},
    {settings["prompt_len"]} prompt and {settings["num_new"]} new tokens a
    sequence, and of Hugging Face transformers with its own cache, which gives
    the same tokens. Memory is the peak of the process; compiled programs and
    the compiler stay in it.""",
    table(heads, rows),
    f"""{machine(where["paged_jax"])}; {machine(where["transformers"])}.
    `python -m benchmarks.generate --rival-python PYTHON` writes
    {files("cpu/generate")}.""",
  )
