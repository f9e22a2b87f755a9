"""One run of the executor: requests in, what each of them got out.

`simulate` runs in virtual time, and `replay` on any engine that can let time pass.

The executor, its policies and its predictor are those that serve; the engine below them
(`engines/simulated.py`) takes its step times from a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from perf.offered_load import Offer
from perf.virtual_trtllm import Leases, VirtualTrtllmEngine
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import SchedulerConfig, TorchEngineConfig
from taper_trtllm.engines.base import Engine
from taper_trtllm.engines.simulated import Disturbance, SimulatedConfig, SimulatedEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.output import RequestMetrics, RequestOutput
from taper_trtllm.profile import LatencyProfile
from taper_trtllm.request import RequestLimits, SloTarget


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a simulated server is made of.

    Attributes:
        profile: What the executor is told of step times.
        truth: What they are; the same profile unless the executor is to be misled.
        engine: Memory, prefill, disturbances.
        scheduler: Policy and limits of a step.
        slo: Objective of every request.
        limits: What one request may ask for.
        leases: The adapter of compiled engines runs on the fake executor; None for the simulated
            engine, which does every step as planned.
    """

    profile: LatencyProfile
    truth: LatencyProfile
    engine: SimulatedConfig
    scheduler: SchedulerConfig
    slo: SloTarget
    limits: RequestLimits
    leases: Leases | None = None

    def make_engine(self) -> SimulatedEngine | VirtualTrtllmEngine:
        """The engine, at time 0 or a little later."""
        if self.leases is None:
            return SimulatedEngine(self.truth, self.engine)
        return VirtualTrtllmEngine(self.truth, self.engine, self.leases)


def counterpart(engine: TorchEngineConfig, host_overhead_ms: float = 0.0) -> SimulatedConfig:
    """A simulated engine with the memory, limits and attention of a live one.

    Args:
        engine: The live one.
        host_overhead_ms: Of a step, beyond what the profile knows.
    """
    return SimulatedConfig(
        num_kv_blocks=engine.num_kv_blocks,
        tokens_per_block=engine.tokens_per_block,
        max_batch_size=engine.max_batch_size,
        max_seq_len=engine.max_seq_len,
        prefix_sharing_attention=engine.prefix_sharing_attention,
        disturbance=Disturbance(host_overhead_ms=host_overhead_ms),
    )


@dataclass(slots=True)
class SimulatedRequest:
    """What one request got.

    Attributes:
        offer: What was asked for.
        arrival_s: When it arrived, on the engine's clock.
        end_s: When it finished; None if it had not when the run ended.
        metrics: The server's account of it, once it finished.
    """

    offer: Offer
    arrival_s: float
    end_s: float | None = None
    metrics: RequestMetrics | None = None

    @property
    def is_met(self) -> bool:
        """It finished and met its objective."""
        return self.metrics is not None and self.metrics.slo_met


class WaitingEngine(Engine, Protocol):
    """An engine that can let time pass without work."""

    def advance_to(self, time_s: float) -> None:
        """Returns when the engine's clock shows that time."""


def simulate(
    deployment: Deployment,
    arrivals: Iterable[tuple[float, Offer]],
    end_s: float,
    scored_until_s: float = float("inf"),
    observe: Callable[[StepRecord], None] | None = None,
    engine: SimulatedEngine | VirtualTrtllmEngine | None = None,
) -> list[SimulatedRequest]:
    """Runs requests from time 0 until those that are scored are done, at most until `end_s`.

    Args:
        deployment: The server.
        arrivals: Arrival times and requests in order of arrival; may be endless.
        end_s: Requests that are open then stay without metrics.
        scored_until_s: Requests that arrive later only keep the load up.
        observe: Called with the record of every step.
        engine: A fresh one of the deployment's, to be looked at afterwards; made here by default.

    Returns:
        One entry per request that arrived, in order.
    """
    engine = engine or deployment.make_engine()
    executor = TaperExecutor(
        engine, deployment.profile, deployment.scheduler, deployment.limits, deployment.slo
    )
    if observe is not None:
        executor.add_step_observer(observe)
    return replay(executor, engine, arrivals, end_s, scored_until_s)


def replay(
    executor: TaperExecutor,
    engine: WaitingEngine,
    arrivals: Iterable[tuple[float, Offer]],
    end_s: float,
    scored_until_s: float = float("inf"),
) -> list[SimulatedRequest]:
    """Drives an executor, open loop: who arrives during a step is there after it.

    Args:
        executor: Driven; requests that are open at the end stay so.
        engine: The executor's.
        arrivals: See `simulate`; times are on the engine's clock.
        end_s: See `simulate`.
        scored_until_s: See `simulate`.

    Returns:
        See `simulate`.
    """
    arrived: list[SimulatedRequest] = []
    open_scored: set[str] = set()

    def submit(request: SimulatedRequest) -> None:
        def take(output: RequestOutput) -> None:
            if output.finish_reason == "completed":
                request.end_s, request.metrics = engine.now_s(), output.metrics
            if output.finished:
                open_scored.discard(output.request_id)

        arrived.append(request)
        if request.arrival_s < scored_until_s:
            open_scored.add(request.offer.request.request_id)
        executor.submit(request.offer.request, take, request.arrival_s)

    upcoming = iter(arrivals)
    following = next(upcoming, None)
    while engine.now_s() < end_s:
        while following is not None and following[0] <= engine.now_s():
            submit(SimulatedRequest(following[1], following[0]))
            following = next(upcoming, None)
        if not open_scored and (following is None or following[0] >= scored_until_s):
            break
        if executor.run_once() is None and following is not None:
            engine.advance_to(following[0])
    return arrived
