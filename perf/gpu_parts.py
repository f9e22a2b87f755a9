"""The parts of `perf.gpu`: what each measures, and what it leaves in the output directory."""

from __future__ import annotations

import datetime
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine_build.calibrate import FULL, Calibrator, Grid
from engine_build.machine import installed_version, query_gpus, software_versions
from perf.correctness import check_correctness
from perf.gpu_model import GpuError, ModelBytes, device_name, shape_of
from perf.live_comparison import (
    CROSSING,
    EAGER,
    LOADS_OF_CROSSING,
    Experiment,
    crossing_load,
    live_cell,
    measure_host_ms,
    simulate_cell,
)
from perf.program import ProgramCost
from perf.regime import Regime, RegimeRules, fix_regime, trace_costs
from perf.result import git_sha, load_json, save_json
from perf.roofline import copy_bandwidth, roofline
from perf.sweep_cells import load_cells, schedule
from perf.sweep_summary import mean_and_spread, summarise
from taper_trtllm.config import SchedulerConfig, ServingConfig, TorchEngineConfig
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.base import Engine
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import LatencyProfile, load_profile
from taper_trtllm.request import RequestLimits

WANTED_MAPE = 0.03
AGREEMENT = 0.1  # of the live goodput, or its spread where that is larger
PROFILE, LIVE_PROFILE = "profile.json", "live/profile.json"

# Large chunks cost a GPU what small ones cost a CPU.
_GPU_GRID = replace(
    FULL, prefill_tokens=(16, 128, 512, 2048), prefill_contexts=(0, 2048), repetitions=5
)
# A GPU's steps grow little with their width: with the rules of the CPU model, eager would need
# hundreds of branches to be late. 1.5 steps is 30 ms for Qwen3-32B in bf16, a usual objective.
_RULES = {
    "cpu": RegimeRules(),
    "cuda": RegimeRules(tpot_slo_steps=1.5, max_num_requests=None),
}
_LENGTH_SCALE = 0.25  # requests then last for seconds, and a run of half a minute has many
_PROMPT_SCALE = {"cpu": _LENGTH_SCALE / 3, "cuda": _LENGTH_SCALE}
_WINDOW_SHARE = 0.6  # of the time of a run, at first: requests that are under way end after it
_LEAST_WINDOW_SHARE = 0.4
_MOST_WINDOW_S, _LEAST_WINDOW_S = 60.0, 1.0


@dataclass
class Run:
    """One run of the command.

    Attributes:
        config: The engine that is measured.
        output: Directory of the results.
        policies: That are compared.
        repetitions: Of the comparison.
        loads: In R0; None to choose one where eager crosses the objective.
        dataset_path: Trace of the comparison.
        console: For people.
        provenance: Noted with every result.
        budget_s: Time for the part that runs.
    """

    config: TorchEngineConfig
    output: Path
    policies: tuple[str, ...]
    repetitions: int
    loads: tuple[float, ...] | None
    dataset_path: Path
    console: Console
    provenance: dict[str, Any]
    budget_s: float = 0.0
    _engine: Engine | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.config.device.split(":")[0]

    def engine(self) -> Engine:
        """The engine, the same for all parts that measure it."""
        if self._engine is None:
            with self.console.status("loading the model"):
                self._engine = create_engine(self.config)
        return self._engine

    def drop_engine(self) -> None:
        """Gives its memory back; the next part that needs one loads it anew."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar, and what moves it by one."""
        columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, refresh_per_second=2) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.advance(task)

    def profile(self, name: str, part: str) -> LatencyProfile:
        """What an earlier part measured.

        Raises:
            GpuError: It has not run.
        """
        path = self.output / name
        if not path.exists():
            raise GpuError(f"needs {path}: run --parts {part} first, or with this one")
        return load_profile(path)


def provenance(config: TorchEngineConfig) -> dict[str, Any]:
    """Where, when, with what and how a result was made."""
    versions = {
        "python": sys.version.split()[0],
        **software_versions(query_gpus()),
        **{name: installed_version(name) for name in ("triton", "transformers", "numpy")},
        "cuda": torch.version.cuda,
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m perf.gpu {shlex.join(sys.argv[1:])}",
        "git_sha": git_sha(),
        "device": device_name(config.device),
        "versions": {name: version for name, version in versions.items() if version},
        "engine": config.model_dump(mode="json"),
    }


# ---------------------------------------------------------------------------------------- parts


def correctness(run: Run) -> dict[str, Any]:
    """Logits against Hugging Face, and tokens under several policies."""
    run.drop_engine()
    with run.console.status("comparing with Hugging Face"):
        return check_correctness(run.config)


def calibration(run: Run) -> dict[str, Any]:
    """The 20 x 25 grid, as far as memory and time allow, and the predictor's errors on it."""
    grid = FULL if run.kind == "cpu" else _GPU_GRID
    calibrator = Calibrator(run.engine(), grid, budget_s=run.budget_s)
    with run.progress("calibrating", calibrator.num_repetitions) as advance:
        calibrator.advance = advance
        profile, report = calibrator.measure({"tool": "perf.gpu"})
    run.output.mkdir(parents=True, exist_ok=True)
    profile.save(run.output / PROFILE)
    return {
        **_coverage(grid, profile),
        **asdict(report),
        "wanted_mape": WANTED_MAPE,
        "is_passed": report.mape <= WANTED_MAPE,
    }


def _coverage(grid: Grid, profile: LatencyProfile) -> dict[str, int]:
    return {
        "num_points": len(profile.decode),
        "num_grid_points": len(grid.widths) * len(grid.contexts),
        "num_widths": len({point.width for point in profile.decode}),
        "longest_context": max(point.context_tokens for point in profile.decode),
    }


def step_latency(run: Run) -> dict[str, Any]:
    """Decode steps beside the time in which the memory could be read."""
    profile = run.profile(PROFILE, "calibration")
    with run.console.status("measuring the memory bandwidth"):
        bandwidth = copy_bandwidth(run.config.device)
    size = ModelBytes.of(shape_of(run.config), run.config.dtype)
    result = roofline(profile, size, bandwidth)
    kept = [row["is_kept"] for row in result["wanted"]]
    return {**result, "is_passed": None if None in kept else all(kept)}


def live(run: Run) -> dict[str, Any]:
    """Policies on the live engine: interleaved, paired, all cells kept."""
    end_s, engine = time.monotonic() + run.budget_s, run.engine()
    experiment = _experiment(run, engine)
    cell_s = _cell_s(run, len(run.loads or LOADS_OF_CROSSING), end_s)
    experiment = replace(experiment, window_s=_bounded(_WINDOW_SHARE * cell_s))
    with run.console.status("choosing the load in simulation"):
        loads = run.loads or _default_loads(run, experiment)
        durations_s = [
            simulate_cell(experiment, policy, load, seed=0)["duration_s"]
            for policy in run.policies
            for load in loads
        ]
    drain_s = float(np.mean(durations_s)) - experiment.window_s
    cell_s = _cell_s(run, len(loads), end_s)
    # Rather fewer repetitions than windows that hold hardly a request.
    window_s = max(cell_s - drain_s, _LEAST_WINDOW_SHARE * cell_s)
    experiment = replace(experiment, window_s=_bounded(window_s))
    save_json(_record(run, experiment, loads), run.output / "live/regime.json")
    for line in experiment.regime.lines():
        run.console.print(line, highlight=False, soft_wrap=True)
    num_done = _run_cells(run, experiment, engine, loads, end_s)
    cells = load_cells(run.output / "live/cells", schedule(run.policies, loads, num_done))
    return {
        "regime": asdict(experiment.regime),
        "host_ms": float(experiment.profile.provenance["host_ms"]),
        "loads": loads,
        "choice": "given"
        if run.loads
        else f"least load at which {EAGER}, simulated on the "
        f"measured profile, meets less than {CROSSING:.0%}, times {LOADS_OF_CROSSING}",
        "window_s": experiment.window_s,
        "repetitions": num_done,
        **summarise(cells),
    }


def _default_loads(run: Run, experiment: Experiment) -> tuple[float, ...]:
    crossing = crossing_load(experiment, range(run.repetitions))
    return tuple(round(crossing * times, 2) for times in LOADS_OF_CROSSING)


def _cell_s(run: Run, num_loads: int, end_s: float) -> float:
    """Time of each cell, if all of them, and one to warm up, are to take until `end_s`."""
    num_cells = len(run.policies) * run.repetitions * num_loads
    return (end_s - time.monotonic()) / (num_cells + 1)


def _bounded(window_s: float) -> float:
    return min(max(window_s, _LEAST_WINDOW_S), _MOST_WINDOW_S)


def _experiment(run: Run, engine: Engine) -> Experiment:
    """The regime of the profile with host time; the first one only says how wide steps are."""
    alone = run.profile(PROFILE, "calibration")
    alone.check_fingerprint(engine.fingerprint)
    base, prompt_scale = _base(run), _PROMPT_SCALE[run.kind]
    with run.console.status("measuring the host time of a step"):
        costs = trace_costs(run.dataset_path, _LENGTH_SCALE, prompt_scale, base.limits, run.config)
        num_slots = _regime(run, alone, costs).max_num_requests
        profile = alone.with_host_time(measure_host_ms(alone, engine, num_slots // 2))
    path = run.output / LIVE_PROFILE
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    return Experiment(_regime(run, profile, costs), base, profile, run.dataset_path)


def _base(run: Run) -> ServingConfig:
    engine = run.config
    limits = RequestLimits(max_total_tokens=min(8192, engine.max_seq_len))
    scheduler = SchedulerConfig(max_batch_size=engine.max_batch_size)
    return ServingConfig(engine=engine, scheduler=scheduler, limits=limits)


def _regime(run: Run, profile: LatencyProfile, costs: list[ProgramCost]) -> Regime:
    predictor = StepLatencyPredictor(profile, run.config.max_batch_size, mode="uncorrected")
    prompt_scale, rules = _PROMPT_SCALE[run.kind], _RULES[run.kind]
    regime = fix_regime(predictor, costs, _base(run), _LENGTH_SCALE, prompt_scale, rules)
    return replace(regime, num_kv_blocks=min(regime.num_kv_blocks, run.config.num_kv_blocks))


def _record(run: Run, experiment: Experiment, loads: tuple[float, ...]) -> dict[str, Any]:
    return {
        "regime": asdict(experiment.regime),
        "dataset": run.dataset_path.name,
        "loads": loads,
        "window_s": experiment.window_s,
        "policies": run.policies,
    }


def _run_cells(
    run: Run, experiment: Experiment, engine: Engine, loads: tuple[float, ...], end_s: float
) -> int:
    """Runs whole repetitions while there is time for one more; returns how many."""
    directory = run.output / "live/cells"
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier run, perhaps in another regime
    cells = schedule(run.policies, loads, run.repetitions)
    warm_up = replace(experiment, window_s=_LEAST_WINDOW_S)
    live_cell(warm_up, engine, EAGER, loads[0], seed=1 << 20)  # other requests than the measured
    per_repetition = len(cells) // run.repetitions
    with run.progress("live", len(cells)) as advance:
        began_s = time.monotonic()
        for done, cell in enumerate(cells):
            if done and not done % per_repetition:
                repetition_s = (time.monotonic() - began_s) / cell.repetition
                if time.monotonic() + repetition_s > end_s:
                    return cell.repetition
            result = live_cell(experiment, engine, cell.policy, cell.load, cell.repetition)
            save_json({**result, "repetition": cell.repetition}, directory / cell.filename)
            advance()
    return run.repetitions


def agreement(run: Run) -> dict[str, Any]:
    """The live cells again on a simulated engine with the measured profile; nothing is fitted."""
    record = load_json(run.output / "live/regime.json")
    profile = run.profile(LIVE_PROFILE, "live")
    experiment = Experiment(
        Regime(**record["regime"]), _base(run), profile, run.dataset_path, record["window_s"]
    )
    by_cell: dict[tuple[str, float], list[tuple[dict[str, Any], dict[str, Any]]]]
    by_cell = defaultdict(list)
    paths = sorted((run.output / "live/cells").glob("*.json"))
    with run.progress("simulating", len(paths)) as advance:
        for path in paths:
            cell = load_json(path)
            simulated = simulate_cell(experiment, cell["policy"], cell["load"], cell["seed"])
            by_cell[cell["policy"], cell["load"]].append((cell, simulated))
            advance()
    rows = [_agreement(*key, pairs) for key, pairs in sorted(by_cell.items())]
    return {"rows": rows, "bar": AGREEMENT, "is_passed": all(row["is_kept"] for row in rows)}


def _agreement(
    policy: str, load: float, pairs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": policy, "load": load}
    for name in ("token_goodput", "slo_attainment", "mean_step_ms"):
        measured, simulated = (mean_and_spread([pair[i][name] for pair in pairs]) for i in (0, 1))
        row[name] = {"live": measured, "simulated": simulated}
    measured, simulated = row["token_goodput"]["live"], row["token_goodput"]["simulated"]
    scale = max(measured["mean"], 1e-9)
    difference = simulated["mean"] / scale - 1
    bar = max(AGREEMENT, (measured["std"] or 0.0) / scale)
    return {**row, "difference": difference, "is_kept": bool(np.abs(difference) <= bar)}


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "correctness": correctness,
    "calibration": calibration,
    "roofline": step_latency,
    "live": live,
    "agreement": agreement,
}
SHARES = {"correctness": 1, "calibration": 3, "roofline": 0.3, "live": 5, "agreement": 0.7}
