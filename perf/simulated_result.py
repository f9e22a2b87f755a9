"""What a simulated run measured: figures by the names of `bench_serving`, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from perf.metrics import describe
from perf.simulation import SimulatedRequest
from taper_trtllm.batch import StepRecord

Result = dict[str, Any]

_PERCENTILES = (50, 95, 99)


class StepTotals:
    """Adds up the steps of the scored window; register `add` as an observer.

    Args:
        start_s: Begin of the window.
        end_s: Its end.
        num_kv_blocks: Size of the KV pool.
    """

    def __init__(self, start_s: float, end_s: float, num_kv_blocks: int) -> None:
        self._window = start_s, end_s
        self._num_kv_blocks = num_kv_blocks
        self._num_steps = self._num_sequences = self._num_queued = self._num_preempted = 0
        self._step_ms = 0.0
        self._used_blocks = 0

    def add(self, record: StepRecord) -> None:
        """Counts a step."""
        start_s, end_s = self._window
        if start_s <= record.completed_at_s < end_s:
            self._num_steps += 1
            self._num_sequences += record.num_admitted
            self._num_queued += record.num_queued
            self._num_preempted += record.num_preempted
            self._step_ms += record.step_ms
            self._used_blocks += self._num_kv_blocks - record.num_free_blocks

    def figures(self) -> dict[str, float]:
        """Means per step: what the server was busy with and what was full."""
        steps = max(1, self._num_steps)
        return {
            "mean_step_ms": self._step_ms / steps,
            "mean_batch_size": self._num_sequences / steps,
            "mean_queue_length": self._num_queued / steps,
            "mean_kv_cache_usage": self._used_blocks / steps / self._num_kv_blocks,
            "num_preempted": self._num_preempted,
        }


def run_figures(
    requests: Sequence[SimulatedRequest], tpot_slo_ms: float, window_s: float
) -> Result:
    """Figures of the scored requests; those that did not finish are misses.

    Args:
        requests: That arrived in the scored window.
        tpot_slo_ms: tau, for the stretch.
        window_s: Length of the window.
    """
    met = [r for r in requests if r.is_met]
    branching = [r for r in requests if r.offer.is_branching]
    plain = [r for r in requests if not r.offer.is_branching]
    tokens = sum(r.metrics.num_output_tokens for r in met if r.metrics is not None)
    figures = _group_figures(requests, tpot_slo_ms)
    return {
        "slo_attainment": figures.pop("slo_attainment"),
        "request_goodput": len(met) / window_s,
        "token_goodput": tokens / window_s,
        "num_requests": figures.pop("num_requests"),
        "num_unfinished": sum(r.metrics is None for r in requests),
        **figures,
        "groups": {
            "plain": _group_figures(plain, tpot_slo_ms),
            "branching": _group_figures(branching, tpot_slo_ms),
            "victims": _group_figures(_victims(plain, branching), tpot_slo_ms),
        },
    }


def _group_figures(requests: Sequence[SimulatedRequest], tpot_slo_ms: float) -> Result:
    done = [(r, r.metrics, r.end_s) for r in requests if r.metrics is not None and r.end_s]
    columns: dict[str, list[float | None]] = {
        "ttft_ms": [m.ttft_ms for _, m, _ in done],
        "tpot_ms": [m.tpot_ms for _, m, _ in done],
        "serial_tpot_ms": [m.serial_tpot_ms for _, m, _ in done],
        "e2el_ms": [1e3 * (end_s - r.arrival_s) for r, _, end_s in done],
        "stretch": [
            1e3 * (end_s - r.arrival_s) / (r.offer.critical_tokens * tpot_slo_ms)
            for r, _, end_s in done
        ],
    }
    figures: Result = {
        "num_requests": len(requests),
        "slo_attainment": sum(r.is_met for r in requests) / len(requests) if requests else None,
    }
    for name, column in columns.items():
        figures |= describe(name, [v for v in column if v is not None], _PERCENTILES)
    metrics = [m for _, m, _ in done]
    counts: dict[str, list[float]] = {
        "mean_width": [m.mean_width for m in metrics],
        "mean_join_wait_ms": [m.join_wait_ms for m in metrics],
        "mean_deferred_branch_steps": [m.num_deferred_branch_steps for m in metrics],
    }
    return figures | {k: float(np.mean(v)) if v else None for k, v in counts.items()}


def _victims(
    plain: Sequence[SimulatedRequest], branching: Sequence[SimulatedRequest]
) -> list[SimulatedRequest]:
    """Finished plain requests whose decode overlapped that of a finished branching one."""
    plain = [r for r in plain if r.metrics is not None]
    spans, others = _decode_spans_s(plain), _decode_spans_s(branching)
    overlaps = (spans[:, None, 0] <= others[None, :, 1]) & (others[None, :, 0] <= spans[:, None, 1])
    return [r for r, hit in zip(plain, overlaps.any(axis=1), strict=True) if hit]


def _decode_spans_s(requests: Sequence[SimulatedRequest]) -> npt.NDArray[np.float64]:
    """[finished, 2] first and last token."""
    spans = [
        (r.arrival_s + r.metrics.ttft_ms / 1e3, r.end_s)
        for r in requests
        if r.metrics is not None and r.metrics.ttft_ms is not None
    ]
    return np.array(spans, dtype=np.float64).reshape(-1, 2)


# --------------------------------------------------------------------------------------- tables

_ROWS: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("requests/s", ("request_rate",), 1, ".3g"),
    ("SLO attainment (%)", ("slo_attainment",), 100, ".1f"),
    ("  plain", ("groups", "plain", "slo_attainment"), 100, ".1f"),
    ("  branching", ("groups", "branching", "slo_attainment"), 100, ".1f"),
    ("token goodput (tok/s)", ("token_goodput",), 1, ".0f"),
    ("request goodput (req/s)", ("request_goodput",), 1, ".2f"),
    ("TTFT p50 (s)", ("p50_ttft_ms",), 1e-3, ".2f"),
    ("TTFT p99 (s)", ("p99_ttft_ms",), 1e-3, ".2f"),
    ("TPOT p99, plain (ms)", ("groups", "plain", "p99_tpot_ms"), 1, ".1f"),
    ("TPOT p99, victims (ms)", ("groups", "victims", "p99_tpot_ms"), 1, ".1f"),
    ("TPOT p99, branching (ms)", ("groups", "branching", "p99_tpot_ms"), 1, ".1f"),
    ("serial TPOT p99, branching (ms)", ("groups", "branching", "p99_serial_tpot_ms"), 1, ".1f"),
    ("stretch p50, branching", ("groups", "branching", "p50_stretch"), 1, ".2f"),
    ("mean width, branching", ("groups", "branching", "mean_width"), 1, ".2f"),
    ("mean batch size", ("mean_batch_size",), 1, ".0f"),
    ("mean queue length", ("mean_queue_length",), 1, ".1f"),
    ("mean KV cache usage (%)", ("mean_kv_cache_usage",), 100, ".0f"),
    ("unfinished requests", ("num_unfinished",), 1, ".1f"),
)


def results_table(results: Sequence[Result], title: str) -> Table:
    """One column per policy: mean ± standard deviation over seeds.

    Args:
        results: At one rate for each policy.
        title: Of the table.
    """
    by_policy: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_policy[result["policy"]].append(result)
    table = Table(title=f"{title} (mean ± standard deviation over seeds)")
    table.add_column("")
    for policy in by_policy:
        table.add_column(policy, justify="right")
    for label, keys, scale, form in _ROWS:
        cells = [_mean_std(group, keys, scale, form) for group in by_policy.values()]
        table.add_row(label, *cells)
    return table


def _mean_std(results: Sequence[Result], keys: Sequence[str], scale: float, form: str) -> str:
    values = [scale * v for r in results if (v := _value(r, keys)) is not None]
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {format(float(np.std(values, ddof=1)), form)}"


def _value(result: Result, keys: Sequence[str]) -> float | None:
    value: Any = result
    for key in keys:
        value = value[key]
    found: float | None = value
    return found
