"""The `paged-jax` command on valid input; see `test_errors` for errors."""

import io
import json
import sys

import jax
import pytest
import tiny_gguf
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

import paged_jax
from paged_jax import devices, generation
from paged_jax.checkpoints import gguf
from paged_jax.cli import main
from paged_jax.cli.timing import Timing, timed
from paged_jax.generation import CacheConfig, Completion, SamplingParams

# Six tokens each: all runs have one shape, so that it is compiled once.
PROMPT = ["--prompt", "abcdef"]
PROMPTS = [*PROMPT, "--prompt", "fedcba"]
SHAPE = ["--num-pages", "2", "--max-new-tokens", "9", "--ignore-eos"]
KEYS = ["prompt_token_ids", "token_ids", "text", "finish_reason", "timing"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return str(tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module")
def tokenizer(model):
  return gguf.load(model).tokenizer


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache_dir, monkeypatch):
  """Keeps the command's compiled programs apart from those of other tests."""
  monkeypatch.setenv("PAGED_JAX_CACHE", str(cache_dir))
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def usual_promotion():
  """Allows promotion: on a GPU, Flax's norms promote the bfloat16 model."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def command(model, capsys):
  """Runs `paged-jax generate` and returns its stdout."""

  def run(*argv):
    assert main(["generate", "--model", model, *SHAPE, *argv]) == 0
    return capsys.readouterr().out

  return run


@pytest.fixture
def objects(command):
  """Runs the command with `--json` and returns the objects."""

  def run(*argv):
    return [json.loads(line) for line in command("--json", *argv).splitlines()]

  return run


@pytest.fixture
def asked(monkeypatch):
  """Replaces the model by fixed answers; returns the recorded requests."""
  calls = []

  def stream(model, prompts, params, **options):
    calls.append({"prompts": prompts, "params": params, **options})
    yield [Completion(tuple(ids), (70,), "length", None) for ids in prompts]

  monkeypatch.setattr(generation, "stream", stream)
  return calls


def untimed(objects):
  return [{k: v for k, v in o.items() if k != "timing"} for o in objects]


def test_json_has_one_object_for_each_prompt_in_order(objects, tokenizer):
  found = objects(*PROMPTS)
  assert [list(o) for o in found] == [KEYS, KEYS]
  assert [o["prompt_token_ids"] for o in found] == [
    tokenizer.encode("abcdef"),
    tokenizer.encode("fedcba"),
  ]
  for o in found:
    assert len(o["token_ids"]) == 9
    assert o["text"] == tokenizer.decode(o["token_ids"])
    assert o["finish_reason"] == "length"
  assert found[0]["token_ids"] != found[1]["token_ids"]


def test_json_times_the_whole_batch(objects):
  found = objects(*PROMPTS)
  timing = found[0]["timing"]
  assert timing == found[1]["timing"]
  assert list(timing) == ["compile_s", "prefill_s", "decode_s", "tokens_per_s"]
  # 8 of the 9 tokens of each prompt are decoded; seconds are rounded.
  rate = 2 * 8 / timing["decode_s"]
  assert timing["tokens_per_s"] == pytest.approx(rate, rel=0.05)


@pytest.mark.slow
def test_logprobs_are_there_for_each_token_if_asked_for(objects):
  (found,) = objects(*PROMPT, "--logprobs")
  assert list(found) == [*KEYS[:-1], "logprobs", "timing"]
  assert len(found["logprobs"]) == len(found["token_ids"])
  assert all(p <= 0 for p in found["logprobs"])


def test_greedy_runs_are_equal(objects):
  assert untimed(objects(*PROMPTS)) == untimed(objects(*PROMPTS))


@pytest.mark.slow
def test_streamed_text_equals_that_of_json(command, objects):
  (found,) = objects(*PROMPT)
  assert command(*PROMPT) == found["text"] + "\n"


def test_batch_text_equals_that_of_json_and_follows_its_prompt(
  command, objects
):
  first, second = objects(*PROMPTS)
  assert command(*PROMPTS) == (
    "=== prompt 1 of 2 ===\nabcdef\n"
    "--- completion 1: 9 tokens, finish reason: length ---\n"
    f"{first['text']}\n\n"
    "=== prompt 2 of 2 ===\nfedcba\n"
    "--- completion 2: 9 tokens, finish reason: length ---\n"
    f"{second['text']}\n\n"
  )


def test_summary_is_on_stderr(model, capsys):
  assert main(["generate", "--model", model, *PROMPT, *SHAPE]) == 0
  line = capsys.readouterr().err
  assert line.startswith("paged-jax: 9 tokens, finish reason: length, ")
  assert line.endswith(" tokens/s\n")


def test_stop_token_ends_a_reply_unless_ignored(objects, capsys, tmp_path):
  (ignored,) = objects(*PROMPT)
  stop = ignored["token_ids"][4]
  values = tiny_gguf.metadata({"tokenizer.ggml.eos_token_id": stop})
  path = str(tiny_gguf.write(tmp_path / "stops.gguf", values))
  argv = ["generate", "--model", path, *PROMPT, *SHAPE[:-1], "--json"]
  assert main(argv) == 0
  found = json.loads(capsys.readouterr().out)
  # <|im_end|> is an end by its name.
  stops = stop, tiny_gguf.TOKENS.index("<|im_end|>")
  end = min(i for i, t in enumerate(ignored["token_ids"]) if t in stops) + 1
  assert found["token_ids"] == ignored["token_ids"][:end]
  assert found["finish_reason"] == "stop"


@pytest.mark.slow
def test_prompt_i_has_seed_s_plus_i(objects):
  sampled = [*PROMPT, "--temperature", "1.5"]
  batch = objects(*sampled, *PROMPT, "--seed", "5")
  (alone,) = objects(*sampled, "--seed", "6")
  assert batch[0]["token_ids"] != batch[1]["token_ids"]
  assert batch[1]["token_ids"] == alone["token_ids"]


def test_running_out_of_pages_is_a_finish_reason(objects):
  # Two pages of 16: room for one prompt of 6 and its 16 new tokens.
  first, second = objects(*PROMPTS, "--max-new-tokens", "16")
  assert first["finish_reason"] == "length"
  assert len(first["token_ids"]) == 16
  assert second["finish_reason"] == "out_of_pages"
  assert 0 < len(second["token_ids"]) < 16


@pytest.mark.slow
def test_compiled_programs_are_kept(objects, cache_dir):
  objects(*PROMPT)
  events = []
  listen = lambda event, **_: events.append(event)
  jax.clear_caches()
  monitoring.register_event_listener(listen)
  objects(*PROMPT)
  monitoring.unregister_event_listener(listen)
  assert "/jax/compilation_cache/cache_hits" in events
  assert list((cache_dir / "compiled").iterdir())


def test_options_reach_the_generation(asked, model):
  argv = ["--page-size", "8", "--num-pages", "4", "--max-len", "32"]
  argv += ["--prefill-chunk", "3", "--max-new-tokens", "5", "--seed", "7"]
  argv += ["--temperature", "0.5", "--top-k", "6", "--top-p", "0.7"]
  argv += ["--kv-dtype", "int8"]
  argv += ["--min-p", "0.1", "--json", "--logprobs", *PROMPTS]
  assert main(["generate", "--model", model, *argv]) == 0
  (call,) = asked
  assert call["cache"] == CacheConfig(
    page_size=8, num_pages=4, max_len=32, dtype="int8", prefill_chunk=3
  )
  assert call["with_logprobs"]
  assert call["params"] == [
    SamplingParams(
      max_new_tokens=5,
      temperature=0.5,
      top_k=6,
      top_p=0.7,
      min_p=0.1,
      seed=seed,
      stop_token_ids=(2,),
    )
    for seed in (7, 8)
  ]


@pytest.mark.usefixtures("asked")
def test_prompts_file_follows_the_prompts(objects, tokenizer, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_bytes("\ufeffhello\u2028wo\r\nhe".encode())
  found = objects("--prompts-file", str(path), "--prompt", "123")
  assert [o["prompt_token_ids"] for o in found] == [
    tokenizer.encode(text) for text in ("123", "hello\u2028wo", "he")
  ]


@pytest.mark.usefixtures("asked")
def test_prompts_file_may_be_stdin(objects, monkeypatch, tokenizer):
  stdin = io.TextIOWrapper(io.BytesIO(b"hello\nhello wo\n"))
  monkeypatch.setattr(sys, "stdin", stdin)
  found = objects("--prompts-file", "-")
  assert [o["prompt_token_ids"] for o in found] == [
    tokenizer.encode(text) for text in ("hello", "hello wo")
  ]


@pytest.mark.usefixtures("asked")
def test_chat_puts_the_prompt_into_the_template(objects, tokenizer):
  (found,) = objects("--chat", "--prompt", "hello")
  text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
  assert found["prompt_token_ids"] == tokenizer.encode(text)


def test_info_says_which_attention_runs_here(capsys, cache_dir):
  assert main(["info"]) == 0
  lines = dict(
    line.split(": ", 1) for line in capsys.readouterr().out.splitlines()
  )
  on_hopper = devices.why_not_hopper() is None
  assert lines["decode attention"].startswith(
    "mosaic_gpu, since" if on_hopper else "xla, since"
  )
  assert lines["prefill attention"].endswith(".")
  assert lines["paged-jax"] == paged_jax.__version__
  assert lines["jax"] == jax.__version__
  assert lines["cache folder"] == str(cache_dir)
  assert lines["demo model"] == "not downloaded yet"


def test_version_is_printed(capsys):
  with pytest.raises(SystemExit) as end:
    main(["--version"])
  assert end.value.code == 0
  assert capsys.readouterr().out == f"paged-jax {paged_jax.__version__}\n"


def test_compile_time_counts_nested_functions_once():
  def steps():
    for start, end in ((0.0, 10.0), (2.0, 3.0), (20.0, 21.0)):
      monitoring.record_event_time_span(
        "/jax/core/compile/jaxpr_trace_duration", start, end
      )
    yield [Completion((1,), (2,), None, None)]
    yield [Completion((1,), (2, 3, 4), "length", None)]

  (_, first), (completions, last) = timed(steps())
  assert first == Timing(compile_s=11.0, prefill_s=0.0, decode_s=0.0)
  assert last.compile_s == 11.0
  assert last.decode_s > 0
  assert last.tokens_per_s(completions) == 2 / last.decode_s


def test_a_batch_that_decoded_nothing_has_no_rate():
  only_prefill = [Completion((1,), (2,), "stop", None)]
  assert Timing(decode_s=1.0).tokens_per_s(only_prefill) is None


@pytest.mark.slow
@pytest.mark.model
def test_the_demo_model_answers(capsys, monkeypatch, demo_path):
  monkeypatch.setenv("PAGED_JAX_CACHE", str(demo_path.parent))
  question = "What is the capital of France?"
  argv = ["generate", "--model", "demo", "--chat", "--prompt", question]
  assert main([*argv, "--max-new-tokens", "16", "--dtype", "float32"]) == 0
  assert "Paris" in capsys.readouterr().out
