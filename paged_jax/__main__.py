"""Runs the `paged-jax` command with `python -m paged_jax`."""

import sys

from paged_jax.cli import main

if __name__ == "__main__":
  sys.exit(main())
