"""The free memory of a CPU, with control groups of both versions."""

import pytest

from paged_jax import devices

GB = 2**30


def _write(root, files):
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


V2 = {
  "proc/self/cgroup": "0::/outer/inner\n",
  "sys/fs/cgroup/outer/memory.max": f"{4 * GB}\n",
  "sys/fs/cgroup/outer/memory.current": f"{3 * GB}\n",
  "sys/fs/cgroup/outer/memory.stat": f"anon 7\ninactive_file {GB // 2}\n",
  "sys/fs/cgroup/outer/inner/memory.max": "max\n",
  "sys/fs/cgroup/outer/inner/memory.current": f"{GB}\n",
}
V1 = {
  "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
  "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GB}\n",
  "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GB}\n",
  "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
  "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GB}\n",
}


@pytest.mark.parametrize(
  ("files", "free"),
  [
    (V2, 3 * GB // 2),
    # The tightest of several limits.
    (V2 | {"sys/fs/cgroup/outer/inner/memory.max": f"{2 * GB}"}, GB),
    # A container whose own group is the top.
    (
      {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GB}",
        "sys/fs/cgroup/memory.current": f"{3 * GB}",
      },
      0,
    ),
    (V1, GB),
    # The path is that of the host, which the container does not see.
    (
      {
        "proc/self/cgroup": "4:memory:/docker/abc\n0::/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GB}",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10\n",
      },
      2 * GB + 10,
    ),
    ({"proc/self/cgroup": "0::/a\n"}, None),
    ({}, None),
  ],
)
def test_limits_of_the_container(tmp_path, files, free):
  _write(tmp_path, files)
  assert devices.free_of_container(tmp_path) == free


def test_free_memory_of_the_machine(tmp_path):
  assert devices.free_of_machine(tmp_path) is None
  _write(tmp_path, {"proc/meminfo": "MemFree: 1 kB\nMemAvailable: 12 kB\n"})
  assert devices.free_of_machine(tmp_path) == 12 * 1024


class _Device:
  platform = "cpu"

  def memory_stats(self):
    return None


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("machine", "container", "free"),
  [(5, 3, 3), (3, 5, 3), (None, 3, 3), (5, None, 5), (None, None, None)],
)
def test_a_cpu_has_the_least_of_both(monkeypatch, machine, container, free):
  monkeypatch.setattr(devices, "free_of_machine", lambda: machine)
  monkeypatch.setattr(devices, "free_of_container", lambda: container)
  assert devices.free_bytes(_Device()) == free
