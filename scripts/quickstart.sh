#!/usr/bin/env bash
# Sets everything up, calibrates the engine, then serves one branching workload under four policies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case " $* " in
    *" -h "* | *" --help "*)
        cat <<'USAGE'
usage: scripts/quickstart.sh [--policy NAME[,NAME]]... [--request-rate R] [--num-prompts N]
                             [--config FILE]

Creates .venv (once), calibrates the step latency of the embedded engine, alone and in the running
server, then starts a real Triton server for each policy, replays perf/workloads/branch_public.csv
through gRPC and compares them in one table. About 5 minutes after the installation.

  --policy         policies to run, repeatable (irp-off,irp-eager,fixed-cap:2,taper)
  --request-rate   requests per second (0.7 of the reference rate, which follows from the profile)
  --num-prompts    requests per policy (45 s of arrivals)
  --config         serving configuration of the engine and the controller (YAML)

Writes results/quickstart/<policy>.json and results/quickstart/quickstart.png.
USAGE
        exit 0
        ;;
esac

scripts/setup.sh
exec .venv/bin/python -m perf.quickstart "$@"
