#!/usr/bin/env bash
# Runs a command of this repository inside NVIDIA's Triton container for TensorRT-LLM.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Triton's compatibility matrix (triton-inference-server/server, docs/introduction/compatibility.md
# @0f963c9a) lists TensorRT-LLM 1.2.1, TensorRT 10.14.1 and CUDA 13.1 (driver 590) for 26.04 to
# 26.07. The commands that are run inside check the version again and refuse another one.
default_image=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3

usage() {
    cat <<USAGE
usage: scripts/trtllm_container.sh [--models DIR] [--engines DIR] [--gpus LIST] [--dry-run]
                                   COMMAND [ARGUMENT ...]

Runs COMMAND in the container with this repository as working directory, the host's network, and
  --models   a directory of Hugging Face checkpoints, at /models (read-only)
  --engines  a directory for engines, at /engines
  --gpus     devices, such as 0,1 (all)
  --dry-run  print the docker command instead

environment:
  TRTLLM_IMAGE   the image (default: $default_image)

Needs docker, the NVIDIA container toolkit and a driver for CUDA 13.1. For example:
  scripts/trtllm_container.sh --models ~/models --engines ~/engines \\
      scripts/build_engine.sh /models/Qwen3-32B /engines/qwen3-32b --dtype fp8 --tp-size 1
USAGE
}

mounts=()
gpus=all
dry_run=
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --models | --engines | --gpus)
            if (($# < 2)); then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            ;;&
        --models) mounts+=(--volume "$(realpath -- "$2"):/models:ro"); shift ;;
        --engines) mounts+=(--volume "$(realpath -- "$2"):/engines"); shift ;;
        --gpus) gpus="\"device=$2\""; shift ;;
        --dry-run) dry_run=yes ;;
        --) shift; break ;;
        -*) echo "error: unknown option $1 (--help lists them)" >&2; exit 2 ;;
        *) break ;;
    esac
    shift
done
if ((!$#)); then
    usage >&2
    exit 2
fi

terminal=()
if [[ -t 0 && -t 1 ]]; then
    terminal=(--interactive --tty)
fi
command=(
    docker run --rm ${terminal[@]+"${terminal[@]}"} --gpus "$gpus" --network host
    # Shared memory for NCCL and for the Python backend; locked pages and stack as NVIDIA advises.
    --shm-size 8g --ulimit memlock=-1 --ulimit stack=67108864
    --volume "$root:/workspace/taper_trtllm" --workdir /workspace/taper_trtllm
    ${mounts[@]+"${mounts[@]}"}
    "${TRTLLM_IMAGE:-$default_image}" "$@"
)
if [[ "$dry_run" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
