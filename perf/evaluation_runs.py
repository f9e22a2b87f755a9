"""Runs the evaluation: one file per cell, levers and policy, until the time is used."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.progress import Progress

from perf.capacity import grid_rate, grid_step
from perf.evaluation_cells import FREE_EXTRAS, LEVERS, described, study_of
from perf.random_cells import cell_named
from perf.rate_search import START_SHARE, RateGrid, wanted_seeds
from perf.result import git_sha, save_json
from perf.simulated_cell import Cell, Study, run_cell
from perf.upper_bound import upper_bound

SCHEMA_VERSION = 1

Result = dict[str, Any]

_EXPECTED_RUNS = 4  # of a task, per seed; for the progress bar
_FIGURES = (
    "slo_attainment", "token_goodput", "request_goodput", "num_requests", "num_unfinished",
    "p50_ttft_ms", "p99_ttft_ms", "mean_batch_size", "mean_queue_length", "mean_kv_cache_usage",
    "num_preempted",
)  # fmt: skip
_GROUP_FIGURES = (
    "slo_attainment", "p50_tpot_ms", "p99_tpot_ms", "p99_serial_tpot_ms", "p50_stretch",
    "p99_stretch", "mean_width", "mean_join_wait_ms",
)  # fmt: skip


class EvaluationError(RuntimeError):
    """An evaluation that cannot run or go on, with what to do."""


@dataclass(frozen=True, slots=True)
class Task:
    """One policy under one set of levers in one cell."""

    cell: str
    levers: str
    policy: str

    @property
    def path(self) -> Path:
        """Its file, relative to the output directory."""
        return Path(self.cell) / self.levers / f"{self.policy.replace(':', '-')}.json"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
        num_seeds: At every rate that counts.
        grid: Rates.
        duration_s: Scored window; None for each cell's quick one.
        target: Attainment at capacity.
    """

    num_seeds: int
    grid: RateGrid
    duration_s: float | None
    target: float = 0.95

    def study(self, task: Task) -> Study:
        """The runs of a task."""
        cell = cell_named(task.cell)
        duration_s = self.duration_s or cell.quick_duration_s
        return study_of(cell, task.policy, task.levers, cell.warmup_s, duration_s)


@dataclass(slots=True)
class TaskRuns:
    """What has been measured of a task.

    Attributes:
        task: Which one.
        runs: Figures by grid step and seed.
    """

    task: Task
    runs: dict[tuple[int, int], Result] = field(default_factory=dict)

    def column(self, figure: Callable[[Result], float | None]) -> dict[int, list[float]]:
        """A figure by grid step, in order of seeds up to the first that is missing."""
        columns: dict[int, list[float]] = {}
        for step, seed in sorted(self.runs):
            values = columns.setdefault(step, [])
            value = figure(self.runs[step, seed])
            if seed == len(values) and value is not None:
                values.append(value)
        return {step: values for step, values in columns.items() if values}

    def attainment(self) -> dict[int, list[float]]:
        """A seed on which nothing arrived counts as met."""
        return self.column(lambda r: 1.0 if r["slo_attainment"] is None else r["slo_attainment"])

    def token_goodput(self) -> dict[int, list[float]]:
        """Output tokens per second of requests that met their objective."""
        return self.column(lambda r: float(r["token_goodput"]))

    def wanted(self, scale: Scale) -> list[tuple[int, int]]:
        """Grid steps and seeds to measure next; empty when the task is done."""
        attainment, goodput = self.attainment(), self.token_goodput()
        seeds = slice(scale.num_seeds)  # a file of more seeds is read as the summary reads it
        measured = {s: list(zip(attainment[s], goodput[s], strict=True))[seeds] for s in attainment}
        start = grid_step(START_SHARE * bound_of(self.task.cell))
        wanted = wanted_seeds(measured, scale.grid, start, scale.num_seeds, scale.target)
        return [
            (step, seed) for step, num_seeds in wanted.items() for seed in range(num_seeds)
            if (step, seed) not in self.runs
        ]  # fmt: skip


def brief(result: Mapping[str, Any]) -> Result:
    """The figures of a run that are kept, to five digits."""
    groups = {
        name: {k: _rounded(group[k]) for k in _GROUP_FIGURES}
        for name, group in result["groups"].items()
    }
    return {k: _rounded(result[k]) for k in _FIGURES} | {"groups": groups}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


# ---------------------------------------------------------------------------------------- files


def load_task(task: Task, directory: Path, scale: Scale) -> TaskRuns | None:
    """What the directory holds of a task; None if nothing.

    Raises:
        EvaluationError: It was measured with other settings.
    """
    path = directory / task.path
    if not path.exists():
        return None
    found = _read(path)
    if found.get("settings") != _settings(task, scale):
        raise EvaluationError(
            f"{path} was measured with other settings; remove it, or choose another --output-dir"
        )
    return _runs_of(task, found)


def load_all(directory: Path, scale: Scale) -> dict[Task, TaskRuns]:
    """All that the directory holds with these settings, in order of name."""
    measured = {}
    for path in sorted(directory.glob("*/*/*.json")):
        found = _read(path)
        task = _task_of(found)
        if task is not None and found["settings"] == _settings(task, scale):
            measured[task] = _runs_of(task, found)
    return measured


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON.

    Raises:
        EvaluationError: It is something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON ({error}); remove it") from None
    return found if isinstance(found, dict) else {}


def _task_of(found: Mapping[str, Any]) -> Task | None:
    """Whose file it is; None for one of something else, or of a cell or levers that are gone."""
    try:
        settings = found["settings"]
        task = Task(settings["cell"], settings["levers"], settings["scheduler"]["policy"])
        cell_named(task.cell)
    except (KeyError, TypeError):
        return None
    return task if task.levers in LEVERS else None


def _runs_of(task: Task, found: Mapping[str, Any]) -> TaskRuns:
    runs = {
        (grid_step(run["request_rate"]), run["seed"]): {
            k: v for k, v in run.items() if k not in ("request_rate", "seed")
        }
        for run in found["runs"]
    }
    return TaskRuns(task, runs)


def save_task(measured: TaskRuns, directory: Path, scale: Scale) -> None:
    """Writes what has been measured of a task."""
    runs = [
        {"request_rate": grid_rate(step), "seed": seed, **measured.runs[step, seed]}
        for step, seed in sorted(measured.runs)
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": _settings(measured.task, scale),
        "upper_bound_rps": bound_of(measured.task.cell),
        "runs": runs,
    }
    save_json(content, directory / measured.task.path)


def _settings(task: Task, scale: Scale) -> dict[str, Any]:
    """What a run depends on but its rate and seed, profiles and code, as JSON reads it back."""
    study = scale.study(task)
    settings = {
        "cell": task.cell,
        "levers": task.levers,
        "deployment": described(cell_named(task.cell)),
        "scheduler": study.deployment.scheduler.model_dump(mode="json"),
        "warmup_s": study.warmup_s,
        "duration_s": study.duration_s,
        "drain_s": study.drain_s,
    }
    return dict(json.loads(json.dumps(settings)))


# --------------------------------------------------------------------------------------- running


def bound_of(cell: str) -> float:
    """Fluid upper bound of a named cell, requests per second; extras cost time in any case."""
    return _fluid_bound(cell.removesuffix(FREE_EXTRAS))


@lru_cache
def _fluid_bound(cell: str) -> float:
    study = study_of(cell_named(cell), "taper", "shipped", 0.0, 1.0)
    return upper_bound(study.deployment, study.load)


class TaskRunner:
    """Measures tasks in order, several at a time, until a deadline.

    Args:
        pool: Worker processes.
        num_processes: Of them.
        directory: Of the files.
        scale: How much is measured.
        deadline_s: On the monotonic clock; what runs then is finished, nothing is begun.
        progress: Shows runs done of those expected.
    """

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        num_processes: int,
        directory: Path,
        scale: Scale,
        deadline_s: float,
        progress: Progress,
    ) -> None:
        self._pool = pool
        self._num_processes = num_processes
        self._directory = directory
        self._scale = scale
        self._deadline_s = deadline_s
        self._git_sha = git_sha()
        self._progress = progress
        self._bar = progress.add_task("", total=0)
        self._active: dict[Task, TaskRuns] = {}
        self._futures: dict[Future[Result], tuple[Task, int, int]] = {}
        self.num_runs = 0

    def run(self, tasks: Iterable[Task]) -> None:
        """Measures tasks; those that are complete already cost nothing.

        Raises:
            EvaluationError: A file is of other settings; nothing was run.
        """
        waiting = deque(
            load_task(task, self._directory, self._scale) or TaskRuns(task) for task in tasks
        )
        self._progress.update(self._bar, total=len(waiting) * self._num_expected)
        while waiting or self._futures:
            while waiting and len(self._futures) < 2 * self._num_processes and self._has_time:
                self._begin(waiting.popleft())
            if not self._has_time:
                self._cancel()
                waiting.clear()
            for future in wait(self._futures, self._left_s, FIRST_COMPLETED).done:
                self._take(future)

    @property
    def _num_expected(self) -> int:
        return _EXPECTED_RUNS * self._scale.num_seeds

    @property
    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline_s

    @property
    def _left_s(self) -> float | None:
        """Until it is time to stop; None if it never is, or is over."""
        left_s = self._deadline_s - time.monotonic()
        return left_s if 0 < left_s < math.inf else None

    def _begin(self, measured: TaskRuns) -> None:
        self._active[measured.task] = measured
        self._go_on(measured.task)

    def _go_on(self, task: Task) -> None:
        """Submits what a task needs next, or ends it."""
        wanted = self._active[task].wanted(self._scale)
        if wanted and self._has_time:
            study = self._scale.study(task)
            for step, seed in wanted:
                future = self._pool.submit(_run, study, Cell(task.policy, grid_rate(step), seed))
                self._futures[future] = task, step, seed
        else:
            # The bar expected so many runs of it.
            surplus = len(self._active.pop(task).runs) - self._num_expected
            bar = self._progress.tasks[self._bar]
            self._progress.update(self._bar, total=(bar.total or 0) + surplus)

    def _take(self, future: Future[Result]) -> None:
        task, step, seed = self._futures.pop(future)
        measured = self._active[task]
        measured.runs[step, seed] = {**future.result(), "git_sha": self._git_sha}
        save_task(measured, self._directory, self._scale)
        self.num_runs += 1
        text = f"{task.cell} {task.levers} {task.policy} {grid_rate(step):.3g} req/s"
        self._progress.update(self._bar, advance=1, description=text)
        if not any(other == task for other, _, _ in self._futures.values()):
            self._go_on(task)

    def _cancel(self) -> None:
        """Drops what has not begun."""
        self._futures = {f: run for f, run in self._futures.items() if not f.cancel()}


def _run(study: Study, cell: Cell) -> Result:
    return brief(run_cell(study, cell))


def is_complete(measured: TaskRuns | None, scale: Scale) -> bool:
    """Nothing is left to measure of a task."""
    return measured is not None and not measured.wanted(scale)
