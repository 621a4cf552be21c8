"""Counts the KV memory that pages waste and save, in replays on the CPU.

Three replays through `paged_jax.page_table`, each at every page size:

  batching  1000 requests in 256 rows: when a request ends, it releases its
            pages and the next one starts in its row. Compared with buffers of
            2,048 tokens; a longer request (there are 6) takes two.
  sampling  the first 250 prompts, with 4 samples each, forked from one prompt.
            The samples of prompt `i` are as long as outputs `4 i` to `4 i + 3`
            of the same list. 64 prompts run at once; the next one starts when
            all 4 samples of one have ended.
  beams     beam searches of width 4, which `record_beams` recorded on the demo
            model, all at once. Compared with a buffer for each beam that is
            exactly as long as the beam.

The use of a step is counted when its tokens are stored; figures cover all
steps, from the first to the last request. Every replay has only the pages that
`count` computes for it. If the replay and `count` differ in any step, no
results are written.

  python -m benchmarks.waste

Results: benchmarks/results/cpu/waste.json and waste.svg
"""

import json

import jax
import numpy as np

from benchmarks.harness import command, results
from benchmarks.harness.data import DATA, requests
from benchmarks.waste import count, replay

PAGE_SIZES = (8, 16, 32, 64, 128, 256)
NUM_ROWS = 256
BUFFER_LEN = 2048
NUM_SAMPLES = 4


def main() -> None:
  """Runs the replays, and writes the record and its picture."""
  from benchmarks.waste import plot  # imported here: it needs matplotlib

  command.parser("waste", __doc__).parse_args()
  jax.config.update("jax_platforms", "cpu")
  record = {
    "settings": settings(),
    **replays(),
    "environment": results.environment(["jax", "jaxlib", "numpy"], on_cpu=True),
  }
  print(json.dumps(record, indent=1))
  path = results.save("cpu", "waste", record)
  print("written to", path, plot.save(record, path.with_suffix(".svg")))


def replays() -> dict:
  """Returns the figures of all replays."""
  num_groups = NUM_ROWS // NUM_SAMPLES
  return {
    "batching": batching(*requests(), NUM_ROWS, PAGE_SIZES),
    "sampling": sampling(*samples(), num_groups, PAGE_SIZES),
    "beams": beams(*searches(), PAGE_SIZES),
  }


def samples() -> tuple[list[int], list[list[int]]]:
  """Returns the lengths of prompts, and of the samples of each prompt."""
  prompts, outputs = requests()
  num_prompts = len(outputs) // NUM_SAMPLES
  grouped = np.reshape(outputs[: num_prompts * NUM_SAMPLES], (num_prompts, -1))
  return prompts[:num_prompts], grouped.tolist()


def searches() -> tuple[list[int], list[list[list[int]]]]:
  """Returns the lengths of the prompts, and the parents of the beams."""
  record = json.loads((DATA / "beam_parents.json").read_text())
  return record["prompt_lens"], record["parents"]


def settings() -> dict:
  """Returns the description of each figure."""
  return dict(
    lengths="data/sharegpt_like_lengths.json",
    beams="data/beam_parents.json",
    num_rows=NUM_ROWS,
    num_samples=NUM_SAMPLES,
    buffer_len=BUFFER_LEN,
    waste_percent="slots without a token, of all slots taken, over all steps",
    requests_in_memory="live requests of mean size in num_rows * buffer_len",
    saved_percent="of the pages that sequences without sharing would use",
    saved_of_buffers_percent="of the slots of buffers of the final length",
    copied_tokens="copied to let beams go on, whole pages or whole beams",
  )


def batching(prompt_lens, output_lens, num_rows, page_sizes) -> dict:
  """Returns the figures of continuous batching."""
  args = prompt_lens, output_lens, num_rows
  buffers = count.contiguous(*args, BUFFER_LEN)
  memory = num_rows * BUFFER_LEN
  result: dict = {"num_requests": len(prompt_lens), "page_sizes": {}}
  for page_size in page_sizes:
    figures = checked("batching", *args, page_size)
    slots = figures["pages"] * page_size
    live_rows = int(figures["live_rows"].sum())
    result |= {"num_steps": len(slots), "mean_rows": live_rows / len(slots)}
    result["page_sizes"][str(page_size)] = {
      "waste_percent": percent(figures["waste"], slots),
      "mean_pages": float(figures["pages"].mean()),
      "peak_pages": int(figures["pages"].max()),
      "requests_in_memory": memory * live_rows // int(slots.sum()),
    }
  result["contiguous"] = {
    "waste_percent": percent(buffers["waste"], buffers["slots"]),
    "peak_slots": int(buffers["slots"].max()),
    "requests_in_memory": num_rows,
  }
  return result


def sampling(prompt_lens, output_lens, num_groups, page_sizes) -> dict:
  """Returns the figures of parallel sampling."""
  args = prompt_lens, output_lens, num_groups
  result: dict = {"num_prompts": len(prompt_lens), "page_sizes": {}}
  for page_size in page_sizes:
    figures = checked("sampling", *args, page_size)
    result["num_steps"] = len(figures["pages"])
    result["page_sizes"][str(page_size)] = sharing(figures)
  return result


def beams(prompt_lens, parents, page_sizes) -> dict:
  """Returns the figures of beam search."""
  buffers = count.contiguous_beams(prompt_lens, parents)
  result: dict = {"num_prompts": len(prompt_lens), "page_sizes": {}}
  for page_size in page_sizes:
    figures = checked("beams", prompt_lens, parents, page_size)
    slots = figures["pages"] * page_size
    result["num_steps"] = len(slots)
    result["page_sizes"][str(page_size)] = {
      **sharing(figures),
      "saved_of_buffers_percent": 100 - percent(slots, buffers["slots"]),
      "copied_tokens": int(figures["copied_tokens"].sum()),
    }
  result["contiguous"] = {
    "slots": int(buffers["slots"].max()),
    "copied_tokens": int(buffers["copied_tokens"].sum()),
  }
  return result


def checked(name: str, *args) -> count.Figures:
  """Returns the figures of a replay, compared with those of `count`.

  Args:
    name: Name of the function in `count` and `replay`.
    args: Arguments of both functions.

  Raises:
    RuntimeError: If the figures of any step differ.
  """
  counted = getattr(count, name)(*args)
  num_pages = int(counted["pages"].max())
  replayed = getattr(replay, name)(*args, num_pages)
  for key, values in counted.items():
    if not np.array_equal(replayed[key], values):
      raise RuntimeError(f"{name}: {key} differs from the count.")
  return replayed


def sharing(figures: count.Figures) -> dict:
  """Returns the savings by shared pages."""
  pages, unshared = figures["pages"], figures["unshared_pages"]
  return {
    "mean_pages": float(pages.mean()),
    "mean_pages_unshared": float(unshared.mean()),
    "saved_percent": 100 - percent(pages, unshared),
    "peak_pages": int(pages.max()),
    "peak_pages_unshared": int(unshared.max()),
  }


def percent(part: np.ndarray, whole: np.ndarray) -> float:
  """Returns the percentage of the whole that a part is, over all steps."""
  return 100 * int(part.sum()) / int(whole.sum())


if __name__ == "__main__":
  main()
