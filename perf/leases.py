"""What leases cost on a compiled engine: ``python -m perf.leases``.

TensorRT-LLM lets nobody pick the members of an iteration, so its adapter gives branches a place for
a lease of tokens and takes it back one iteration late (`taper_trtllm/engines/trtllm.py`). Long
leases re-enter seldom but hold memory, and short ones regulate by themselves; this runs the adapter
on the fake executor, in virtual time, beside true per-step gating of the same requests on the same
step times, and says how much goodput leases keep and where the rest goes.

  python -m perf.leases --cells A,public --lease-tokens 1,8,64,256 --seeds 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from perf.argument_types import positive_int
from perf.evaluation_cells import CELLS, study_of
from perf.plots import colours
from perf.result import git_sha, save_json
from perf.simulated_cell import Cell, deployment_of, run_cell, worker_pool
from perf.simulation import Deployment
from perf.sweep_cells import check_policies
from perf.virtual_trtllm import Leases, VirtualTrtllmEngine
from taper_trtllm.config import ConfigError, TrtllmEngineConfig

SCHEMA_VERSION = 1
NEAR_CAPACITY = {  # requests/s that per-step TAPER just holds; prefill is computed by the engine
    "A": 1.3, "C": 0.215, "F": 1.13, "public": 3.5, "lists": 2.1, "reasoning": 0.75, "tree": 0.28,
    "plain": 2.6,
}  # fmt: skip
DEFAULT_LEASE = int(TrtllmEngineConfig.model_fields["lease_tokens"].default)
PER_STEP = "per step"
_LEVERS = "reserve-all"  # as `triton_repo/taper/config.trtllm.yaml` has it
_TOKENS_BESIDE_PREFILL = 2048
_TABLE_WIDTH = 130


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """One run.

    Attributes:
        cell: Of the evaluation.
        policy: Policy.
        mode: `PER_STEP`, or a mode of `TrtllmEngineConfig`.
        lease_tokens: Length of leases; 0 per step.
        request_rate: Requests per second.
        seed: Of arrivals and requests.
    """

    cell: str
    policy: str
    mode: str
    lease_tokens: int
    request_rate: float
    seed: int


def measure(run: Run, warmup_s: float, duration_s: float) -> dict[str, Any]:
    """Simulates one run; figures of `run_cell`, and the losses of leases."""
    study = study_of(CELLS[run.cell], run.policy, _LEVERS, warmup_s, duration_s)
    deployment = replace(study.deployment, leases=_leases(run, study.deployment))
    study = replace(study, deployment=deployment)
    cell = Cell(run.policy, run.request_rate, run.seed)
    engine = deployment_of(study, cell).make_engine()
    result = run_cell(study, cell, engine=engine)
    losses = asdict(engine.losses) if isinstance(engine, VirtualTrtllmEngine) else None
    return {**asdict(run), "figures": result, "losses": losses}


def _leases(run: Run, deployment: Deployment) -> Leases | None:
    """A step takes the cell's chunk budget, and what decode and many starts count for beside it."""
    if run.mode == PER_STEP:
        return None
    max_num_tokens = deployment.scheduler.max_prefill_tokens + _TOKENS_BESIDE_PREFILL
    return Leases(run.mode, run.lease_tokens, max_num_tokens=max_num_tokens)  # type: ignore[arg-type]


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """TAPER with every length; the other policies with the default one; all per step."""
    runs = []
    for cell in arguments.cells:
        rate = arguments.rate_scale * NEAR_CAPACITY[cell]
        for policy in arguments.policies:
            lengths = arguments.lease_tokens if policy == "taper" else [DEFAULT_LEASE]
            modes = [(PER_STEP, 0), *(("lease", length) for length in lengths)]
            if policy == "taper":
                modes += [("slice", length) for length in arguments.slice_tokens]
            runs += [
                Run(cell, policy, mode, length, rate, seed)
                for mode, length in modes
                for seed in range(arguments.seeds)
            ]
    return sorted(runs, key=lambda run: (run.seed, run))


# ---------------------------------------------------------------------------------- tables


def share(
    results: Sequence[Mapping[str, Any]], run: Mapping[str, Any], figure: str
) -> tuple[float, float] | None:
    """Mean and standard error, over seeds, of a figure over that of true per-step gating.

    None unless both were measured on some seed.
    """
    same = ("cell", "policy", "request_rate")
    per_step = {
        r["seed"]: r["figures"][figure]
        for r in results
        if r["mode"] == PER_STEP and all(r[key] == run[key] for key in same)
    }
    ratios = [
        r["figures"][figure] / per_step[r["seed"]]
        for r in results
        if all(r[key] == run[key] for key in (*same, "mode", "lease_tokens"))
        and per_step.get(r["seed"])
    ]
    if not ratios:
        return None
    error = float(np.std(ratios, ddof=1) / np.sqrt(len(ratios))) if len(ratios) > 1 else 0.0
    return float(np.mean(ratios)), error


def table_of(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each cell, policy and kind of place."""
    table = Table(
        title="Leases on the fake executor, against true per-step gating of the same requests",
        caption="the last five columns: for 1000 tokens",
    )
    for column in ("cell", "req/s", "policy", "places", "attained", "tok/s", "of per step",
                   "re-entries", "revoked", "lost", "idle", "recomputed"):  # fmt: skip
        is_text = column in ("cell", "policy", "places")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    keys = ("cell", "policy", "mode", "lease_tokens", "request_rate")
    rows = {tuple(r[key] for key in keys): r for r in results}
    for key in sorted(rows):
        table.add_row(*_row(results, rows[key], keys))
    return table


def _row(
    results: Sequence[Mapping[str, Any]], run: Mapping[str, Any], keys: Iterable[str]
) -> list[str]:
    group = [r for r in results if all(r[key] == run[key] for key in keys)]
    attainment = np.mean([r["figures"]["slo_attainment"] for r in group])
    goodput = np.mean([r["figures"]["token_goodput"] for r in group])
    kept = None if run["mode"] == PER_STEP else share(results, run, "token_goodput")
    mode = run["mode"] + (f" {run['lease_tokens']}" if run["lease_tokens"] else "")
    return [
        run["cell"], f"{run['request_rate']:.3g}", run["policy"], mode, f"{100 * attainment:.1f} %",
        f"{goodput:.0f}", "" if kept is None else f"{kept[0]:.3f} ± {kept[1]:.3f}",
        *(_per_thousand(group, name) for name in ("num_reentries", "num_revoked",
          "num_lost_tokens", "num_idle_steps", "num_recomputed_tokens")),
    ]  # fmt: skip


def _per_thousand(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """A loss for each thousand tokens that were kept."""
    if group[0]["losses"] is None:
        return ""
    tokens = sum(r["losses"]["num_tokens"] for r in group)
    return f"{1e3 * sum(r['losses'][name] for r in group) / max(1, tokens):.1f}"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Goodput that TAPER keeps, over the length of leases."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    cells = list(dict.fromkeys(r["cell"] for r in results))
    palette = colours(cells)
    for cell in cells:
        runs = {
            r["lease_tokens"]: r
            for r in results
            if (r["cell"], r["policy"], r["mode"]) == (cell, "taper", "lease")
        }
        points = [
            (length, *kept)
            for length, run in sorted(runs.items())
            if (kept := share(results, run, "token_goodput")) is not None
        ]
        if points:
            lengths, means, errors = zip(*points, strict=True)
            axis.errorbar(lengths, means, errors, marker="o", label=cell, color=palette[cell])
    axis.axhline(0.95, color="black", linewidth=0.8, linestyle=":")
    axis.axvline(DEFAULT_LEASE, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="lease, tokens", ylabel="token goodput / true per-step gating")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------- command line


def _numbers(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",") if part]


def _cells(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in NEAR_CAPACITY]
    if unknown or not names:
        known = ", ".join(NEAR_CAPACITY)
        raise argparse.ArgumentTypeError(f"not a cell: {', '.join(unknown)} (choose from {known})")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.leases", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--cells", type=_cells, default=list(NEAR_CAPACITY), help="of the evaluation")
    add("--policies", type=lambda t: t.split(","), default=["taper", "irp-off", "irp-eager"])
    add("--lease-tokens", type=_numbers, default=[1, 4, 16, 64, 256, 1024], metavar="N,N,...")
    add("--slice-tokens", type=_numbers, default=[], metavar="N,N,...",
        help="also places that are never taken back, of these lengths")  # fmt: skip
    add("--rate-scale", type=float, default=1.0, help="of the rate that per-step TAPER just holds")
    add("--seeds", type=positive_int, default=3)
    add("--warmup-s", type=float, default=30.0)
    add("--duration-s", type=float, default=60.0, help="scored window, virtual seconds")
    add("--num-processes", type=positive_int, default=2)
    add("--output-dir", type=Path, default=Path("perf/results/leases"))
    return parser


def _save(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    results.sort(key=lambda r: [r[name] for name in Run.__slots__])
    save_json(
        {
            "schema_version": SCHEMA_VERSION,
            "git_sha": git_sha(),
            "warmup_s": arguments.warmup_s,
            "duration_s": arguments.duration_s,
            "results": results,
        },
        arguments.output_dir / "leases.json",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the study; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        check_policies(arguments.policies)
    except ConfigError as error:
        print(f"leases: {error}", file=sys.stderr)
        return 2
    runs = runs_of(arguments)
    results = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with (
        Progress(*columns, console=console) as progress,
        worker_pool(arguments.num_processes) as pool,
    ):
        task = progress.add_task("", total=len(runs))
        futures = {
            pool.submit(measure, run, arguments.warmup_s, arguments.duration_s): run for run in runs
        }
        for future in as_completed(futures):
            run = futures[future]
            results.append(future.result())
            _save(results, arguments)  # a run that is stopped leaves what it has
            text = f"{run.cell} {run.policy} {run.mode} {run.lease_tokens or ''}"
            progress.update(task, advance=1, description=text)
    plot(results, arguments.output_dir / "leases.png")
    Console(width=_TABLE_WIDTH).print(table_of(results))
    print(f"results: {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
