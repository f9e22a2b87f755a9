#!/usr/bin/env bash
# Serves the model `taper` on a real Triton server until interrupted.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

case "${1:-}" in
    -h | --help)
        echo "usage: scripts/serve.sh [--config FILE] [--host ADDRESS] [--grpc-port N]"
        echo "                        [--http-port N] [--metrics-port N] [--model-repository DIR]"
        echo
        echo "Sets up .venv if needed, serves until interrupted (Ctrl-C) and says on which ports:"
        echo "gRPC 8001, HTTP 8000, metrics 8002 on 127.0.0.1, unless asked otherwise; port 0 takes"
        echo "a free one. The configuration is triton_repo/taper/config.yaml by default."
        exit 0
        ;;
esac

"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m taper_trtllm.triton_server "$@"
