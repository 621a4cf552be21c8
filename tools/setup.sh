#!/usr/bin/env bash
# Makes .venv ready: the pinned packages, and this project as editable. Returns
# at once, without the network, while what it was made from is unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/.venv
log=$venv/setup.log
pins=(requirements/dev.txt)
cuda_driver=580 # the oldest NVIDIA driver that CUDA 13 runs on

say() {
  printf 'setup: %s\n' "$*" >&2
}

# Prints the major version of the NVIDIA driver, 0 where there is none or JAX
# is told to use the CPU.
driver_version() {
  local version=
  if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader \
      2>/dev/null) || version=
  fi
  [[ $version =~ ^([0-9]+)\. ]] && echo "${BASH_REMATCH[1]}" || echo 0
}

made_from() {
  printf '%s\n' "$venv"
  cat "${pins[@]}" pyproject.toml
}

# False for one that was moved (its scripts name the old place), was left half
# made, or lost the Python it was made with.
is_whole() {
  grep -qsF "$venv" "$venv/pyvenv.cfg" && "$venv/bin/python" -c \
    'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

install() {
  if "$venv/bin/python" -m pip install --quiet --no-input \
    --disable-pip-version-check "$@" >>"$log" 2>&1; then
    return
  fi
  grep -iE '^ *([a-z]*error)\b' "$log" | tail -n 2 >&2 || true
  local network='ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError'
  if grep -qE "$network|name resolution|Connection (refused|reset)" "$log"; then
    say "the package index cannot be reached; see .venv/setup.log"
  else
    say "pip could not install the packages; see .venv/setup.log"
  fi
  exit 1
}

driver=$(driver_version)
if ((driver >= cuda_driver)); then
  pins+=(requirements/cuda.txt)
fi
if is_whole && cmp -s "$venv/made_from" <(made_from); then
  exit 0
fi

if ((driver > 0 && driver < cuda_driver)); then
  say "the NVIDIA driver $driver is older than $cuda_driver: JAX gets no GPU"
fi
if ! is_whole; then
  python=$(tools/find_python.sh)
  say "making .venv with $python; the packages take some minutes"
  "$python" -m venv --clear "$venv"
fi
: >"$log"
# Complete as they are: resolving them once more would take as long again.
install --no-deps "${pins[@]/#/--requirement=}"
install --no-deps --no-build-isolation --editable .
made_from >"$venv/made_from"
say "ready after $SECONDS s"
