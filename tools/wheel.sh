#!/usr/bin/env bash
# Builds the wheel, by way of the sdist, and tries it in a bare virtual
# environment, outside this folder: the documents' examples, the command, the
# types of examples/*.py. Needs .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cpu
# Most of the time goes into compiling programs that run once.
export XLA_FLAGS=--xla_backend_optimization_level=0

project=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$scratch/venv/bin/python
away=$scratch/away
pip=(-m pip --disable-pip-version-check)

say() {
  printf 'wheel: %s\n' "$*"
}

say "building it"
.venv/bin/python -m hatchling build --target sdist --directory "$scratch"
# Without isolation, which would ask the package index for hatchling.
.venv/bin/python "${pip[@]}" wheel -qq --no-deps --no-build-isolation \
  --wheel-dir "$scratch" "$scratch"/paged_jax-*.tar.gz

say "installing it with what it depends on"
.venv/bin/python -m venv --without-pip "$scratch/venv"
# Only what is imported is compiled, as it is imported.
.venv/bin/python "${pip[@]}" --python "$python" install -qq --no-compile \
  --constraint requirements/dev.txt "$scratch"/paged_jax-*.whl
.venv/bin/python "${pip[@]}" --python "$python" check

# The Python examples of the documents, but those that need the demo model.
mkdir "$away"
"$python" - "$away" README.md docs/guide.md <<'EOF'
import pathlib
import re
import sys

away, *documents = map(pathlib.Path, sys.argv[1:])
text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
blocks = [block for block in blocks if "demo" not in block]
assert blocks, "no example does without the model"
for i, block in enumerate(blocks):
  (away / f"document_{i}.py").write_text(block, encoding="utf-8")
EOF
cp examples/*.py "$away"
cd "$away"
for example in document_*.py; do
  say "running $example"
  "$python" -I -W error "$example"
done

say "asking the command"
"$scratch/venv/bin/paged-jax" --version
"$scratch/venv/bin/paged-jax" info

say "checking the types of examples/*.py"
"$python" -I - <<'EOF'
import importlib.resources

for package in ("paged_jax", "pallas_kernels"):
  marker = importlib.resources.files(package) / "py.typed"
  assert marker.is_file(), f"{marker} is not part of the wheel"
EOF
rm document_*.py
"$project/.venv/bin/python" -m pyrefly check --preset default \
  --python-interpreter-path "$python" ./*.py
say "done, $SECONDS s"
