#!/usr/bin/env bash
# Prints a Python >= 3.12 that can make virtual environments, or says in one
# line why there is none. Looks at $PYTHON, the PATH and pyenv's versions.
set -euo pipefail

# 3.12 first: the pins are resolved, and the tests run most often, with it.
candidates() {
  local minor pyenv=${PYENV_ROOT:-$HOME/.pyenv}
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
  fi
  for minor in 12 13 14 15; do
    type -ap "python3.$minor" || true
    compgen -G "$pyenv/versions/*/bin/python3.$minor" || true
  done
  type -ap python3 python || true
}

# A pyenv shim is on the PATH and yet does not run: only running one tells.
runs() {
  "$1" -c "$2" </dev/null >/dev/null 2>&1
}

bare=
while read -r python; do
  runs "$python" 'import sys; sys.exit(sys.version_info < (3, 12))' || continue
  if runs "$python" 'import ensurepip, venv'; then
    printf '%s\n' "$python"
    exit 0
  fi
  bare=${bare:-$python}
done < <(candidates)

if [[ -n $bare ]]; then
  echo "setup: $bare lacks the venv module; install it (Debian, Ubuntu:" \
    "apt install python3-venv)." >&2
else
  echo "setup: no Python >= 3.12 found on the PATH or under pyenv; install" \
    "one, or name it: make setup PYTHON=/path/to/python3.12" >&2
fi
exit 1
