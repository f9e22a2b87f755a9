#!/usr/bin/env bash
# Builds a TensorRT-LLM engine; to be run inside the container (scripts/trtllm_container.sh).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'USAGE'
usage: scripts/build_engine.sh MODEL_DIR OUTPUT_DIR [OPTION ...]

Runs `engine_build build` with --dtype bfloat16 and --tp-size 1, unless the options or the
environment say otherwise. All its options can be given; `python3 -m engine_build build --help`
lists them. With --dry-run it prints plan and commands, inside or outside the container.

environment:
  DTYPE      bfloat16 or fp8 (bfloat16)
  TP_SIZE    GPUs of the engine (1)
  PYTHON     interpreter that has TensorRT-LLM (python3)
USAGE
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac
if (($# < 2)) || [[ "$1" == -* || "$2" == -* ]]; then
    usage >&2
    exit 2
fi
model_dir="$1"
output_dir="$2"
shift 2

python="${PYTHON:-python3}"
if ! "$python" -c 'import numpy, pydantic, rich' 2>/dev/null; then
    echo "error: $python lacks numpy, pydantic or rich; run: $python -m pip install rich" >&2
    exit 2
fi
# The container's Open MPI does not know where it lies; TensorRT-LLM initialises it on import.
if [[ -d /usr/local/mpi ]]; then
    export OPAL_PREFIX="${OPAL_PREFIX:-/usr/local/mpi}"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m engine_build build --model-dir "$model_dir" --output-dir "$output_dir" \
    --dtype "${DTYPE:-bfloat16}" --tp-size "${TP_SIZE:-1}" "$@"
