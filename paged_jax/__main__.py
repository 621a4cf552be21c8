"""Lets `python -m paged_jax` stand for the `paged-jax` command."""

import sys

from paged_jax.cli import main

if __name__ == "__main__":
  sys.exit(main())
