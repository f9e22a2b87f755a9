"""One run of the executor in virtual time: requests in, what each of them got out.

The executor, its policies and its predictor are those that serve; the engine below them
(`engines/simulated.py`) takes its step times from a profile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from perf.program import critical_tokens
from perf.workload import WorkloadRequest
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.simulated import SimulatedConfig, SimulatedEngine
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
    """

    profile: LatencyProfile
    truth: LatencyProfile
    engine: SimulatedConfig
    scheduler: SchedulerConfig
    slo: SloTarget


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """What one request got.

    Attributes:
        family: Kind of request, as the workload names it.
        is_branching: Its program has a parallel stage.
        arrival_s: When it arrived.
        critical_tokens: Decoded tokens on its longest path.
        metrics: The server's account of it; None if it had not finished when the run ended.
    """

    family: str
    is_branching: bool
    arrival_s: float
    critical_tokens: int
    metrics: RequestMetrics | None

    @property
    def is_met(self) -> bool:
        """It finished and met its objective."""
        return self.metrics is not None and self.metrics.slo_met


def simulate(
    deployment: Deployment,
    requests: Iterable[WorkloadRequest],
    end_s: float,
    scored_until_s: float = float("inf"),
    observe: Callable[[StepRecord], None] | None = None,
) -> list[SimulatedRequest]:
    """Runs requests from time 0 until those that are scored are done, at most until `end_s`.

    Args:
        deployment: The server.
        requests: In order of arrival.
        end_s: Requests that are open then stay without metrics.
        scored_until_s: Requests that arrive later only keep the load up.
        observe: Called with the record of every step.

    Returns:
        One entry per request, in order.
    """
    requests = list(requests)
    engine = SimulatedEngine(deployment.truth, deployment.engine)
    limits = RequestLimits(
        max_prompt_tokens=deployment.engine.max_seq_len,
        max_total_tokens=deployment.engine.max_seq_len,
        max_queue_length=len(requests) + 1,
    )
    executor = TaperExecutor(
        engine, deployment.profile, deployment.scheduler, limits, deployment.slo
    )
    if observe is not None:
        executor.add_step_observer(observe)
    finished: dict[str, RequestMetrics | None] = {}
    awaited = {r.request.request_id for r in requests if r.arrival_s < scored_until_s}

    def take(output: RequestOutput) -> None:
        if output.finished:
            completed = output.finish_reason == "completed"
            finished[output.request_id] = output.metrics if completed else None
            awaited.discard(output.request_id)

    arrivals = deque(requests)
    while engine.now_s() < end_s and awaited:
        while arrivals and arrivals[0].arrival_s <= engine.now_s():
            arrival = arrivals.popleft()
            executor.submit(arrival.request, take, arrival.arrival_s)
        if executor.run_once() is None and arrivals:
            engine.advance_to(arrivals[0].arrival_s)
    return [
        SimulatedRequest(
            family=r.family,
            is_branching=any(s.type == "parallel" for s in r.request.program),
            arrival_s=r.arrival_s,
            critical_tokens=critical_tokens(r.request.program),
            metrics=finished.get(r.request.request_id),
        )
        for r in requests
    ]
