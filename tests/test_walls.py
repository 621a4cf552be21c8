"""Packages import downwards only.

Imports are read from the source, including those inside functions and under
`TYPE_CHECKING`.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Packages and top-level modules of `paged_jax`, lowest first. Each may import
# those listed before it. A new one must be added here.
PACKAGES = (
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
# For some packages, the only ones that they may import.
ALLOWED = {
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
# (package, imported package) -> the only modules that may be imported.
ONLY_MODULES = {("generation", "models"): {"paged_jax.models.contract"}}
# Packages of `pallas_kernels`, and the other packages that each may import.
KERNEL_PACKAGES = {
  "__init__": set(),
  "common": set(),
  "decode": {"common"},
  "ragged": {"common"},
  "pages": {"common"},
}
# In the docstring of each module that must not import Pallas.
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
def _own_modules():
  """Returns the names of all modules of `paged_jax` and `pallas_kernels`."""
  return _modules("paged_jax").keys() | _modules("pallas_kernels").keys()


def _imported(nodes):
  """Returns the modules that the nodes import, without names from modules."""
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      for alias in node.names:
        # The alias is a module of a package or a name from a module. Other
        # libraries are not looked up: an extra name there does no harm.
        whole = f"{node.module}.{alias.name}"
        is_name = node.module in _own_modules() and whole not in _own_modules()
        found.add(node.module if is_name else whole)
  return found


def _imports(package):
  """Returns all pairs (module, imported module), imports in functions too."""
  return [
    (name, target)
    for name, tree in _modules(package).items()
    for target in sorted(_imported(ast.walk(tree)))
  ]


def _is_in(name, package):
  return name == package or name.startswith(f"{package}.")


def _package_of(name):
  """Returns the folder, or top-level file, to which a module belongs."""
  return (*name.split("."), "__init__")[1]


def _outside_functions(tree):
  """Yields the nodes that run when a module is imported."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node
      yield from _outside_functions(node)


def _imports_on_import(package):
  """Returns, by module, the modules that are imported along with it."""
  return {
    name: _imported(_outside_functions(tree))
    for name, tree in _modules(package).items()
  }


def _within(package):
  """Returns pairs (module, imported module) in which both are in `package`."""
  return [pair for pair in _imports(package) if _is_in(pair[1], package)]


def test_every_package_is_listed():
  found = {
    root: {_package_of(name) for name in _modules(root)}
    for root in ("paged_jax", "pallas_kernels")
  }
  assert found["paged_jax"] <= set(PACKAGES)
  assert found["pallas_kernels"] == KERNEL_PACKAGES.keys()


def test_packages_import_downwards_only():
  wrong = []
  for name, target in _within("paged_jax"):
    package, other = _package_of(name), _package_of(target)
    below = set(PACKAGES[: PACKAGES.index(package)])
    if other not in {package} | ALLOWED.get(package, below) & below:
      wrong.append((name, target))
  assert not wrong


def test_generation_imports_only_the_contract_of_models():
  assert not [
    (name, target)
    for name, target in _within("paged_jax")
    for packages, modules in ONLY_MODULES.items()
    if (_package_of(name), _package_of(target)) == packages
    and target not in modules
  ]


def test_kernel_packages_import_common_and_not_each_other():
  assert not [
    (name, target)
    for name, target in _within("pallas_kernels")
    if _package_of(target)
    not in {_package_of(name)} | KERNEL_PACKAGES[_package_of(name)]
  ]


def test_kernels_import_neither_paged_jax_nor_flax():
  above = ("paged_jax", "flax")
  assert not [
    (name, target)
    for name, target in _imports("pallas_kernels")
    if any(_is_in(target, package) for package in above)
  ]


def test_nothing_imports_tests_benchmarks_or_examples():
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
  """Returns the kernel modules whose docstring says `NO_PALLAS`."""
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


def test_other_kernel_modules_are_imported_on_first_use():
  assert not [
    (name, target)
    for name, targets in _imports_on_import("paged_jax").items()
    for target in targets - _plain_kernel_modules()
    if any(_is_in(target, x) for x in (*PALLAS, "pallas_kernels"))
  ]


def test_no_modules_import_each_other():
  graph = _imports_on_import("paged_jax") | _imports_on_import("pallas_kernels")
  graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError
