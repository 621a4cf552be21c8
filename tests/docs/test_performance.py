"""docs/performance.md and the tables in other files match the results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import markdown
from benchmarks.harness.results import RESULTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_that_of_the_results():
  assert report.page() == PAGE, "run `make report`"


@pytest.mark.parametrize(
  ("path", "name", "block"),
  report.blocks(),
  ids=[name for _, name, _ in report.blocks()],
)
def test_tables_in_other_files_are_those_of_the_results(path, name, block):
  text = path.read_text(encoding="utf-8")
  assert report.with_block(text, name, block) == text, "run `make report`"


def test_every_result_is_named_and_every_name_is_a_file():
  results = {str(path.relative_to(ROOT)) for path in RESULTS.glob("*/*.json")}
  named = set(re.findall(r"benchmarks/results/[\w./]+\w", PAGE))
  assert results <= named
  named |= set(re.findall(r"benchmarks/results/[\w./]+\w", README))
  assert not [name for name in named if not (ROOT / name).exists()]


def test_links_lead_to_files():
  targets = re.findall(r"\]\(([^)]+)\)", PAGE)
  assert len(targets) > len(report.SUBJECTS)
  assert not [x for x in targets if not (ROOT / "docs" / x).exists()]


def test_a_new_result_is_named_before_it_has_a_section(tmp_path, monkeypatch):
  (tmp_path / "h200").mkdir()
  (tmp_path / "h200" / "new.json").write_text("{}")
  monkeypatch.setattr(report, "RESULTS", tmp_path)
  assert "benchmarks/results/h200/new.json" in report.others(PAGE)


def test_a_file_has_one_place_for_a_table():
  with pytest.raises(ValueError, match="2 blocks"):
    report.with_block(README + README, "speed", "")


def test_the_report_needs_no_package():
  # -I -S: neither installed packages nor the current folder, so no JAX.
  code = "import sys; sys.path.insert(0, '.'); from benchmarks import report"
  run = [sys.executable, "-I", "-S", "-c", f"{code}; report.page()"]
  subprocess.run(run, cwd=ROOT, check=True)


def test_numbers_have_three_digits():
  values = (0.5, 9.994, 9.996, 99.94, 99.96, 1234.5, None)
  shown = ["0.50", "9.99", "10.0", "99.9", "100", "1,234", "-"]
  assert [markdown.number(value) for value in values] == shown


def test_code_is_not_broken_over_lines():
  text = markdown.paragraph("word " * 15 + "`python -m benchmarks.decode` word")
  assert "`python -m benchmarks.decode`" in text
  assert max(map(len, text.splitlines())) <= 80
