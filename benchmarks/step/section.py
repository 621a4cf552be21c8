"""Decode steps of whole models in docs/performance.md."""

from benchmarks.harness.markdown import number, origin, read, section, table


def step() -> str:
  """Returns the section on decode steps, as `stream` runs them."""
  record = read("h200/step")
  settings = record["settings"]
  last = settings["prompt_len"] + settings["num_new"]
  return section(
    "Decode steps of whole models",
    f"""A step of Llamas of random bfloat16 parameters, of the shapes of
    SmolLM2-135M and Llama 3.1 8B, at contexts of {settings["prompt_len"] + 1:,}
    to {last:,} tokens; B is the rows of the batch. `stream` dispatches one step
    at a time and hands out its tokens; the loop runs all steps inside one
    program; "call returns" is how long a dispatch holds the Python thread. All
    tokens are the same.""",
    table(
      ["model", "stream, ms", "loop, ms", "ratio", "call returns, ms"],
      [
        [
          name,
          number(figures["stream_ms"]),
          number(figures["loop_ms"]),
          f"{figures['stream_to_loop']:.2f}",
          number(figures["returns_ms"]),
        ]
        for name, figures in record["steps"].items()
      ],
    ),
    origin("h200/step", "benchmarks.step"),
  )
