"""What a run measured: the score of each request and the run's figures. Pure.

Names follow vLLM; scoring is stricter than vLLM's, see `SloScore.is_met`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf.latency import RequestRecord, measure


class ScoreError(ValueError):
    """Bounds that do not go together."""


@dataclass(frozen=True, slots=True)
class SloScore:
    """How requests are scored; a bound of None is not asked.

    Attributes:
        ttft_ms: Bound on TTFT.
        tpot_ms: Bound on TPOT *and* on serial TPOT: over all tokens alone, branches that merely
            overlap would pass.
        e2el_ms: Bound on the end-to-end latency.
        stretch: Bound on the stretch, relative to `tpot_ms`.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    stretch: float | None = None

    def __post_init__(self) -> None:
        if self.stretch is not None and self.tpot_ms is None:
            raise ScoreError(
                "stretch is relative to TPOT: give --slo-tpot-ms, or tpot in --goodput"
            )

    @property
    def is_set(self) -> bool:
        """Anything is asked."""
        return (self.ttft_ms, self.tpot_ms, self.e2el_ms) != (None, None, None)

    def is_met(self, record: RequestRecord) -> bool:
        """Scores one request; one that did not complete is a miss, whatever it delivered."""
        latency = measure(record)
        if latency is None or not record.is_completed:
            return False
        stretch = None
        if self.stretch is not None and self.tpot_ms is not None:
            stretch = latency.stretch(record.critical_tokens, self.tpot_ms)
        return (
            _within(latency.ttft_ms, self.ttft_ms)
            and _within(latency.tpot_ms, self.tpot_ms)
            and _within(latency.serial_tpot_ms, self.tpot_ms)
            and _within(latency.e2el_ms, self.e2el_ms)
            and _within(stretch, self.stretch)
        )


def _within(value: float | None, bound: float | None) -> bool:
    """A condition without a value is vacuous: a single token has no interval."""
    return value is None or bound is None or value <= bound


# ------------------------------------------------------------------------------- figures of a run


def victims(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Plain requests whose decode overlapped that of a branching one."""
    spans = [_decode_span_s(r) for r in records if r.is_branching and r.events]
    found = []
    for record in records:
        if record.is_branching or not record.events:
            continue
        first_s, last_s = _decode_span_s(record)
        if any(start <= last_s and first_s <= end for start, end in spans):
            found.append(record)
    return found


def _decode_span_s(record: RequestRecord) -> tuple[float, float]:
    times_s = [event.time_s for event in record.events]
    return min(times_s), max(times_s)


def scored(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """The requests that count: all that arrived, except those the client itself withdrew."""
    return [record for record in records if not record.was_cancelled]


def attainment(records: Sequence[RequestRecord], slo: SloScore) -> float | None:
    """Share of requests that met the objective; None without requests."""
    if not records:
        return None
    return sum(slo.is_met(record) for record in records) / len(records)


def group_figures(
    records: Sequence[RequestRecord], slo: SloScore, percentiles: Sequence[float]
) -> dict[str, Any]:
    """Latency figures of a set of requests, by vLLM's names; `slo_attainment` if asked."""
    pairs = [(r, m) for r in records if r.is_completed and (m := measure(r)) is not None]
    latencies = [m for _, m in pairs]
    columns: dict[str, Sequence[float | None]] = {
        "ttft_ms": [m.ttft_ms for m in latencies],
        "tpot_ms": [m.tpot_ms for m in latencies],
        "itl_ms": [gap for m in latencies for gap in m.itl_ms],
        "e2el_ms": [m.e2el_ms for m in latencies],
        "serial_tpot_ms": [m.serial_tpot_ms for m in latencies],
        "branch_tpot_ms": [m.branch_tpot_ms for m in latencies],
        "critical_tpot_ms": [m.critical_tpot_ms for m in latencies],
        "parallel_stage_ms": [m.parallel_stage_ms for m in latencies],
    }
    if slo.tpot_ms is not None:
        columns["stretch"] = [m.stretch(r.critical_tokens, slo.tpot_ms) for r, m in pairs]
    figures: dict[str, Any] = {"num_requests": len(records)}
    if slo.is_set:
        figures["slo_attainment"] = attainment(records, slo)
    for name, values in columns.items():
        figures |= describe(name, [v for v in values if v is not None], percentiles)
    return figures


def describe(
    name: str, values: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles under vLLM's keys; None without values."""
    column = np.asarray(values, dtype=np.float64)
    empty = not len(column)
    figures = {
        f"mean_{name}": None if empty else float(column.mean()),
        f"median_{name}": None if empty else float(np.median(column)),
        f"std_{name}": None if empty else float(column.std()),
    }
    for p in percentiles:
        figures[f"p{p:g}_{name}"] = None if empty else float(np.percentile(column, p))
    return figures


def goodput(
    records: Sequence[RequestRecord], slo: SloScore, window_s: float
) -> dict[str, float | None]:
    """Request and token goodput and attainment over a window of arrivals.

    The window is that of the arrivals, not of the run: with the latter, one long request that
    drains after the last arrival would count against every other.
    """
    if not slo.is_set:
        return {"request_goodput": None, "token_goodput": None, "slo_attainment": None}
    counted = scored(records)
    met = [record for record in counted if slo.is_met(record)]
    return {
        "request_goodput": len(met) / window_s,
        "token_goodput": sum(record.num_output_tokens for record in met) / window_s,
        "slo_attainment": attainment(counted, slo),
    }
