"""Decode attention in docs/performance.md."""

from benchmarks.harness import rivals
from benchmarks.harness.markdown import (
  files,
  machine,
  number,
  origin,
  paragraph,
  picture,
  read,
  section,
  span,
  table,
  us,
)


def beside_rivals() -> str:
  """Returns the section on decode attention beside other projects."""
  first, again = rivals.run(rivals.ALL), rivals.run(rivals.AGAIN)
  late, a_call = rivals.host_delay()
  return section(
    "Decode attention beside other projects",
    f"""`paged_attention` with one query token for each sequence:
    {rivals.SHAPE}. The tables give microseconds a call. The brackets give the
    share of the {number(first.random_pages)} GB/s at which the same run read
    random pages of 4 KB.""",
    _all_rivals(first),
    f"{first.machine()}. {rivals.PROGRAM} It wrote {files(rivals.ALL)}.",
    f"""The kernel became faster after this run. A second run, on a GPU that
    reads such pages at {number(again.random_pages)} GB/s, times it beside
    FlashInfer, without FlashInfer's XQA kernel. FlashInfer is timed by events
    on the GPU. JAX is timed from the host, which learns {span(late, 1)} ms late
    that a batch of calls has ended: {span(a_call)} us a call. In long batches,
    that counts for less; the last column compares these.""",
    _flashinfer_again(again),
    f"""{again.machine()}. The same program wrote
    {files(rivals.AGAIN, rivals.LONG)}.""",
  )


def _all_rivals(run: rivals.Run) -> str:
  sides = rivals.OURS, rivals.FLASHINFER, rivals.CUDNN_PAGED, rivals.JAX
  heads = ["batch x context", "paged_attention", "FlashInfer, fastest"]
  heads += ["cuDNN, paged", "JAX's own kernel"]

  def cell(record: dict | None) -> str:
    if record is None:
      return number(None)
    share = 100 * record["GBps"] / run.random_pages
    return f"{number(record['us'])} ({share:.0f} %)"

  return table(
    heads,
    [
      [label, *(cell(run.fastest(case, side)) for side in sides)]
      for label, case in rivals.DECODE.items()
    ],
  )


def _flashinfer_again(run: rivals.Run) -> str:
  heads = ["batch x context", "paged_attention", "in long batches"]
  heads += ["FlashInfer, fastest", "of FlashInfer's time"]
  longs, rows = rivals.long_batches(), []
  for label, case in rivals.DECODE.items():
    short, theirs = run.us(case, rivals.OURS), run.us(case, rivals.FLASHINFER)
    times = short, longs[case]["us"], theirs
    rows.append([label, *map(number, times), f"{times[1] / theirs:.2f}"])
  return table(heads, rows)


def by_itself() -> str:
  """Returns the section on decode attention by page size, option and batch."""
  record = read("h200/decode")
  settings = record["settings"]
  return section(
    "Decode attention by page size, option and batch",
    f"""`paged_attention` in a compiled loop, which itself takes
    {us(record["loop_alone"])} of the microseconds a call: {settings["dtype"]},
    {settings["num_q_heads"]} query heads, {settings["num_kv_heads"]} KV heads,
    head_dim {settings["head_dim"]}, and pages of {settings["page_size"]} tokens
    where the table does not say. The same run read one large array at
    {number(record["read_gb_per_s"])} GB/s.""",
    _page_sizes(record),
    picture("h200/decode", "Time and waste over the page size"),
    _options(record),
    _batches(record),
    origin("h200/decode", "benchmarks.decode"),
    f"""With `batch_invariant=True`, the output of a sequence does not depend on
    the rest of the batch, bit for bit. A loop that is not part of this
    repository compared both, in microseconds a call; it wrote
    {files("h200/decode_options")}.""",
    _batch_invariant(),
  )


def _page_sizes(record: dict) -> str:
  parts, settings = record["page_sizes"], record["settings"]
  count, least, most = settings["ragged"]
  heads = ["page size", "{} x {:,}".format(*settings["same"])]
  heads += [f"{count} x {least:,} to {most:,}", f"{settings['chats']} chats"]
  heads.append("slots that the chats leave empty")
  return table(
    heads,
    [
      [
        size,
        *(us(parts[name][size]) for name in ("same", "ragged", "chats")),
        f"{parts['chats'][size]['waste_percent']:.1f} %",
      ]
      for size in parts["same"]
    ],
  )


def _options(record: dict) -> str:
  settings = record["settings"]
  batch = "{} x {:,}".format(*settings["same"])
  queries = "{} x {:,}".format(*settings["queries"])
  labels = {
    "quantised": f"{batch}, pages of {{}}",
    "window": f"{settings['window'][0]} x {{}}",
    "queries": f"{queries}, query tokens a sequence: {{}}",
  }
  return table(
    ["case", "us a call", "GB/s of K and V"],
    [
      [label.format(name), us(figures), number(figures.get("gb_per_s"))]
      for part, label in labels.items()
      for name, figures in record[part].items()
    ],
  )


def _batches(record: dict) -> str:
  names = {
    "paged_attention": "paged_attention",
    "xla": "plain JAX",
    "pallas.ops.gpu.paged_attention": "JAX's own kernel",
  }
  return table(
    ["batch x context", *names.values()],
    [
      [label, *(us(sides[name]) for name in names)]
      for label, sides in record["batches"].items()
    ],
  )


def _batch_invariant() -> str:
  batches = read("h200/decode_options")["batch_invariant"]
  return table(
    ["batch x context", "False", "True", "more"],
    [
      [
        label,
        number(side["us_min"]),
        number(side["us_min_batch_invariant"]),
        f"{side['more_percent']:+.1f} %",
      ]
      for label, side in batches.items()
    ],
  )


def plain() -> str:
  """Returns the block on plain JAX in docs/support.md: a table, its origin."""
  record = read("h200/decode")
  rows = []
  for name, sides in record["batches"].items():
    count, length = name.split(" x ")
    kernel, xla = (
      sides[side]["us"]["median"] for side in ("paged_attention", "xla")
    )
    label = f"{count} x {int(length) // 1024}k"
    rows.append([label, number(kernel), number(xla), number(xla / kernel)])
  heads = "batch x context", "kernel, us", "plain JAX, us", "factor"
  # Links lead from the folder of the documentation.
  return "\n\n".join(
    [
      table(heads, rows),
      paragraph(origin("h200/decode", "benchmarks.decode")),
    ]
  )


def loading() -> str:
  """Returns the section on how the decode kernel copies K and V."""
  record = read("h200/decode_options")
  labels = {name[2:]: label for label, name in rivals.DECODE.items()}

  def label(case: str) -> str:
    batch, _, dtype = case.partition(":")
    return ", ".join(filter(None, [labels[batch], dtype]))

  heads = ["batch x context", "warps meet", "loops of their own"]
  return section(
    "How the decode kernel copies K and V",
    f"""`paged_attention` by two versions of the kernel, in turns in one
    process, in microseconds a call: the four warps that copy synchronise for
    each tile, or each has its own loop over the tiles, as now.
    {rivals.SHAPE}; fp8 is float8_e4m3fn.""",
    table(
      heads,
      [
        [label(case), *(number(side["median"]) for side in sides.values())]
        for case, sides in record["loader"]["cases"].items()
      ],
    ),
    f"""{machine(record["environment"])}. The loop that timed them is not part
    of this repository; it wrote {files("h200/decode_options")}.""",
  )
