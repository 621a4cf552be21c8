#!/usr/bin/env bash
# Runs the quick tests on the newest packages that pyproject.toml allows, in
# .venv-newest. Nothing to do where that is the pinned JAX. Needs .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

range=$(.venv/bin/python - <<'EOF'
import tomllib

with open("pyproject.toml", "rb") as file:
  dependencies = tomllib.load(file)["project"]["dependencies"]
print(next(d for d in dependencies if d.startswith("jax>")))
EOF
)
pip=(-m pip --disable-pip-version-check)
upgrade=$(.venv/bin/python "${pip[@]}" install -qq --dry-run --no-deps \
  --upgrade --report - "$range" | .venv/bin/python -c \
  'import json, sys; print(len(json.load(sys.stdin)["install"]))')
if ((upgrade == 0)); then
  echo "newest: the pinned JAX is the newest of $range"
  exit 0
fi

python=.venv-newest/bin/python
.venv/bin/python -m venv --clear .venv-newest
# Python 3.12's own pip does not know dependency groups.
"$python" "${pip[@]}" install -qq --upgrade pip
"$python" "${pip[@]}" install -qq --editable ".[demo]" --group test
"$python" "${pip[@]}" freeze | grep -iE '^(jax|jaxlib|flax|numpy)=='
"$python" -m pytest -n 2 --dist loadfile
