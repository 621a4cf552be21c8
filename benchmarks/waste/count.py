"""Counts the pages that the replays should use, from lengths alone.

Does not import paged_jax, and has no rows, free pages or copies: a sequence of
`n` tokens takes `ceil(n / page_size)` pages, and two sequences share a page as
long as it holds the same tokens of both. Every function returns figures with
one number for each step, like the function of the same name in `replay`.
"""

import heapq
from collections.abc import Sequence

import numpy as np

Figures = dict[str, np.ndarray]  # i64[num_steps] by name


def batching(
  prompt_lens: Sequence[int],
  output_lens: Sequence[int],
  num_rows: int,
  page_size: int,
) -> Figures:
  """Counts continuous batching.

  A request takes the first free row, and stores its prompt in one step. It then
  grows by one token per step. Its last token is not stored, because nothing
  reads it, so a request lives for as many steps as it has output tokens.

  Args:
    prompt_lens: Prompt lengths of the requests, in order of arrival.
    output_lens: Output lengths of the requests.
    num_rows: Requests that can be live at once.
    page_size: Tokens a page holds.

  Returns:
    `live_rows`, `pages`, and `waste`: slots without a token.
  """
  starts = _starts(output_lens, num_rows)
  figures = _zeros(starts, output_lens, "live_rows", "pages", "waste")
  for start, prompt, output in zip(
    starts, prompt_lens, output_lens, strict=True
  ):
    lens = prompt + np.arange(output)
    pages = -(-lens // page_size)
    steps = slice(start, start + output)
    figures["live_rows"][steps] += 1
    figures["pages"][steps] += pages
    figures["waste"][steps] += pages * page_size - lens
  return figures


def contiguous(
  prompt_lens: Sequence[int],
  output_lens: Sequence[int],
  num_rows: int,
  buffer_len: int,
) -> Figures:
  """Counts the same batching with buffers instead of pages.

  A request keeps its buffer while it lives. A request that is longer than a
  buffer takes as many as it needs.
  """
  starts = _starts(output_lens, num_rows)
  figures = _zeros(starts, output_lens, "slots", "waste")
  for start, prompt, output in zip(
    starts, prompt_lens, output_lens, strict=True
  ):
    slots = -(-(prompt + output - 1) // buffer_len) * buffer_len
    steps = slice(start, start + output)
    figures["slots"][steps] += slots
    figures["waste"][steps] += slots - (prompt + np.arange(output))
  return figures


def sampling(
  prompt_lens: Sequence[int],
  output_lens: Sequence[Sequence[int]],
  num_groups: int,
  page_size: int,
) -> Figures:
  """Counts parallel sampling: several outputs of one prompt, side by side.

  A prompt starts when all samples of an earlier prompt have ended. In its first
  step, its samples share all pages. From the second step on, they share the
  pages that the prompt fills.

  Args:
    prompt_lens: Lengths of the prompts, in order of arrival.
    output_lens: Output lengths of the samples of each prompt.
    num_groups: Prompts that can be live at once.
    page_size: Tokens a page holds.

  Returns:
    `pages`, and `unshared_pages`: the pages without sharing.
  """
  longest = [max(each) for each in output_lens]
  starts = _starts(longest, num_groups)
  figures = _zeros(starts, longest, "pages", "unshared_pages")
  for start, prompt, outputs in zip(
    starts, prompt_lens, output_lens, strict=True
  ):
    shared = prompt // page_size
    for step in range(max(outputs)):
      num_live = sum(output > step for output in outputs)
      each = -(-(prompt + step) // page_size)
      pages = shared + num_live * (each - shared) if step else each
      figures["pages"][start + step] += pages
      figures["unshared_pages"][start + step] += num_live * each
  return figures


def beams(
  prompt_lens: Sequence[int],
  parents: Sequence[Sequence[Sequence[int]]],
  page_size: int,
) -> Figures:
  """Counts beam searches that run side by side.

  Two beams share a page if their last tokens in it are the same: from the same
  beam of the same step.

  Args:
    prompt_lens: Lengths of the prompts.
    parents: Parent beam in the previous step, by prompt, step and beam.
    page_size: Tokens a page holds.

  Returns:
    `pages`; `unshared_pages`: the pages without sharing; and `copied_tokens`:
    slots of the pages that are copied before a write.
  """
  names = ("pages", "unshared_pages", "copied_tokens")
  figures = {name: np.zeros(len(parents[0]), np.int64) for name in names}
  for prompt, steps in zip(prompt_lens, parents, strict=True):
    paths = [[-1] * prompt for _ in steps[0]]  # writer of each token
    for step, froms in enumerate(steps):
      length = prompt + step
      paths = [[*paths[old], beam] for beam, old in enumerate(froms)]
      ends = [*range(page_size - 1, length, page_size), length]
      used = {(end, path[end]) for path in paths for end in ends}
      figures["pages"][step] += len(used)
      figures["unshared_pages"][step] += len(paths) * len(ends)
      if length % page_size:
        num_copies = len(froms) - len(set(froms))
        figures["copied_tokens"][step] += num_copies * page_size
  return figures


def contiguous_beams(
  prompt_lens: Sequence[int], parents: Sequence[Sequence[Sequence[int]]]
) -> Figures:
  """Counts beam searches with a buffer of its final length for each beam.

  A beam that does not continue in its own buffer is copied whole.

  Returns:
    `slots` and `copied_tokens`.
  """
  num_steps = len(parents[0])
  slots, copied = np.zeros((2, num_steps), np.int64)
  for prompt, steps in zip(prompt_lens, parents, strict=True):
    slots += len(steps[0]) * (prompt + num_steps)
    for step, froms in enumerate(steps):
      num_moved = sum(beam != old for beam, old in enumerate(froms))
      copied[step] += num_moved * (prompt + step)
  return {"slots": slots, "copied_tokens": copied}


def _starts(durations: Sequence[int], num_places: int) -> list[int]:
  """Returns the step at which each job starts, first come, first served."""
  free_at = [0] * num_places
  starts = []
  for duration in durations:
    starts.append(heapq.heappop(free_at))
    heapq.heappush(free_at, starts[-1] + duration)
  return starts


def _zeros(
  starts: Sequence[int], durations: Sequence[int], *names: str
) -> Figures:
  ends = [s + d for s, d in zip(starts, durations, strict=True)]
  return {name: np.zeros(max(ends), np.int64) for name in names}
