import re
from pathlib import Path

import paged_jax

TEXT = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_first_entry_is_of_this_version():
  (first, *_) = re.findall(r"^## (.*)$", TEXT, re.M)
  assert first == paged_jax.__version__
