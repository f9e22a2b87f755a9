"""Policies on a live engine and on its simulation, in one process, for `perf.gpu`.

The same executor, loop, requests and scoring run both; only the engine below them differs. There
is no server and no client between: requests arrive by an absolute schedule, and who is due during a
step is there after it, as in a server. The host time that the loop itself adds to a step is
measured first, on plain requests. The load follows from the measured profile and irp-eager in
simulation, so that no result of another policy has a part in its choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perf.host_gap import host_ms
from perf.offered_load import Offer
from perf.program import critical_tokens
from perf.regime import Regime
from perf.simulated_result import run_figures
from perf.simulation import Deployment, SimulatedRequest, WaitingEngine, counterpart, replay
from perf.workload import (
    DEFAULT_TRACE,
    Workload,
    WorkloadConfig,
    build_workload,
)
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import SchedulerConfig, ServingConfig
from taper_trtllm.engines.base import Engine, EngineCapabilities
from taper_trtllm.engines.simulated import SimulatedEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.profile import LatencyProfile
from taper_trtllm.request import RequestLimits, SloTarget, max_new_tokens
from taper_trtllm.step_trace import record_json

EAGER = "irp-eager"
CROSSING = 0.95  # eager crosses the objective where it meets less than this share
LOADS_OF_CROSSING = (1.0, 1.3)  # that are measured, in loads at which it crosses
LOADS = tuple(np.round(np.arange(0.4, 2.01, 0.1), 1).tolist())  # that are tried, in R0
_HOST_POLICY = "taper:uncorrected"  # predicts by the profile alone
_HOST_TOKENS = 96  # of a plain request
_LEAST_HOST_REQUESTS = 8
_TOKENS_PER_PREFILL_STEP = 512
_NO_SLO = SloTarget(ttft_ms=1e9, tpot_ms=1e9)


class LentEngine:
    """A real engine, lent to one run: with the run's pool, and able to wait.

    Args:
        engine: Keeps its model, and goes on to live afterwards.
        num_kv_blocks: Size of the pool that the run sees, at most the engine's own.
    """

    def __init__(self, engine: Engine, num_kv_blocks: int) -> None:
        self._engine = engine
        self._num_withheld = engine.capabilities.num_kv_blocks - num_kv_blocks
        self.capabilities: EngineCapabilities = replace(
            engine.capabilities, num_kv_blocks=num_kv_blocks
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def num_free_blocks(self) -> int:
        """See `Engine`: of the pool that the run sees."""
        return self._engine.num_free_blocks - self._num_withheld

    def advance_to(self, time_s: float) -> None:
        """See `WaitingEngine`."""
        time.sleep(max(0.0, time_s - self._engine.now_s()))

    def shutdown(self) -> None:
        """See `Engine`: the engine is the lender's."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What all runs have in common.

    Attributes:
        regime: Slots, memory, objectives.
        base: Configuration that the regime builds on.
        profile: Of the engine in this loop: host time included.
        dataset_path: Trace that is replayed.
        window_s: Length of the arrivals of a run.
    """

    regime: Regime
    base: ServingConfig
    profile: LatencyProfile
    dataset_path: Path = DEFAULT_TRACE
    window_s: float = 20.0

    def workload(self, load: float, seed: int) -> Workload:
        """Requests at a multiple of R0; equal seeds give equal ones."""
        rate = load * self.regime.reference_rate
        num_requests = max(2, round(self.window_s * rate))
        config = self.regime.workload_config(self.base, self.dataset_path, rate, num_requests, seed)
        return build_workload(config)

    def deployment(self, policy: str) -> Deployment:
        """The simulated counterpart of the live engine."""
        config = self.regime.serving_config(self.base, policy, Path())
        return Deployment(
            self.profile, self.profile, counterpart(config.engine), config.scheduler, config.slo,
            config.limits,
        )  # fmt: skip


def simulate_cell(experiment: Experiment, policy: str, load: float, seed: int) -> dict[str, Any]:
    """One run in virtual time; the result is that of `run_cell`."""
    engine = experiment.deployment(policy).make_engine()
    assert isinstance(engine, SimulatedEngine)
    return run_cell(experiment, engine, policy, load, seed)


def live_cell(
    experiment: Experiment, engine: Engine, policy: str, load: float, seed: int
) -> dict[str, Any]:
    """One run on a real engine."""
    lent = LentEngine(engine, experiment.regime.num_kv_blocks)
    return run_cell(experiment, lent, policy, load, seed)


def run_cell(
    experiment: Experiment, engine: WaitingEngine, policy: str, load: float, seed: int
) -> dict[str, Any]:
    """One policy at one load.

    Arrivals last for the window; the run goes on until every request is done, or can no longer meet
    its objective. The engine is left without sequences.

    Returns:
        Figures by the names of `perf.simulate`, with ``mean_step_ms`` and ``mean_batch_size`` of
        all steps and ``duration_s`` of the run; ``mean_width`` is that of branching requests.
    """
    deployment = experiment.deployment(policy)
    workload = experiment.workload(load, seed)
    executor = TaperExecutor(
        engine, experiment.profile, deployment.scheduler, deployment.limits, deployment.slo
    )
    steps: list[StepRecord] = []
    executor.add_step_observer(steps.append)
    start_s = engine.now_s()
    arrivals = [
        (start_s + r.arrival_s, Offer(r.request, r.family, critical_tokens(r.request.program)))
        for r in workload.requests
    ]
    requests = replay(executor, engine, arrivals, _deadline_s(arrivals, deployment.slo))
    # One step that outlasts every deadline would leave some that were never taken in.
    missed = [SimulatedRequest(offer, at) for at, offer in arrivals[len(requests) :]]
    end(executor, [r.offer.request.request_id for r in requests if r.metrics is None])
    rate = load * experiment.regime.reference_rate
    figures = run_figures([*requests, *missed], deployment.slo.tpot_ms, len(arrivals) / rate)
    return {
        "policy": policy,
        "load": load,
        "request_rate": rate,
        "num_prompts": len(arrivals),
        "seed": seed,
        **figures,
        "mean_width": figures["groups"]["branching"]["mean_width"],
        "mean_step_ms": float(np.mean([step.step_ms for step in steps])),
        "mean_batch_size": float(np.mean([step.num_admitted for step in steps])),
        "num_steps": len(steps),
        "duration_s": engine.now_s() - start_s,
    }


def _deadline_s(arrivals: Sequence[tuple[float, Offer]], slo: SloTarget) -> float:
    """When no request can be open any more that still meets its objective."""
    return max(
        at + (slo.ttft_ms + slo.tpot_ms * max_new_tokens(offer.request.program)) / 1e3
        for at, offer in arrivals
    )


def end(executor: TaperExecutor, request_ids: Sequence[str]) -> None:
    """Withdraws requests that are open, so that the engine holds nothing."""
    for request_id in request_ids:
        executor.cancel(request_id)
    while executor.num_open_requests:
        executor.run_once()


# -------------------------------------------------------------------------------- before the runs


def measure_host_ms(profile: LatencyProfile, engine: Engine, num_requests: int) -> float:
    """What the loop adds to a step of so many plain requests; see `host_gap.host_ms`."""
    num_requests = max(_LEAST_HOST_REQUESTS, num_requests)
    scheduler = SchedulerConfig(
        policy=_HOST_POLICY,
        max_num_requests=num_requests,
        max_batch_size=max(num_requests, SchedulerConfig().max_batch_size),
        max_prefill_tokens=_TOKENS_PER_PREFILL_STEP,
        request_admission="slots",
    )
    workload = build_workload(
        WorkloadConfig(
            dataset_name="random",
            num_prompts=2 * num_requests,
            input_len=_HOST_TOKENS,
            output_len=_HOST_TOKENS,
            vocab_size=engine.capabilities.vocab_size,
        )
    )
    footprint = sum(
        serial_footprint_blocks(
            len(r.request.input_ids), r.request.program, engine.capabilities.tokens_per_block
        )
        for r in workload.requests
    )
    lent = LentEngine(engine, min(footprint, engine.capabilities.num_kv_blocks))
    executor = TaperExecutor(lent, profile, scheduler, RequestLimits(), _NO_SLO)
    steps: list[dict[str, Any]] = []
    executor.add_step_observer(lambda record: steps.append(record_json(record)))
    for request in workload.requests:
        executor.submit(request.request, lambda output: None)
    while executor.num_open_requests:
        executor.run_once()
    return host_ms(steps)


def crossing_load(experiment: Experiment, seeds: Sequence[int]) -> float:
    """Least of `LOADS` at which simulated irp-eager crosses; the highest if it never does."""
    for load in LOADS:
        results = [simulate_cell(experiment, EAGER, load, seed) for seed in seeds]
        if float(np.mean([result["slo_attainment"] for result in results])) < CROSSING:
            return load
    return LOADS[-1]
