"""The `paged-jax` command: exit codes and errors, as a shell expects them."""

import errno
import os
import sys
from collections.abc import Sequence

from paged_jax.cli import arguments, generate, info
from paged_jax.cli.errors import CommandError

_BAD_INPUT = 2
_INTERRUPTED = 130  # 128 + SIGINT
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: Arguments, without the program name; `sys.argv[1:]` if None.

  Returns:
    The exit code: 0 for success; 2 for bad input, with one line on stderr, or
    if stdout is redirected to a full disk; 130 after Ctrl-C; 141 if the reader
    of stdout has gone.

  Raises:
    SystemExit: After `--help` and `--version`.
  """
  if sys.stdout is None:  # it was closed before the start
    print("paged-jax: error: stdout is closed.", file=sys.stderr)
    return _BAD_INPUT
  try:
    try:
      _dispatch(argv)
    finally:
      sys.stdout.flush()
  except CommandError as error:
    line = " ".join(str(error).splitlines())
    print(f"paged-jax: error: {line}", file=sys.stderr)
    return _BAD_INPUT
  except KeyboardInterrupt:
    return _INTERRUPTED
  except BrokenPipeError:
    _drop_stdout()
    return _BROKEN_PIPE
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    _drop_stdout()
    print("paged-jax: error: stdout: no space left.", file=sys.stderr)
    return _BAD_INPUT
  return 0


def _drop_stdout() -> None:
  """Discards buffered output, so that the flush at exit cannot fail."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: Sequence[str] | None) -> None:
  args = arguments.parser().parse_args(argv)
  commands = {"generate": generate.run, "info": info.run}
  commands[args.command](args)
