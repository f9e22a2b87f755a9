#!/usr/bin/env bash
# Serves the model `taper` on a real Triton server until interrupted.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

has_config=
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            echo "usage: scripts/serve.sh [--config FILE] [--host ADDRESS] [--grpc-port N]"
            echo "                        [--http-port N] [--metrics-port N] [--model-repository DIR]"
            echo
            echo "Sets up .venv if needed, serves until interrupted (Ctrl-C) and says on which ports:"
            echo "gRPC 8001, HTTP 8000, metrics 8002 on 127.0.0.1, unless asked otherwise; port 0"
            echo "takes a free one. The configuration is triton_repo/taper/config.yaml by default,"
            echo "and its latency profile is measured first if there is none; another configuration"
            echo "must name its own."
            exit 0
            ;;
        --config | --config=*) has_config=yes ;;
    esac
done

if [[ "$has_config" ]]; then
    "$root/scripts/setup.sh"
else
    "$root/scripts/profile.sh"
fi
exec "$root/.venv/bin/python" -m taper_trtllm.triton_server "$@"
