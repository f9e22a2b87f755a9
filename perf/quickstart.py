"""The quick start: one load, a few policies one after another, one table.

`scripts/quickstart.sh` calls it after setting everything up.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from perf.argument_types import positive, positive_int
from perf.cell import Experiment, run_cell
from perf.grpc_client import ServerUnavailableError
from perf.host_time import HostTimeError, measure_profile
from perf.plots import plot_comparison
from perf.regime import load_base, regime_of
from perf.result import save_json
from perf.sweep_cells import check_policies
from perf.tables import comparison_table
from perf.trace import TraceError
from perf.workload import WorkloadError
from taper_trtllm.config import ConfigError
from taper_trtllm.profile import ProfileError
from taper_trtllm.triton_install import TritonServerError

POLICIES = ("irp-off", "irp-eager", "fixed-cap:2", "taper")
LOAD = 0.7  # of the reference rate
ARRIVALS_S = 45.0
_SEED = 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart.sh",
        description="Serves a branching workload under several policies and compares them.",
    )
    parser.add_argument(
        "--policy", action="append", type=lambda text: text.split(","), metavar="NAME[,NAME]",
        help=f"policies to run, repeatable (default: {','.join(POLICIES)})",
    )  # fmt: skip
    parser.add_argument(
        "--request-rate", type=positive, metavar="R",
        help=f"requests per second (default: {LOAD:g} of the reference rate of the regime)",
    )  # fmt: skip
    parser.add_argument(
        "--num-prompts", type=positive_int, metavar="N",
        help=f"requests per policy (default: {ARRIVALS_S:g} s of arrivals)",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path,
        help="serving configuration of the engine and the controller; slots, memory and objectives "
        "follow from the profile and the trace",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=Path,
        help="latency profile to start from (default: measured first, alone and in the server)",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("results/quickstart"))
    return parser


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs every policy and writes its result, then the table and the plot."""
    policies = [policy for group in arguments.policy or [POLICIES] for policy in group]
    check_policies(policies)
    base = load_base(arguments.config)
    profile = arguments.profile or arguments.output_dir / "profile.json"
    if arguments.profile is None:
        measure_profile(profile, base, arguments.config, console)
    regime = regime_of(profile, base)
    rate = arguments.request_rate or LOAD * regime.reference_rate
    num_prompts = arguments.num_prompts or round(ARRIVALS_S * rate)
    for line in regime.lines():
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{num_prompts} requests at {rate:.2f} requests/s ({rate / regime.reference_rate:.2f} R0)"
    )
    experiment = Experiment(regime, base, profile)
    results: dict[str, dict[str, Any]] = {}
    for policy in policies:
        console.rule(policy)
        result, _ = run_cell(experiment, policy, rate, num_prompts, _SEED, show_progress=True)
        results[policy] = {**result, "regime": asdict(regime)}
        save_json(results[policy], arguments.output_dir / f"{policy}.json")
    console.print(comparison_table(results, f"{num_prompts} requests at {rate:.2f} requests/s"))
    plot = arguments.output_dir / "quickstart.png"
    plot_comparison(results, regime.tpot_slo_ms, plot)
    console.print(f"results: {arguments.output_dir}/<policy>.json, plot: {plot}", soft_wrap=True)


def main() -> int:
    """Runs the command line; the exit status is 1 if a policy could not be measured."""
    console = Console()
    try:
        run(_parser().parse_args(), console)
    except (
        ConfigError, HostTimeError, ProfileError, ServerUnavailableError, TraceError,
        TritonServerError, WorkloadError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
