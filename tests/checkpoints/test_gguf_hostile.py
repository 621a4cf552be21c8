"""Files that lie about sizes are refused at little cost."""

import struct
import subprocess
import sys
import time

import pytest
import tiny_gguf

from paged_jax.checkpoints import gguf
from paged_jax.checkpoints.metadata import ModelFileError

HEADER = b"GGUF" + struct.pack("<I", 3)
STRING, ARRAY, U8 = 8, 9, 0


def _string(text, size=None):
  data = text.encode()
  return struct.pack("<Q", len(data) if size is None else size) + data


def _file(*pairs, num_tensors=0, num_keys=None, rest=b""):
  """Returns a file of keys and bytes of values."""
  keys = b"".join(_string(key) + value for key, value in pairs)
  count = len(pairs) if num_keys is None else num_keys
  return HEADER + struct.pack("<QQ", num_tensors, count) + keys + rest


def _array(kind, count, data=b""):
  return struct.pack("<IIQ", ARRAY, kind, count) + data


def _tensor(name="a", dims=(4,), kind=0, offset=0):
  sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
  return _string(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = (2**31, 2**40, 2**63, 2**64 - 1)
LIES = {
  "keys": [_file(num_keys=n) for n in (70_000, *HUGE)],
  "tensors": [_file(num_tensors=n) for n in (70_000, *HUGE)],
  "size of a key": [_file(num_keys=1, rest=_string("a", n)) for n in HUGE],
  "size of a string": [
    _file(("a", struct.pack("<I", STRING) + _string("b", n))) for n in HUGE
  ],
  "numbers": [_file(("a", _array(U8, n, bytes(100)))) for n in HUGE],
  "strings": [_file(("a", _array(STRING, n, bytes(800)))) for n in HUGE],
  "size of an element": [
    _file(("a", _array(STRING, 2, _string("") + _string("b", n)))) for n in HUGE
  ],
  "many strings": [_file(("a", _array(STRING, 2**23, bytes(2**26))))],
  "axes": [_file(num_tensors=1, rest=_tensor(dims=(1,) * 9))],
  "sizes of axes": [
    _file(num_tensors=1, rest=_tensor(dims=(n, n)) + bytes(99)) for n in HUGE
  ],
  "offset": [
    _file(num_tensors=1, rest=_tensor(offset=n) + bytes(99)) for n in HUGE
  ],
  "type": [_file(num_tensors=1, rest=_tensor(kind=n)) for n in (4, 2**32 - 1)],
  "type of a value": [_file(("a", struct.pack("<I", n))) for n in (13, 2**31)],
  "twice": [_file(*[("a", struct.pack("<IB", U8, 1))] * 2)],
  "alignment": [
    _file(("general.alignment", struct.pack("<II", 4, n))) for n in (0, 24)
  ],
  "not UTF-8": [_file(num_keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe")],
}


@pytest.mark.parametrize("contents", LIES.values(), ids=LIES)
def test_a_lie_is_refused(tmp_path, contents):
  path = tmp_path / "lie.gguf"
  for content in contents:
    path.write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(ModelFileError, match=f"^{path}: "):
      gguf.load(path)
    assert time.perf_counter() - begin < 2


def test_layers_that_the_file_lacks_cost_nothing(tmp_path):
  changes = {"llama.block_count": 10**6}
  path = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.metadata(changes))
  begin = time.perf_counter()
  with pytest.raises(ModelFileError, match=r"'blk\.2\.attn_norm.weight'"):
    gguf.load(path)
  assert time.perf_counter() - begin < 2


def test_a_lie_costs_little_memory(tmp_path):
  # A process of its own, whose memory nothing else has raised.
  path = tmp_path / "lie.gguf"
  code = (
    "import resource, sys\n"
    "from paged_jax.checkpoints import gguf\n"
    "gguf.import_demo('gguf')\n"
    "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "before = peak()\n"
    "try: gguf.load(sys.argv[1])\n"
    "except ValueError: pass\n"
    "print(peak() - before)\n"
  )
  # As many strings as are allowed; refused for want of an architecture.
  strings = _file(("a", _array(STRING, 2**22, bytes(2**25))))
  for content in (strings, LIES["many strings"][0], LIES["numbers"][1]):
    path.write_bytes(content)
    done = subprocess.run(
      [sys.executable, "-c", code, path],
      check=True,
      capture_output=True,
      text=True,
    )
    assert int(done.stdout) * 1024 < 2**26 + 2 * len(content)
