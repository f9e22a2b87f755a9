#!/usr/bin/env bash
# Makes the latency profiles of Qwen3-32B in perf/profiles/ anew, from NVIDIA's operator measurements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'USAGE'
usage: scripts/make_profiles.sh [--help] [--output-dir DIR]

Creates the environment .venv-profiles (Linux x86-64, about 600 MB) with aiconfigurator-core, which
needs numpy 2 and so cannot share .venv, then writes one JSON profile per deployment.

  --output-dir   where to (perf/profiles)

environment:
  PYTHON   interpreter to create the environment with, 3.11 to 3.13
           (default: python3.11, python3.12 or python3.13)
  VENV     the environment (default: .venv-profiles)
USAGE
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 to 3.13 found (tried: ${PYTHON:-python3.11 python3.12 python3.13})" >&2
    return 1
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac

venv="${VENV:-.venv-profiles}"
if [[ ! -x "$venv/bin/python" ]]; then
    python="$(find_python)"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    aiconfigurator-core==0.12.0 'pydantic>=2.7,<3'
exec "$venv/bin/python" -m perf.make_profiles "$@"
