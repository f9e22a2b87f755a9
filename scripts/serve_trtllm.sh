#!/usr/bin/env bash
# Serves `taper` on a TensorRT-LLM engine; to be run inside the container (trtllm_container.sh).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'USAGE'
usage: scripts/serve_trtllm.sh --config FILE [--tp-size N] [--host ADDRESS] [--grpc-port N]
                               [--http-port N] [--metrics-port N] [--model-repository DIR]
                               [--dry-run]

Starts one tritonserver per GPU of the engine under mpirun, as NVIDIA's launch_triton_server.py
does (LEADER mode): rank 0 serves, the others load the same model, run the engine's other ranks
and listen on no port. Ctrl-C stops all of them.

  --config            serving configuration (YAML)
  --tp-size           GPUs of the engine, as it was built (1)
  --host              address to listen on (127.0.0.1)
  --grpc-port, --http-port, --metrics-port   8001, 8000, 8002
  --model-repository  the directory that holds the model `taper` (triton_repo)
  --dry-run           print the command instead

environment:
  TRITONSERVER   the binary (/opt/tritonserver/bin/tritonserver)
  PYTHON         the interpreter of Triton's Python backend (python3)
USAGE
}

config=
tp_size=1
host=127.0.0.1
grpc_port=8001
http_port=8000
metrics_port=8002
repository="$root/triton_repo"
dry_run=
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift; continue ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    esac
    if (($# < 2)); then
        echo "error: $1: unknown, or without a value (--help lists the options)" >&2
        exit 2
    fi
    case "$1" in
        --config) config="$2" ;;
        --tp-size) tp_size="$2" ;;
        --host) host="$2" ;;
        --grpc-port) grpc_port="$2" ;;
        --http-port) http_port="$2" ;;
        --metrics-port) metrics_port="$2" ;;
        --model-repository) repository="$2" ;;
        *) echo "error: unknown option $1 (--help lists them)" >&2; exit 2 ;;
    esac
    shift 2
done
if [[ ! -f "$config" ]]; then
    echo "error: --config: no file '$config'; give the serving configuration" >&2
    exit 2
fi
if [[ ! "$tp_size" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --tp-size: must be at least 1 (got $tp_size)" >&2
    exit 2
fi
if [[ ! -d "$repository/taper" ]]; then
    echo "error: --model-repository: no model \`taper\` in $repository" >&2
    exit 2
fi
config="$(realpath -- "$config")"

# Words of the tritonserver command of one rank.
server() {
    local rank="$1"
    words=(
        -n 1 "${TRITONSERVER:-/opt/tritonserver/bin/tritonserver}"
        "--model-repository=$repository"
        --disable-auto-complete-config
        # Ranks share /dev/shm: each needs a prefix of its own. Loading an engine takes minutes.
        "--backend-config=python,shm-region-prefix-name=taper_rank${rank}_"
        --backend-config=python,stub-timeout-seconds=1800
    )
    if ((rank == 0)); then
        words+=(
            "--grpc-address=$host" "--grpc-port=$grpc_port"
            "--http-address=$host" "--http-port=$http_port"
            "--metrics-address=$host" "--metrics-port=$metrics_port"
        )
    else
        words+=(
            --model-control-mode=explicit --load-model=taper
            --allow-grpc=false --allow-http=false --allow-metrics=false
        )
    fi
}

command=(mpirun --allow-run-as-root)
for ((rank = 0; rank < tp_size; rank++)); do
    if ((rank > 0)); then
        command+=(:)
    fi
    server "$rank"
    command+=("${words[@]}")
done
if [[ "$dry_run" ]]; then
    printf '%q ' "TAPER_CONFIG=$config" "${command[@]}"
    echo
    exit 0
fi

python="${PYTHON:-python3}"
version="$("$python" -c 'from importlib.metadata import version; print(version("tensorrt_llm"))' \
    2>/dev/null || true)"
if [[ "$version" != 1.2.* ]]; then
    echo "error: TensorRT-LLM ${version:-is not installed}${version:+ is installed}; 1.2.x is needed" \
        "(scripts/trtllm_container.sh runs a container that ships it)" >&2
    exit 2
fi
# The Python backend ignores PYTHONPATH, so the package has to be installed. The container brings
# everything that it needs, and nothing of it may change.
if ! (cd / && "$python" -c 'import taper_trtllm') 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check --break-system-packages \
        --no-deps --no-build-isolation --editable "$root"
fi
(cd / && "$python" -c 'import numpy, pydantic, yaml, taper_trtllm') || exit 2
if [[ -d /usr/local/mpi ]]; then
    export OPAL_PREFIX="${OPAL_PREFIX:-/usr/local/mpi}"
fi
export TAPER_CONFIG="$config"
exec "${command[@]}"
