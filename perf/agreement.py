"""Does the simulation predict the live server? ``python -m perf.agreement SWEEP_DIR``.

Every cell of a finished live sweep is run again in virtual time: the same regime, requests and
arrivals, on the profile that was calibrated in the running server before the first cell. Nothing is
fitted to the sweep. The bar is the spread of the live repetitions or 15 %, whichever is larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from perf.offered_load import Offer
from perf.program import critical_tokens
from perf.regime import Regime
from perf.simulation import Deployment, counterpart, simulate
from perf.workload import DEFAULT_TRACE, build_workload
from taper_trtllm.config import ServingConfig, parse_config
from taper_trtllm.profile import LatencyProfile, load_profile

_BAR = 0.15
_DRAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared.

    Attributes:
        mean_step_ms: Mean time of a step.
        token_goodput: Output tokens of met requests, per second of arrivals.
    """

    mean_step_ms: float
    token_goodput: float


@dataclass(frozen=True, slots=True)
class LiveSweep:
    """A finished sweep on disk.

    Attributes:
        regime: That it ran under.
        base: Configuration below it.
        profile: Of the engine.
        dataset_path: Trace that was replayed.
        seed: Of the first repetition.
        cells: Its results.
    """

    regime: Regime
    base: ServingConfig
    profile: LatencyProfile
    dataset_path: Path
    seed: int
    cells: tuple[dict[str, Any], ...]


def read_sweep(directory: Path, dataset_path: Path) -> LiveSweep:
    """Reads what ``python -m perf.sweep`` wrote.

    Raises:
        ValueError: The sweep replayed another trace.
    """
    record = json.loads((directory / "regime.json").read_text())
    dataset = record["settings"]["dataset"]
    if dataset != dataset_path.name:
        raise ValueError(f"it replayed {dataset}, which --dataset-path must name")
    cells = sorted((directory / "cells").glob("*.json"))
    return LiveSweep(
        regime=Regime(**record["regime"]),
        base=parse_config(record["settings"]["config"]),
        profile=load_profile(directory / "profile.json"),
        dataset_path=dataset_path,
        seed=record["settings"]["seed"],
        cells=tuple(json.loads(path.read_text()) for path in cells),
    )


def simulate_cell(sweep: LiveSweep, profile_path: Path, cell: dict[str, Any]) -> Figures:
    """Runs one cell of a sweep in virtual time."""
    rate = cell["load"] * sweep.regime.reference_rate
    config = sweep.regime.serving_config(sweep.base, cell["policy"], profile_path)
    seed = sweep.seed + cell["repetition"]
    workload = build_workload(
        sweep.regime.workload_config(
            sweep.base, sweep.dataset_path, rate, cell["num_prompts"], seed
        )
    )
    deployment = Deployment(
        sweep.profile, sweep.profile, counterpart(config.engine),
        config.scheduler, config.slo, config.limits,
    )  # fmt: skip
    arrivals = [
        (r.arrival_s, Offer(r.request, r.family, critical_tokens(r.request.program)))
        for r in workload.requests
    ]
    steps_ms: list[float] = []
    window_s = cell["num_prompts"] / rate
    requests = simulate(
        deployment, arrivals, window_s + _DRAIN_S, observe=lambda s: steps_ms.append(s.step_ms)
    )
    tokens = sum(r.metrics.num_output_tokens for r in requests if r.metrics and r.is_met)
    return Figures(float(np.mean(steps_ms)), tokens / window_s)


def agreement_table(
    live: dict[tuple[str, float], list[Figures]], simulated: dict[tuple[str, float], list[Figures]]
) -> Table:
    """One row per policy and load: means, the difference, and whether it keeps the bar."""
    table = Table("policy", "load", title="live, simulated and their difference")
    for name in ("step (ms)", "difference", "token goodput", "difference"):
        table.add_column(name, justify="right")
    for key in sorted(live):
        columns = []
        for figure in ("mean_step_ms", "token_goodput"):
            measured = np.array([getattr(f, figure) for f in live[key]])
            predicted = float(np.mean([getattr(f, figure) for f in simulated[key]]))
            difference = predicted / measured.mean() - 1
            spread = measured.std(ddof=1) / measured.mean() if len(measured) > 1 else 0.0
            verdict = "ok" if abs(difference) <= max(_BAR, spread) else "off"
            columns += [
                f"{measured.mean():.1f} ± {spread * measured.mean():.1f} | {predicted:.1f}",
                f"{difference:+.1%} {verdict}",
            ]
        table.add_row(key[0], f"{key[1]:g}", *columns)
    return table


def _by_cell(
    cells: Iterable[dict[str, Any]], figures: Iterable[Figures]
) -> dict[tuple[str, float], list[Figures]]:
    grouped: dict[tuple[str, float], list[Figures]] = defaultdict(list)
    for cell, figure in zip(cells, figures, strict=True):
        grouped[cell["policy"], cell["load"]].append(figure)
    return grouped


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m perf.agreement", description=__doc__)
    parser.add_argument("directory", type=Path, help="output directory of a live sweep")
    parser.add_argument(
        "--dataset-path", type=Path, default=DEFAULT_TRACE, help="trace of the sweep (CSV)"
    )
    arguments = parser.parse_args()
    try:
        sweep = read_sweep(arguments.directory, arguments.dataset_path)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {arguments.directory}: no finished sweep: {error}", file=sys.stderr)
        return 1
    profile_path = arguments.directory / "profile.json"
    console = Console()
    cells = sweep.cells
    simulated = [
        simulate_cell(sweep, profile_path, cell)
        for cell in track(cells, "simulating", console=console)
    ]
    live = [Figures(cell["mean_step_ms"], cell["token_goodput"]) for cell in cells]
    console.print(agreement_table(_by_cell(cells, live), _by_cell(cells, simulated)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
