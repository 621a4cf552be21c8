"""The data of several benchmarks: their folder, and lengths of requests."""

import json
import pathlib

DATA = pathlib.Path(__file__).parent.parent / "data"


def requests() -> tuple[list[int], list[int]]:
  """Returns the lengths of chat prompts, and of their outputs."""
  lens = json.loads((DATA / "sharegpt_like_lengths.json").read_text())
  return lens["prompt_lens"], lens["output_lens"]
