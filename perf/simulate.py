r"""Simulates policies on a latency profile: ``python -m perf.simulate``.

The executor that serves runs in virtual time on step times from a profile: which policy, how many
requests per second within the objectives, on which GPU? All policies and rates of a seed get the
same requests. Requests of the warm-up and those that arrive after the scored window only keep the
load up.

  python -m perf.simulate --profile h200_fp8_tp1 --slo-tpot-ms 30 --slo-ttft-ms 2000 \
      --workload mine.csv --policy irp-off,irp-eager,taper --find-capacity
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from perf.capacity import Capacity, capacity, grid_rate, grid_step, ratio
from perf.offered_load import LoadError
from perf.plots import plot_simulation
from perf.rate_search import FULL, START_SHARE, wanted_seeds
from perf.result import save_json
from perf.simulate_arguments import SimulateError, simulate_parser, study_of, workload_name
from perf.simulated_cell import Cell, CellRunner, Study, run_cell, worker_pool
from perf.simulated_result import Result, results_table
from perf.trace import TraceError
from perf.upper_bound import upper_bound
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import ConfigError
from taper_trtllm.profile import ProfileError
from taper_trtllm.step_trace import chrome_trace, record_json

SCHEMA_VERSION = 1

Search = dict[str, Capacity]


def run_rates(
    runner: CellRunner, policies: Iterable[str], rates: Sequence[float], seeds: Sequence[int]
) -> None:
    """Every policy at every rate on every seed."""
    runner.run(Cell(policy, rate, seed) for policy in policies for rate in rates for seed in seeds)


def find_capacities(
    runner: CellRunner, policies: Sequence[str], start: int, seeds: Sequence[int], target: float
) -> Search:
    """Searches the SLO capacity of every policy, all at a time.

    Args:
        runner: Runs the cells that the search asks for.
        policies: By name.
        start: Grid step at which the search begins.
        seeds: Of every complete grid step.
        target: Share of requests that have to meet their objective.
    """
    while True:
        measured = {policy: _measured(runner, policy) for policy in policies}
        cells = [
            Cell(policy, grid_rate(step), seed)
            for policy in policies
            for step, n in wanted_seeds(measured[policy], FULL, start, len(seeds), target).items()
            for seed in seeds[:n]
        ]
        if not cells:
            attainment = {
                policy: {step: [a for a, _ in values] for step, values in measured[policy].items()}
                for policy in policies
            }
            return {p: capacity(attainment[p], len(seeds), target) for p in policies}
        runner.run(cells)


def _measured(runner: CellRunner, policy: str) -> dict[int, list[tuple[float, float]]]:
    """See `rate_search.Measured`; a seed on which nothing arrived counts as met."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell, result in runner.results.items():
        if cell.policy == policy:
            attained = result["slo_attainment"]
            figures = (1.0 if attained is None else attained, result["token_goodput"])
            found[grid_step(cell.request_rate)].append(figures)
    return dict(found)


def write_chrome_trace(study: Study, cell: Cell, window: tuple[float, float], path: Path) -> int:
    """Runs a cell up to the end of a window of virtual time; returns the steps written."""
    steps: list[dict[str, Any]] = []

    def observe(record: StepRecord) -> None:
        if record.completed_at_s > window[0]:
            steps.append(record_json(record))

    run_cell(replace(study, warmup_s=0.0, duration_s=window[1], drain_s=0.0), cell, observe)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chrome_trace(steps)))
    return len(steps)


# -------------------------------------------------------------------------------------- report


def report(
    arguments: argparse.Namespace, study: Study, results: Sequence[Result], found: Search
) -> dict[str, Any]:
    """The results as they are written to ``--json``."""
    rows = []
    for result in results:
        at = found.get(result["policy"])
        capacities = {"capacity_rps": at and at.rate, "capacity_rps_std": at and at.std}
        rows.append({**result, **capacities})
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": arguments.profile,
        "profile_fingerprint": study.deployment.profile.fingerprint,
        "workload": workload_name(arguments),
        "options": options,
        "results": rows,
        "capacities": {
            policy: {
                "capacity_rps": c.rate,
                "capacity_rps_std": c.std,
                **_peak(results, policy, arguments.seeds),
                "ratio_to": {
                    rival: {"ratio": pair[0], "std": pair[1]}
                    for rival, other in found.items()
                    if rival != policy and (pair := ratio(c, other))
                },
            }
            for policy, c in found.items()
        },
    }


def _peak(results: Sequence[Result], policy: str, num_seeds: int) -> dict[str, float | None]:
    """The rate with the highest mean token goodput, of those measured on all seeds."""
    goodput: dict[float, list[float]] = defaultdict(list)
    for result in results:
        if result["policy"] == policy:
            goodput[result["request_rate"]].append(result["token_goodput"])
    means = {rate: float(np.mean(v)) for rate, v in goodput.items() if len(v) == num_seeds}
    best = max(means, key=lambda rate: means[rate], default=None)
    return {
        "peak_token_goodput": None if best is None else means[best],
        "peak_request_rate": best,
    }


def capacity_table(capacities: dict[str, Any], target: float) -> Table:
    """One row per policy; ratios to it are in its column."""
    table = Table(title=f"SLO capacity: highest rate at which {target:.0%} of requests meet it")
    table.add_column("policy", no_wrap=True)
    table.add_column("req/s", justify="right", no_wrap=True)
    for policy in capacities:
        table.add_column(f"x {policy}", justify="right")
    table.add_column("peak goodput\ntok/s", justify="right")
    table.add_column("at req/s", justify="right")
    for policy, row in capacities.items():
        ratios = [row["ratio_to"].get(rival) for rival in capacities]
        peak, at = row["peak_token_goodput"], row["peak_request_rate"]
        table.add_row(
            policy,
            _plus_minus(row["capacity_rps"], row["capacity_rps_std"]),
            *(_plus_minus(r["ratio"], r["std"]) if r else "" for r in ratios),
            "-" if peak is None else f"{peak:.0f}",
            "-" if at is None else f"{at:.3g}",
        )
    return table


def _plus_minus(value: float | None, std: float | None) -> str:
    if value is None:
        return "not found"
    return f"{value:.3g}" + ("" if std is None else f" ± {std:.2g}")


def _near_capacity(results: Sequence[Result], found: Search) -> list[Result]:
    """Of each policy, the results at the grid rate next below its capacity."""
    rates = {
        policy: max(
            r["request_rate"]
            for r in results
            if r["policy"] == policy and r["request_rate"] <= c.rate
        )
        for policy, c in found.items()
        if c.rate is not None
    }
    return [r for r in results if rates.get(r["policy"]) == r["request_rate"]]


def _tables(results: Sequence[Result], found: Search) -> list[Table]:
    """Figures by rate; of a search, those next below capacity."""
    if found:
        return [results_table(_near_capacity(results, found), "Next below capacity")]
    rates = sorted({r["request_rate"] for r in results})
    return [
        results_table([r for r in results if r["request_rate"] == rate], f"{rate:.3g} requests/s")
        for rate in rates
    ]


# ----------------------------------------------------------------------------------------- main


def _rates(arguments: argparse.Namespace, study: Study) -> tuple[float, ...]:
    if arguments.request_rate is not None:
        rates: tuple[float, ...] = arguments.request_rate
        return rates
    if arguments.arrivals == "trace":
        return (study.load.recorded_rate(),)
    raise SimulateError("--request-rate or --find-capacity: one is required")


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs what the command line asks for and prints it.

    Raises:
        SimulateError, LoadError, ConfigError, ProfileError, TraceError: With the option at fault.
    """
    study = study_of(arguments)
    rates = () if arguments.find_capacity else _rates(arguments, study)
    policies = list(study.policies)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    found: Search = {}
    progress = Progress(
        TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, disable=arguments.no_progress,
        transient=True,
    )  # fmt: skip
    with progress, worker_pool(arguments.processes, study) as pool:
        runner = CellRunner(study, pool, progress)
        if arguments.find_capacity:
            start = grid_step(START_SHARE * upper_bound(study.deployment, study.load))
            found = find_capacities(runner, policies, start, seeds, arguments.target)
        else:
            run_rates(runner, policies, rates, seeds)
    results = list(runner.results.values())
    outcome = report(arguments, study, results, found)
    for table in _tables(results, found):
        console.print(table)
    if found:
        console.print(capacity_table(outcome["capacities"], arguments.target))
    num_dropped = sum(r["num_dropped"] for r in results)
    if num_dropped:
        console.print(
            f"dropped: {num_dropped} requests over --max-seq-len {arguments.max_seq_len} tokens or "
            "the KV cache, in all runs together; the next ones took their place",
            soft_wrap=True,
        )
    if arguments.json:
        save_json(outcome, arguments.json)
    if arguments.plot:
        plot_simulation(results, {p: c.rate for p, c in found.items()}, arguments.target,
                        arguments.slo_tpot_ms, arguments.plot)  # fmt: skip
    if arguments.chrome_trace:
        rate = rates[0] if rates else found[policies[0]].rate or results[0]["request_rate"]
        cell = Cell(policies[0], rate, arguments.seed)
        steps = write_chrome_trace(study, cell, arguments.trace_window, arguments.chrome_trace)
        console.print(f"{steps} steps of {cell.policy} at {cell.request_rate:.3g} req/s: "
                      f"{arguments.chrome_trace}", soft_wrap=True)  # fmt: skip
    return outcome


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the simulation could not run."""
    arguments = simulate_parser(__doc__ or "").parse_args(argv)
    try:
        run(arguments, Console())
    except (ConfigError, LoadError, ProfileError, SimulateError, TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
