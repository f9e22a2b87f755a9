#!/usr/bin/env bash
# Proves on a real server that branches reuse their prefix's KV blocks; exits 1 if they do not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help)
        [[ -x .venv/bin/python ]] || scripts/setup.sh
        exec .venv/bin/python -m perf.prove_prefix_reuse --help
        ;;
esac

scripts/profile.sh
exec .venv/bin/python -m perf.prove_prefix_reuse "$@"
