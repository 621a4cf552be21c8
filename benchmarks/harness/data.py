"""What several benchmarks read: the folder, and lengths of requests."""

import json
import pathlib

DATA = pathlib.Path(__file__).parent.parent / "data"


def requests() -> tuple[list[int], list[int]]:
  """Returns the lengths of the prompts of chats, and of their outputs."""
  lens = json.loads((DATA / "sharegpt_like_lengths.json").read_text())
  return lens["prompt_lens"], lens["output_lens"]
