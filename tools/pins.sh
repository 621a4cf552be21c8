#!/usr/bin/env bash
# Resolves pyproject.toml anew and writes requirements/*.txt, as name==version.
# Usage: tools/pins.sh JAX_VERSION. Needs Linux and the package index.
set -euo pipefail
cd "$(dirname "$0")/.."

jax=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$(tools/find_python.sh)" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check)
# Python 3.12's own pip does not know dependency groups.
"${pip[@]}" install --quiet --upgrade pip
# hatchling and editables: set-up builds the project without isolation, so that
# it needs no network.
"${pip[@]}" install --quiet --editable ".[demo]" --group dev \
  hatchling editables "jax==$jax" "jaxlib==$jax"
"${pip[@]}" freeze --exclude-editable >requirements/dev.txt

# From the wheels' metadata alone: they are gigabytes.
"${pip[@]}" install --quiet --dry-run --report "$scratch/report.json" \
  --constraint requirements/dev.txt "jax[cuda13]==$jax"
"$scratch/venv/bin/python" - "$scratch/report.json" >requirements/cuda.txt <<'EOF'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as report:
  packages = [item["metadata"] for item in json.load(report)["install"]]
print("\n".join(sorted(f"{p['name']}=={p['version']}" for p in packages)))
EOF
wc -l requirements/*.txt
