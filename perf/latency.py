"""What a client saw of one request, and the latencies in it. Pure.

Latencies count from the moment a request was sent; the delay between its place in the schedule and
that moment is the client's and is reported apart (`client_queue_ms`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one branch, as the client received them.

    Attributes:
        time_s: When the response arrived.
        branch_path: ``""`` is the request itself (`taper_trtllm/output.py`).
        stage_index: Stage of that branch's program.
        num_tokens: Tokens in the response.
    """

    time_s: float
    branch_path: str
    stage_index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the client saw it; times are on one monotonic clock.

    Attributes:
        request_id: Its id.
        family: Kind of request, as the workload names it.
        is_branching: Its program has a parallel stage.
        num_prompt_tokens: Prompt length.
        critical_tokens: Decoded tokens on the longest path of its program.
        scheduled_s: When it was due.
        sent_s: When it was sent.
        end_s: When its stream ended.
        events: Its tokens, in order of time.
        finish_reason: As the server said; None if no final response came.
        error: Why it failed.
        was_cancelled: The client withdrew it on purpose.
        server_metrics: The server's `RequestMetrics` of it.
    """

    request_id: str
    family: str
    is_branching: bool
    num_prompt_tokens: int
    critical_tokens: int
    scheduled_s: float
    sent_s: float
    end_s: float
    events: tuple[TokenEvent, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    was_cancelled: bool = False
    server_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        """All its tokens arrived."""
        return self.finish_reason == "completed" and bool(self.events)

    @property
    def num_output_tokens(self) -> int:
        """Tokens received over all branches."""
        return sum(event.num_tokens for event in self.events)


@dataclass(frozen=True, slots=True)
class RequestLatency:
    """Latencies of a request that received a token; None where there is nothing to measure.

    Attributes:
        ttft_ms: Sent to first token.
        e2el_ms: Sent to last token.
        tpot_ms: (last - first token) / (n - 1) over all tokens; None for one token.
        serial_tpot_ms: Inside the top-level serial stages: first to last token of each, summed,
            over their summed intervals; None without any interval.
        branch_tpot_ms: The same over the stages of branches.
        critical_tpot_ms: (last - first token) / (critical-path tokens - 1).
        parallel_stage_ms: First to last token of each top-level parallel stage, summed; None
            without one.
        itl_ms: Gaps between the responses.
    """

    ttft_ms: float
    e2el_ms: float
    tpot_ms: float | None
    serial_tpot_ms: float | None
    branch_tpot_ms: float | None
    critical_tpot_ms: float | None
    parallel_stage_ms: float | None
    itl_ms: tuple[float, ...]

    def stretch(self, critical_tokens: int, tpot_slo_ms: float) -> float:
        """End-to-end latency over what the critical path would take at the TPOT objective."""
        return self.e2el_ms / (critical_tokens * tpot_slo_ms)


def measure(record: RequestRecord) -> RequestLatency | None:
    """Measures one request; None if no token arrived."""
    if not record.events:
        return None
    times_s = sorted({event.time_s for event in record.events})
    first_s, last_s = times_s[0], times_s[-1]
    decode_ms = 1e3 * (last_s - first_s)
    stages: dict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
    parallel: dict[str, list[float]] = defaultdict(list)
    for event in record.events:
        stages[event.branch_path, event.stage_index].append(event)
        if event.branch_path:
            parallel[event.branch_path.split(".")[0]].append(event.time_s)
    return RequestLatency(
        ttft_ms=1e3 * (first_s - record.sent_s),
        e2el_ms=1e3 * (last_s - record.sent_s),
        tpot_ms=_per_interval(decode_ms, record.num_output_tokens - 1),
        serial_tpot_ms=_stage_tpot_ms(e for (path, _), e in stages.items() if not path),
        branch_tpot_ms=_stage_tpot_ms(e for (path, _), e in stages.items() if path),
        critical_tpot_ms=_per_interval(decode_ms, record.critical_tokens - 1),
        parallel_stage_ms=(
            sum(1e3 * (max(t) - min(t)) for t in parallel.values()) if parallel else None
        ),
        itl_ms=tuple(1e3 * np.diff(times_s)),
    )


def _per_interval(elapsed_ms: float, num_intervals: int) -> float | None:
    return elapsed_ms / num_intervals if num_intervals > 0 else None


def _stage_tpot_ms(stages: Iterable[list[TokenEvent]]) -> float | None:
    elapsed_ms, num_intervals = 0.0, 0
    for events in stages:
        times_s = [event.time_s for event in events]
        elapsed_ms += 1e3 * (max(times_s) - min(times_s))
        num_intervals += sum(event.num_tokens for event in events) - 1
    return _per_interval(elapsed_ms, num_intervals)
