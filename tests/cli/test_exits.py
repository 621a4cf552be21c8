"""The exit status and message of the `paged-jax` command when it fails."""

import os
import subprocess
import sys

import jax
import pytest
import tiny_gguf

from paged_jax import devices, generation
from paged_jax.checkpoints import demo, gguf
from paged_jax.cli import main

PROMPT = ["--prompt", "hello"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return str(tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def failing_stream(failure):
  def stream(*args, **kwargs):
    yield from ()
    raise failure

  return stream


def test_device_out_of_memory_is_one_line(model, capsys, monkeypatch):
  failure = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nof 2 GiB")
  monkeypatch.setattr(generation, "stream", failing_stream(failure))
  assert main(["generate", "--model", model, *PROMPT]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("paged-jax: error: out of device memory; ")
  assert err.endswith(": RESOURCE_EXHAUSTED: 3 GiB of 2 GiB\n")


@pytest.mark.parametrize(
  "bug", [ZeroDivisionError(), jax.errors.JaxRuntimeError("INTERNAL: oh")]
)
def test_a_bug_keeps_its_traceback(model, monkeypatch, bug):
  monkeypatch.setattr(generation, "stream", failing_stream(bug))
  with pytest.raises(type(bug)):
    main(["generate", "--model", model, *PROMPT])


def test_a_bug_in_the_loader_keeps_its_traceback(model, monkeypatch):
  monkeypatch.setattr(gguf, "load", lambda path: {}["weights"])
  with pytest.raises(KeyError):
    main(["generate", "--model", model, *PROMPT])


@pytest.mark.parametrize(
  "failure", [RuntimeError("No cuda."), AssertionError()]
)
def test_no_device_is_one_line(capsys, monkeypatch, failure):
  def default_device():
    raise failure

  monkeypatch.setattr(devices, "default_device", default_device)
  assert main(["info"]) == 2
  err = capsys.readouterr().err
  assert err.startswith("paged-jax: error: JAX_PLATFORMS=")
  assert err.rstrip().endswith(f": JAX finds no device. {failure}".rstrip())


def test_ctrl_c_is_quiet(capsys, monkeypatch):
  def resolve(model):
    raise KeyboardInterrupt

  monkeypatch.setattr(demo, "resolve", resolve)
  assert main(["generate", "--model", "demo", *PROMPT]) == 130
  assert capsys.readouterr() == ("", "")


def test_broken_pipe_is_quiet(capsys, monkeypatch):
  read, write = os.pipe()
  os.close(read)
  with open(write, "w") as stdout:
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["info"]) == 141
  assert capsys.readouterr().err == ""


@pytest.mark.skipif(
  not os.path.exists("/dev/full"), reason="Linux has a disk that is full"
)
def test_full_disk_behind_stdout_is_one_line(capsys, monkeypatch):
  with open("/dev/full", "w") as stdout:
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["info"]) == 2
  err = capsys.readouterr().err
  assert err == "paged-jax: error: stdout: no space left.\n"


def test_closed_streams_are_one_line(model, capsys, monkeypatch):
  argv = ["generate", "--model", model, "--prompts-file", "-"]
  monkeypatch.setattr(sys, "stdin", None)
  assert main(argv) == 2
  message = "argument --prompts-file: -: stdin is closed."
  assert capsys.readouterr().err == f"paged-jax: error: {message}\n"
  monkeypatch.setattr(sys, "stdout", None)
  assert main(["info"]) == 2
  assert capsys.readouterr().err == "paged-jax: error: stdout is closed.\n"


def test_process_exits_with_two_and_no_traceback():
  done = subprocess.run(
    [sys.executable, "-m", "paged_jax", "generate", "--model", "x", *PROMPT],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "paged-jax: error: argument --model: 'x' does not exist.\n"
  )
