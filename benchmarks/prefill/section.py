"""Prefill attention, and a model that reads prompts, in docs/performance.md."""

from benchmarks.harness import rivals
from benchmarks.harness.markdown import (
  files,
  number,
  origin,
  read,
  section,
  table,
  us,
)


def attention() -> str:
  """Returns the section on prefill attention."""
  runs = [rivals.run(name) for name in (rivals.ALL, rivals.AGAIN)]
  products = " and ".join(number(run.product) for run in runs)
  cases = [(run, case) for run in runs for case in rivals.PREFILL.values()]
  sides = rivals.OURS, rivals.FLASHINFER, rivals.GATHER, rivals.CUDNN
  spread = max(run.spread(case, sides) for run, case in cases)
  settings = read("h200/prefill")["settings"]
  lens = settings["chunk_lens"]
  return section(
    "Prefill attention",
    f"""`ragged_paged_attention` of whole prompts, or of the last tokens of
    prompts: {rivals.SHAPE}. The table gives microseconds a call, and in
    brackets TFLOP/s, of which a large product of matrices reached {products} in
    the two runs. cuDNN reads contiguous K and V, or gathers the pages first.
    Batches of calls differ by up to {100 * spread:.0f} % within a run, because
    the GPU lowers its clock under load.""",
    _rivals(*runs),
    f"""{runs[1].machine()}. {rivals.PROGRAM} It wrote
    {files(rivals.ALL, rivals.AGAIN)}.""",
    f"""{settings["num_decodes"]} sequences of {settings["decode_len"]:,} tokens
    decode, and {len(lens)} prompts go on by {lens[0]:,} tokens each: by a call
    of `ragged_paged_attention` for the prompts and one of `paged_attention` for
    the others, or by one call for all. The loop around the calls is in every
    figure, and counts once in the ratio.""",
    _mixed(),
    origin("h200/prefill", "benchmarks.prefill"),
    "Prompts of one sequence, over pages of three dtypes:",
    _quantised(),
    origin("h200/ragged", "benchmarks.ragged"),
  )


def _rivals(first: rivals.Run, again: rivals.Run) -> str:
  heads = ["prompts", "ragged_paged_attention", "FlashInfer, fastest"]
  heads += ["cuDNN, gathers", "cuDNN, contiguous", "second run: ours"]
  heads.append("second run: FlashInfer")
  sides = rivals.OURS, rivals.FLASHINFER, rivals.GATHER, rivals.CUDNN
  columns = [(first, side) for side in sides]
  columns += [(again, side) for side in sides[:2]]

  def cell(record: dict | None) -> str:
    if record is None:
      return number(None)
    return f"{number(record['us'])} ({number(record['TFLOPs'])})"

  return table(
    heads,
    [
      [label, *(cell(run.fastest(case, side)) for run, side in columns)]
      for label, case in rivals.PREFILL.items()
    ],
  )


def _mixed() -> str:
  cases = read("h200/prefill")["mixed"]
  names = {
    "loop": "the loop alone",
    "chunks": "the prompts",
    "decodes": "the others",
    "mixed": "all, in one call",
  }
  rows = [[label, us(cases[name])] for name, label in names.items()]
  share = f"{cases['mixed']['mixed_to_sum']:.3f}"
  return table(["calls", "us"], [*rows, ["one call / both calls", share]])


def _quantised() -> str:
  rows = []
  for name, configs in read("h200/ragged")["cases"].items():
    figures, *_ = configs.values()  # of the default Config
    rows.append([name, us(figures), number(figures["tflop_per_s"])])
  return table(["prompt", "us", "TFLOP/s"], rows)


def model() -> str:
  """Returns the section on a whole model that reads prompts."""
  record = read("h200/prefill")
  settings = record["settings"]
  config = settings["config"]
  ceiling = number(record["ceiling"]["tflop_per_s"])
  return section(
    "A model that reads prompts",
    f"""A Llama of 8 billion random parameters ({config["num_layers"]} layers,
    hidden size {config["hidden_size"]:,}) reads {settings["num_prompts"]}
    prompts of {settings["prompt_len"]:,} tokens in chunks, down to the logits
    of the last tokens. In the same run, a product of large
    {settings["dtype"]} matrices reached {ceiling} TFLOP/s.""",
    table(
      ["tokens a chunk", "tokens/s", "TFLOP/s", "of the product's"],
      [
        [
          f"{int(chunk):,}",
          number(figures["tokens_per_s"]),
          number(figures["tflop_per_s"]),
          f"{figures['percent_of_ceiling']:.1f} %",
        ]
        for chunk, figures in record["model"].items()
      ],
    ),
    origin("h200/prefill", "benchmarks.prefill"),
  )
