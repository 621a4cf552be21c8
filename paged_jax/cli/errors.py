"""The one exception that ends a command without a traceback."""


class CommandError(Exception):
  """What the caller of the command got wrong, or can put right."""
