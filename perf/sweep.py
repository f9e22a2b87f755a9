"""Policies x loads x repetitions on real servers: ``python -m perf.sweep``.

Every cell is a fresh server. Within a repetition all policies get the same requests at the same
times, so that differences are paired; the order of policies rotates from cell to cell, so that a
drift of the machine falls on all of them. Slots, memory, objectives and loads follow from the
profile and the trace before the first cell (`perf/regime.py`). A finished cell is one file; run
again, the sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from perf.argument_types import count, positive, positive_int
from perf.cell import Experiment, run_cell
from perf.grpc_client import ServerUnavailableError
from perf.host_time import HostTimeError, measure_profile
from perf.plots import plot_sweep
from perf.regime import LENGTH_SCALE, PROMPT_SCALE, Regime, load_base, regime_of
from perf.result import save_json
from perf.sweep_cells import check_policies, load_cells, schedule
from perf.sweep_summary import Cells, summarise, summary_tables
from perf.trace import TraceError
from perf.workload import DEFAULT_TRACE, WorkloadError
from taper_trtllm.config import ConfigError, ServingConfig
from taper_trtllm.profile import ProfileError
from taper_trtllm.triton_install import TritonServerError

POLICIES = ("irp-off", "irp-eager", "fixed-cap:2", "step-ceiling:1.0", "taper")
LOADS = (0.4, 0.6, 0.8, 1.0)


class SweepError(RuntimeError):
    """A sweep that cannot run or go on, with what to do."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policies", type=_names, default=POLICIES, help="comma list")
    parser.add_argument("--loads", type=_numbers, default=LOADS, help="multiples of R0, comma list")
    parser.add_argument("--repetitions", type=positive_int, default=3, help="%(default)s")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--duration-s", type=positive, default=60.0, help="of arrivals (%(default)s)"
    )
    length.add_argument("--num-prompts", type=positive_int, help="per cell, instead of a duration")
    parser.add_argument("--output-dir", type=Path, default=Path("results/sweep"))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", type=Path, help="latency profile to start from")
    source.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the profile first, alone and in the server",
    )
    parser.add_argument("--config", type=Path, help="base serving configuration (YAML)")
    parser.add_argument("--dataset-path", type=Path, default=DEFAULT_TRACE, help="trace (CSV)")
    parser.add_argument("--length-scale", type=positive, default=LENGTH_SCALE, help="%(default)s")
    parser.add_argument("--prompt-scale", type=positive, default=PROMPT_SCALE, help="%(default).3g")
    parser.add_argument("--seed", type=count, default=0, help="of the first repetition")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(positive(part) for part in text.split(","))


def prepare(arguments: argparse.Namespace, console: Console) -> Experiment:
    """Fixes the regime, or takes up that of the sweep that the output directory holds.

    Raises:
        SweepError: There is no profile, or the directory holds another sweep.
    """
    output: Path = arguments.output_dir
    profile, record = output / "profile.json", output / "regime.json"
    base = load_base(arguments.config)
    if not record.exists():
        output.mkdir(parents=True, exist_ok=True)
        _provide_profile(arguments, base, profile, console)
        regime = regime_of(
            profile, base, arguments.dataset_path, arguments.length_scale, arguments.prompt_scale
        )
        save_json({"regime": asdict(regime), "settings": _settings(arguments, base)}, record)
        return Experiment(regime, base, profile, arguments.dataset_path)
    found = json.loads(record.read_text())
    if found["settings"] != _settings(arguments, base):
        raise SweepError(f"{output} holds a sweep with other settings; choose another --output-dir")
    return Experiment(Regime(**found["regime"]), base, profile, arguments.dataset_path)


def _settings(arguments: argparse.Namespace, base: ServingConfig) -> dict[str, Any]:
    """What must not change between the cells of a sweep."""
    return {
        "duration_s": None if arguments.num_prompts else arguments.duration_s,
        "num_prompts": arguments.num_prompts,
        "seed": arguments.seed,
        "dataset": arguments.dataset_path.name,
        "length_scale": arguments.length_scale,
        "prompt_scale": arguments.prompt_scale,
        "config": base.model_dump(mode="json"),
    }


def _provide_profile(
    arguments: argparse.Namespace, base: ServingConfig, profile: Path, console: Console
) -> None:
    if arguments.profile is not None:
        if not arguments.profile.is_file():
            raise SweepError(f"--profile: no such file: {arguments.profile}")
        profile.write_bytes(arguments.profile.read_bytes())
        return
    if not arguments.calibrate:
        raise SweepError("a new sweep needs --profile FILE or --calibrate")
    measure_profile(profile, base, arguments.config, console)


def run_sweep(arguments: argparse.Namespace, experiment: Experiment, console: Console) -> Cells:
    """Runs the cells that have no result yet; returns the results of all."""
    cells = schedule(arguments.policies, arguments.loads, arguments.repetitions)
    directory = arguments.output_dir / "cells"
    missing = [cell for cell in cells if not (directory / cell.filename).exists()]
    console.print(f"{len(cells)} cells, {len(cells) - len(missing)} already measured")
    start_s = time.monotonic()
    for done, cell in enumerate(missing):
        rate = cell.load * experiment.regime.reference_rate
        num_prompts = arguments.num_prompts or max(1, round(arguments.duration_s * rate))
        seed = arguments.seed + cell.repetition
        result, _ = run_cell(experiment, cell.policy, rate, num_prompts, seed, show_progress=False)
        result |= {"load": cell.load, "repetition": cell.repetition}
        save_json(result, directory / cell.filename)
        spent_s = time.monotonic() - start_s
        left_min = spent_s / (done + 1) * (len(missing) - done - 1) / 60
        console.print(
            f"[{done + 1}/{len(missing)}] load {cell.load:g} repetition {cell.repetition} "
            f"{cell.policy}: {result['token_goodput']:.0f} tok/s, attainment "
            f"{result['slo_attainment']:.1%}; about {left_min:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )
    return load_cells(directory, cells)


def main() -> int:
    """Runs the command line; the exit status is 1 if the sweep could not be completed."""
    arguments = _parser().parse_args()
    console = Console()
    try:
        check_policies(arguments.policies)
        experiment = prepare(arguments, console)
        for line in experiment.regime.lines():
            console.print(line, highlight=False, soft_wrap=True)
        cells = run_sweep(arguments, experiment, console)
    except (
        ConfigError, HostTimeError, ProfileError, ServerUnavailableError, SweepError, TraceError,
        TritonServerError, WorkloadError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = summarise({policy: cells[policy] for policy in arguments.policies})
    for table in summary_tables(summary):
        console.print(table)
    output: Path = arguments.output_dir
    save_json({"regime": asdict(experiment.regime), **summary}, output / "summary.json")
    plot_sweep(cells, experiment.regime.tpot_slo_ms, output / "sweep.png")
    console.print(f"results: {output}/summary.json, plot: {output}/sweep.png", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
