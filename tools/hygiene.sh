#!/usr/bin/env bash
# Fails if a file of the repository names a machine's folders, or a host that
# packages come from: whoever installs chooses their own.
set -euo pipefail
cd "$(dirname "$0")/.."

# Brackets, so that this file does not match itself.
hosts='[p]ypi\.|[p]ythonhosted|[a]naconda\.(org|com)|[c]onda-forge\.org'
folders='(^|[^[:alnum:]_.])/([w]ork|[r]oot|[h]ome|[U]sers|[t]mp/w)(/|$)'
if git grep --untracked -nIE "$hosts|$folders"; then
  echo "hygiene: the lines above name a machine's folder or a package host" >&2
  exit 1
fi
