#!/usr/bin/env bash
# Creates the virtual environment .venv and installs the project with everything its tests need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'USAGE'
usage: scripts/setup.sh [--help]

Creates .venv (Python 3.10 to 3.12, 3.11 preferred) and installs the project, with pinned
dependencies on 3.11. Does nothing when nothing has changed since the last run.

environment:
  PYTHON   interpreter to create .venv with (default: python3.11, python3.12 or python3.10)
USAGE
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3.10})" >&2
    return 1
}

case "${1:-}" in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

inputs="$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum)"
stamp=.venv/.taper-setup
if [[ -f "$stamp" && "$(<"$stamp")" == "$inputs" ]]; then
    exit 0
fi

echo "setting up .venv (a few minutes the first time)"
if [[ ! -x .venv/bin/python ]]; then
    python="$(find_python)"
    "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
# The pins are those of Python 3.11; some of them do not exist for others.
if [[ "$(.venv/bin/python -c 'import sys; print(sys.version_info[:2])')" == "(3, 11)" ]]; then
    pip+=(-c scripts/constraints.txt)
fi
# torch first and by itself, so that a CPU build already present is kept by what follows.
"${pip[@]}" "torch>=2.11,<2.14"
"${pip[@]}" --editable '.[dev]'
# CUDA builds of torch bring the Triton language of their own version. With others its interpreter
# runs the tests of the GPU kernels (190 MB to download, 640 MB on disk).
if ! .venv/bin/python -c 'import triton' 2>/dev/null; then
    "${pip[@]}" --no-deps triton==3.6.0
fi
echo "$inputs" >"$stamp"
