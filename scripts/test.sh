#!/usr/bin/env bash
# Lint, types and all tests, the end-to-end ones against a real Triton server included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'USAGE'
usage: scripts/test.sh [--help] [PYTEST ARGUMENT ...]

Sets up .venv if needed, then runs ruff, mypy and pytest. Further arguments go to pytest:
  scripts/test.sh -m 'not triton'     without the tests that start a server
USAGE
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac

scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest "$@"
