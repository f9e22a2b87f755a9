#!/usr/bin/env bash
# Measures the latency profile of the default configuration, unless there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "") ;;
    -h | --help)
        echo "usage: scripts/profile.sh [--help]"
        echo
        echo "Sets up .venv if needed and calibrates the engine of triton_repo/taper/config.yaml"
        echo "into results/profile.json. Does nothing if that file exists; delete it to measure anew."
        exit 0
        ;;
    *) echo "usage: scripts/profile.sh [--help]" >&2; exit 2 ;;
esac

scripts/setup.sh
if [[ ! -f results/profile.json ]]; then
    mkdir -p results
    .venv/bin/python -m engine_build calibrate \
        --config triton_repo/taper/config.yaml --output results/profile.json
fi
