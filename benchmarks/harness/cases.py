"""What was timed, and what failed, by the names in a record.

A case has figures, with its times as `us`, or an `error`; a record holds cases
at any depth.
"""

from collections.abc import Callable, Iterator


def attempt(part: Callable[..., dict], *args, **options) -> dict:
  """Returns the figures of a part, or the first line of its error."""
  try:
    return part(*args, **options)
  except Exception as error:
    line = (str(error).splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {line}"}


def walk(
  record: dict, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict]]:
  """Yields the path and the figures, or the error, of everything timed."""
  if "error" in record or isinstance(record.get("us"), dict):
    yield path, record
    return
  for name, side in record.items():
    if name != "settings" and isinstance(side, dict):
      yield from walk(side, (*path, name))


def failures(record: dict, *may_fail: str) -> list[str]:
  """Returns what has no figures, but for cases of the names that may fail."""
  return [
    ", ".join(path)
    for path, side in walk(record)
    if "error" in side and not (path and path[-1] in may_fail)
  ]
