"""The exception that ends a command without a traceback."""


class CommandError(Exception):
  """An error that the user of the command can fix."""
