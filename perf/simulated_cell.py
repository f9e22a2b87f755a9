"""One cell of a simulation study: a policy at a rate on a seed, and many of them on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context

from rich.progress import Progress

from perf.offered_load import LoadConfig, OfferedLoad
from perf.simulated_result import Result, StepTotals, run_figures
from perf.simulation import Deployment, simulate
from perf.virtual_trtllm import VirtualTrtllmEngine
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.simulated import SimulatedEngine


@dataclass(frozen=True, slots=True)
class Study:
    """What all cells have in common.

    Attributes:
        deployment: The server; each policy puts its own scheduler into it.
        policies: Scheduler by the name that results carry.
        load: What arrives.
        warmup_s: Arrivals before the scored window.
        duration_s: Length of the scored window.
        drain_s: How long scored requests may take after it; arrivals go on meanwhile.
    """

    deployment: Deployment
    policies: dict[str, SchedulerConfig]
    load: LoadConfig
    warmup_s: float
    duration_s: float
    drain_s: float


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One run."""

    policy: str
    request_rate: float
    seed: int


def deployment_of(study: Study, cell: Cell) -> Deployment:
    """The server of a cell."""
    return replace(
        study.deployment,
        scheduler=study.policies[cell.policy],
        engine=replace(study.deployment.engine, seed=cell.seed),
    )


def run_cell(
    study: Study,
    cell: Cell,
    observe: Callable[[StepRecord], None] | None = None,
    engine: SimulatedEngine | VirtualTrtllmEngine | None = None,
) -> Result:
    """Simulates a cell.

    Args:
        study: What it is part of.
        cell: Which one.
        observe: Called with the record of every step.
        engine: See `simulate`; one of `deployment_of`.
    """
    load = _offered_load(study.load, cell.seed)
    deployment = deployment_of(study, cell)
    start_s, end_s = study.warmup_s, study.warmup_s + study.duration_s
    totals = StepTotals(start_s, end_s, deployment.engine.num_kv_blocks)

    def note(record: StepRecord) -> None:
        totals.add(record)
        if observe is not None:
            observe(record)

    arrivals = load.arrivals(cell.request_rate)
    arrived = simulate(deployment, arrivals, end_s + study.drain_s, end_s, note, engine)
    scored = [r for r in arrived if start_s <= r.arrival_s < end_s]
    return {
        "policy": cell.policy,
        "request_rate": cell.request_rate,
        "seed": cell.seed,
        **run_figures(scored, deployment.slo.tpot_ms, study.duration_s),
        "num_dropped": load.num_dropped(len(arrived)),
        **totals.figures(),
    }


@lru_cache(maxsize=16)
def _offered_load(config: LoadConfig, seed: int) -> OfferedLoad:
    """A seed's requests are built once in a process and used by all its cells."""
    return OfferedLoad(config, seed)


class CellRunner:
    """Runs cells on worker processes; every result is kept.

    Args:
        study: What they are part of.
        pool: Processes of `worker_pool`.
        progress: Shows how many of the cells asked for are done.
    """

    def __init__(self, study: Study, pool: ProcessPoolExecutor, progress: Progress) -> None:
        self._study = study
        self._pool = pool
        self._progress = progress
        self._task = progress.add_task("", total=0)
        self._results: dict[Cell, Result] = {}

    def run(self, cells: Iterable[Cell]) -> None:
        """Runs those of the cells that have no result yet."""
        missing = sorted(set(cells) - self._results.keys(), key=lambda c: (c.seed, c))
        futures: dict[Future[Result], Cell] = {
            self._pool.submit(_run_in_worker, cell): cell for cell in missing
        }
        self._progress.update(self._task, total=len(self._results) + len(missing))
        for future in as_completed(futures):
            cell = futures[future]
            self._results[cell] = future.result()
            self._progress.update(
                self._task, advance=1, description=f"{cell.policy} {cell.request_rate:.3g} req/s"
            )

    @property
    def results(self) -> dict[Cell, Result]:
        """Of all cells so far, in order of policy, rate and seed."""
        order = list(self._study.policies)
        return dict(
            sorted(
                self._results.items(),
                key=lambda item: (order.index(item[0].policy), item[0].request_rate, item[0].seed),
            )
        )


@contextmanager
def worker_pool(num_processes: int, study: Study | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that simulate cells, of one study if it is given.

    What is queued is dropped on an exception.
    """
    # Spawned, since a progress bar's thread may hold a lock at the moment of a fork.
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), _start_worker, (study,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_study: Study | None  # of a worker process


def _start_worker(study: Study | None) -> None:
    global _study
    _study = study


def _run_in_worker(cell: Cell) -> Result:
    assert _study is not None
    return run_cell(_study, cell)
