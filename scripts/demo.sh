#!/usr/bin/env bash
# Serves a tiny model that writes forks by itself, and shows its branches as they decode.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
exec .venv/bin/python -m perf.demo "$@"
