"""Memory that pages waste and save, in docs/performance.md."""

from benchmarks.harness.markdown import (
  origin,
  picture,
  read,
  section,
  table,
)


def waste() -> str:
  """Returns the section on waste and savings over the page size."""
  record = read("cpu/waste")
  settings, batching = record["settings"], record["batching"]
  buffers = batching["contiguous"]["waste_percent"]
  saved = [record[name]["page_sizes"] for name in ("sampling", "beams")]
  rows = []
  for size, figures in batching["page_sizes"].items():
    percents = [x[size]["saved_percent"] for x in saved]
    percents.insert(0, figures["waste_percent"])
    rows.append([size, *(f"{value:.1f} %" for value in percents)])
  return section(
    "Memory that pages waste and save",
    f"""Replays of the page table: {batching["num_requests"]:,} requests with
    lengths like those of ShareGPT conversations, batched continuously in
    {settings["num_rows"]} rows; {settings["num_samples"]} samples of each
    prompt, which share its pages; and beam searches of width 4, recorded on the
    demo model. Buffers of {settings["buffer_len"]:,} tokens a row would leave
    {buffers:.1f} % of the slots of the same requests empty. An independent
    count agrees with the page table in every step.""",
    table(
      ["page size", "slots left empty", "saved by samples", "saved by beams"],
      rows,
    ),
    picture("cpu/waste", "Waste and savings over the page size"),
    origin("cpu/waste", "benchmarks.waste"),
  )
