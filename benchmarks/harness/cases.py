"""The cases of a record, and which of them failed.

A case has figures, with its times as `us`, or an `error`. A record contains
cases at any depth.
"""

from collections.abc import Callable, Iterator


def attempt(measure: Callable[..., dict], *args, **options) -> dict:
  """Returns the figures of a case, or the first line of its error."""
  try:
    return measure(*args, **options)
  except Exception as error:
    line = (str(error).splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {line}"}


def walk(
  record: dict, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict]]:
  """Yields the path of each case, and its figures or its error."""
  if "error" in record or isinstance(record.get("us"), dict):
    yield path, record
    return
  for name, figures in record.items():
    if name != "settings" and isinstance(figures, dict):
      yield from walk(figures, (*path, name))


def failures(record: dict, *may_fail: str) -> list[str]:
  """Returns the names of failed cases, except those in `may_fail`."""
  return [
    ", ".join(path)
    for path, figures in walk(record)
    if "error" in figures and not (path and path[-1] in may_fail)
  ]
