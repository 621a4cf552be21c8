"""What may import what: arrows between the rooms of the house go down only.

Imports are read from the source, those inside functions and under
`TYPE_CHECKING` included.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a room imports those before it. A new room goes here.
LIBRARY = (
  "typing",
  "extras",
  "devices",
  "dispatch",
  "page_table",
  "kv",
  "ops",
  "nn",
  "models",
  "text",
  "checkpoints",
  "sampling",
  "generation",
  "parallel",
  "serving",
  "draw",
  "__init__",
  "cli",
  "__main__",
)
# Rooms that import fewer of those before them.
FEWER = {
  "dispatch": {"devices"},
  "page_table": {"typing"},
  "models": {"typing", "kv", "ops", "nn"},
  "text": {"extras"},
  "checkpoints": {"extras", "models", "text"},
  "sampling": {"typing"},
  "generation": {
    "typing",
    "devices",
    "dispatch",
    "page_table",
    "kv",
    "models",
    "sampling",
  },
}
# Of a room, all that another imports.
DOORS = {("generation", "models"): {"paged_jax.models.contract"}}
# Rooms of the kernels, and those that each imports besides itself.
KERNELS = {
  "__init__": set(),
  "common": set(),
  "decode": {"common"},
  "ragged": {"common"},
  "pages": {"common"},
}
# Says so in the docstring of a module.
NO_PALLAS = "Imports no Pallas"
PALLAS = (
  "jax.experimental.pallas",
  "jax.experimental.mosaic",
  "jaxlib.mlir",
  "jaxlib.mosaic",
)


def _name(path):
  """Returns the name of the module in a file."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _modules(package):
  """Returns the syntax trees of a package's modules, by name."""
  files = sorted((ROOT / package).rglob("*.py"))
  return {_name(path): ast.parse(path.read_text("utf-8")) for path in files}


@functools.cache
def _ours():
  """Returns the names of all modules of both packages."""
  return _modules("paged_jax").keys() | _modules("pallas_kernels").keys()


def _imported(nodes):
  """Returns the modules that statements import; not the names in them."""
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      for alias in node.names:
        # A module of a package, or a name in a module. Of other packages, this
        # is not known; one name too many does no harm.
        whole = f"{node.module}.{alias.name}"
        is_name = node.module in _ours() and whole not in _ours()
        found.add(node.module if is_name else whole)
  return found


def _imports(package):
  """Returns pairs (module, what it imports), wherever in the module."""
  return [
    (name, target)
    for name, tree in _modules(package).items()
    for target in sorted(_imported(ast.walk(tree)))
  ]


def _is_in(name, package):
  return name == package or name.startswith(f"{package}.")


def _room(name):
  """Returns the room of a module: its folder or file in the package."""
  return (*name.split("."), "__init__")[1]


def _outside_functions(tree):
  """Yields the nodes that run when a module is imported."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node
      yield from _outside_functions(node)


def _imports_at_once(package):
  """Returns what each module imports when it is imported."""
  return {
    name: _imported(_outside_functions(tree))
    for name, tree in _modules(package).items()
  }


def _within(package):
  """Returns pairs (module, what it imports of its own package)."""
  return [pair for pair in _imports(package) if _is_in(pair[1], package)]


def test_every_room_has_its_place():
  found = {
    package: {_room(name) for name in _modules(package)}
    for package in ("paged_jax", "pallas_kernels")
  }
  assert found["paged_jax"] <= set(LIBRARY)
  assert found["pallas_kernels"] == KERNELS.keys()


def test_no_room_of_the_library_imports_one_above():
  wrong = []
  for name, target in _within("paged_jax"):
    room, other = _room(name), _room(target)
    below = set(LIBRARY[: LIBRARY.index(room)])
    if other not in {room} | FEWER.get(room, below) & below:
      wrong.append((name, target))
  assert not wrong


def test_rooms_with_a_door_are_entered_by_it():
  assert not [
    (name, target)
    for name, target in _within("paged_jax")
    for (room, other), doors in DOORS.items()
    if (_room(name), _room(target)) == (room, other) and target not in doors
  ]


def test_kernels_import_what_they_share_and_not_each_other():
  assert not [
    (name, target)
    for name, target in _within("pallas_kernels")
    if _room(target) not in {_room(name)} | KERNELS[_room(name)]
  ]


def test_kernels_know_arrays_only():
  above = ("paged_jax", "flax")
  assert not [
    (name, target)
    for name, target in _imports("pallas_kernels")
    if any(_is_in(target, package) for package in above)
  ]


def test_nobody_imports_tests_benchmarks_or_examples():
  helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
  own = {"benchmarks": {"benchmarks"}}
  private = {"tests", "oracle", "benchmarks", "examples", *helpers}
  assert not [
    (name, target)
    for package in ("paged_jax", "pallas_kernels", "benchmarks", "examples")
    for name, target in _imports(package)
    if target.split(".")[0] in private - own.get(package, set())
  ]


def _plain_kernel_modules():
  """Returns the modules of the kernels that say that they import no Pallas."""
  return {
    name
    for name, tree in _modules("pallas_kernels").items()
    if NO_PALLAS in (ast.get_docstring(tree) or "")
  }


@pytest.mark.parametrize("name", sorted(_plain_kernel_modules()))
def test_modules_that_say_so_import_no_pallas(name):
  tree = _modules("pallas_kernels")[name]
  imported = _imported(ast.walk(tree))
  assert not [
    target
    for target in imported
    if any(_is_in(target, pallas) for pallas in PALLAS)
  ]
  ours = {x for x in imported if _is_in(x, "pallas_kernels")}
  assert ours <= _plain_kernel_modules()


def test_the_library_imports_other_modules_of_kernels_on_first_use():
  assert not [
    (name, target)
    for name, targets in _imports_at_once("paged_jax").items()
    for target in targets - _plain_kernel_modules()
    if any(_is_in(target, x) for x in (*PALLAS, "pallas_kernels"))
  ]


def test_no_modules_import_each_other():
  graph = _imports_at_once("paged_jax") | _imports_at_once("pallas_kernels")
  graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError
