"""Server metrics: what step records and finished requests add up to, free of any exporter.

`ServingMetrics` turns events into *changes* (`MetricChange`); `model.py` applies them to Triton's
metric objects. A benchmark reads two scrapes and takes differences: every sum here has its count.
Externality is signed (a step can be faster than its predicted baseline), which neither counters
nor histograms can hold, so its sums are gauges: they may fall, and their differences are exact.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from taper_trtllm.batch import RefusalReason, StepRecord
from taper_trtllm.output import FinishReason, RequestMetrics

REQUESTS = "taper_requests_total"
REQUEST_TTFT = "taper_request_ttft_seconds"
REQUEST_TPOT = "taper_request_tpot_seconds"
REQUEST_SERIAL_TPOT = "taper_request_serial_tpot_seconds"
REQUEST_QUEUE_TIME = "taper_request_queue_seconds"
REQUEST_JOIN_WAIT = "taper_request_join_wait_seconds"
SLO_ATTAINED = "taper_slo_attained_total"
SLO_MISSED = "taper_slo_missed_total"
CANCEL_LATENCY = "taper_cancel_seconds"
OUTPUT_TOKENS = "taper_output_tokens_total"
REUSED_TOKENS = "taper_kv_reused_tokens_total"
REUSED_BLOCKS = "taper_kv_reused_blocks_total"
RECOMPUTED_TOKENS = "taper_recomputed_tokens_total"
STEP_DURATION = "taper_step_duration_seconds"
STEP_PREDICTED = "taper_step_predicted_seconds"
PREDICTION_ERROR = "taper_step_prediction_relative_error"
WIDTH = "taper_width"
PREFILL_TOKENS = "taper_prefill_tokens_total"
ADMITTED_BRANCHES = "taper_admitted_branches_total"
DEFERRED_BRANCHES = "taper_deferred_branches_total"
PREEMPTED_SEQUENCES = "taper_preempted_sequences_total"
PROBE_STEPS = "taper_probe_steps_total"
PROBE_RESIDUAL = "taper_probe_residual_seconds"
BRANCHED_STEPS = "taper_branched_steps_total"
EXTERNALITY_PREDICTED = "taper_branch_externality_predicted_seconds_sum"
EXTERNALITY_REALISED = "taper_branch_externality_realised_seconds_sum"
SLACK_BUDGET = "taper_slack_budget_seconds"
CORRECTION_FACTOR = "taper_predictor_correction_factor"
ACTIVE_FAMILIES = "taper_active_families"
QUEUED_REQUESTS = "taper_queued_requests"
KV_FREE_BLOCKS = "taper_kv_free_blocks"
KV_MIN_FREE_BLOCKS = "taper_kv_min_free_blocks"

MetricKind = Literal["counter", "gauge", "histogram"]

_STEP_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.128, 0.5)
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WAIT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_WIDTH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ERROR_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One family of `/metrics`.

    Attributes:
        name: Its name; base units.
        kind: How its changes are applied.
        description: Help text.
        buckets: Upper bounds; histograms only.
        label: Name and values of its extra label, one series per value; None for one series.
    """

    name: str
    kind: MetricKind
    description: str
    buckets: tuple[float, ...] = ()
    label: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class MetricChange:
    """A counter's increment, a gauge's new value or a histogram's observation."""

    name: str
    label: str | None
    value: float


_REASONS = ("reason", tuple(reason.value for reason in RefusalReason))
_REFUSED = "refused"
_FINISH_REASONS = ("finish_reason", ("completed", "cancelled", "error", _REFUSED))

FAMILIES: tuple[MetricFamily, ...] = (
    MetricFamily(REQUESTS, "counter", "Ended requests", label=_FINISH_REASONS),
    MetricFamily(REQUEST_TTFT, "histogram", "Arrival to first token", _WAIT_BUCKETS),
    MetricFamily(REQUEST_TPOT, "histogram", "Time per output token, all tokens", _TOKEN_BUCKETS),
    MetricFamily(
        REQUEST_SERIAL_TPOT, "histogram", "Time per token in serial stages", _TOKEN_BUCKETS
    ),
    MetricFamily(REQUEST_QUEUE_TIME, "histogram", "Arrival to first iteration", _WAIT_BUCKETS),
    MetricFamily(REQUEST_JOIN_WAIT, "histogram", "Prefill of joins per request", _WAIT_BUCKETS),
    MetricFamily(SLO_ATTAINED, "counter", "Requests that met their objective"),
    MetricFamily(SLO_MISSED, "counter", "Requests that missed it or failed"),
    MetricFamily(CANCEL_LATENCY, "histogram", "Cancel seen to family ended", _WAIT_BUCKETS),
    MetricFamily(OUTPUT_TOKENS, "counter", "Generated tokens of ended requests"),
    MetricFamily(REUSED_TOKENS, "counter", "Prefix tokens that branches took by reference"),
    MetricFamily(REUSED_BLOCKS, "counter", "KV blocks that branches share by reference"),
    MetricFamily(RECOMPUTED_TOKENS, "counter", "Tokens computed again after a preemption"),
    MetricFamily(STEP_DURATION, "histogram", "Iterations", _STEP_BUCKETS),
    MetricFamily(STEP_PREDICTED, "histogram", "Predicted T of decode iterations", _STEP_BUCKETS),
    MetricFamily(PREDICTION_ERROR, "histogram", "|T - predicted T| / T", _ERROR_BUCKETS),
    MetricFamily(WIDTH, "histogram", "Sequences per decode iteration", _WIDTH_BUCKETS),
    MetricFamily(PREFILL_TOKENS, "counter", "Prefilled tokens"),
    MetricFamily(ADMITTED_BRANCHES, "counter", "Extra branches admitted, per step"),
    MetricFamily(DEFERRED_BRANCHES, "counter", "Ready branches left out, per step", label=_REASONS),
    MetricFamily(PREEMPTED_SEQUENCES, "counter", "Sequences whose KV was dropped"),
    MetricFamily(PROBE_STEPS, "counter", "Baseline-only probe iterations"),
    MetricFamily(PROBE_RESIDUAL, "gauge", "Sum of T minus predicted T0 of probes (signed)"),
    MetricFamily(BRANCHED_STEPS, "counter", "Iterations with extras"),
    MetricFamily(EXTERNALITY_PREDICTED, "gauge", "Sum of predicted branch externality (signed)"),
    MetricFamily(EXTERNALITY_REALISED, "gauge", "Sum of realised branch externality (signed)"),
    MetricFamily(SLACK_BUDGET, "gauge", "Step budget B of the last iteration that had one"),
    MetricFamily(CORRECTION_FACTOR, "gauge", "Predictor's factor common to all widths"),
    MetricFamily(ACTIVE_FAMILIES, "gauge", "Requests started and not ended"),
    MetricFamily(QUEUED_REQUESTS, "gauge", "Requests waiting to be started"),
    MetricFamily(KV_FREE_BLOCKS, "gauge", "Free KV blocks"),
    MetricFamily(KV_MIN_FREE_BLOCKS, "gauge", "Fewest free KV blocks after any iteration"),
)


class ServingMetrics:
    """Collects changes; one thread only.

    Counters and gauges are coalesced until they are taken, so that a slow exporter falls behind in
    observations only.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str | None], float] = {}
        self._gauges: dict[str, float] = {}
        self._exported_gauges: dict[str, float] = {}
        self._observations: deque[tuple[str, float]] = deque()

    def record_step(self, record: StepRecord) -> None:
        """Adds one iteration."""
        self._observe(STEP_DURATION, record.step_ms / 1e3)
        self._count(PREFILL_TOKENS, record.num_prefill_tokens)
        self._count(PREEMPTED_SEQUENCES, record.num_preempted)
        self._count(PROBE_STEPS, record.is_probe)
        self._count(ADMITTED_BRANCHES, record.num_extras)
        for refusals in record.refusals:
            self._count(DEFERRED_BRANCHES, len(refusals.branch_paths), refusals.reason.value)
        if record.num_admitted:
            self._observe(WIDTH, record.num_admitted)
        if record.predicted_step_ms is not None:
            self._observe(STEP_PREDICTED, record.predicted_step_ms / 1e3)
            error = abs(record.step_ms - record.predicted_step_ms) / record.step_ms
            self._observe(PREDICTION_ERROR, error)
        if record.budget_ms is not None:
            self._gauges[SLACK_BUDGET] = record.budget_ms / 1e3
        self._gauges[CORRECTION_FACTOR] = record.correction_factor
        self._gauges[KV_MIN_FREE_BLOCKS] = min(
            record.num_free_blocks, self._gauges.get(KV_MIN_FREE_BLOCKS, record.num_free_blocks)
        )
        self._add_externality(record)

    def record_request(self, finish_reason: FinishReason, metrics: RequestMetrics | None) -> None:
        """Adds one ended request; `metrics` is None if it never reached the executor."""
        self._count(REQUESTS, 1, finish_reason)
        if finish_reason == "error":
            self._count(SLO_MISSED, 1)
        if metrics is None:
            return
        self._count(OUTPUT_TOKENS, metrics.num_output_tokens)
        self._count(REUSED_TOKENS, metrics.num_reused_tokens)
        self._count(REUSED_BLOCKS, metrics.num_reused_blocks)
        self._count(RECOMPUTED_TOKENS, metrics.num_recomputed_tokens)
        # A request that its client gave up neither met nor missed its objective.
        if finish_reason in ("cancelled", "error"):
            return
        self._count(SLO_ATTAINED if metrics.slo_met else SLO_MISSED, 1)
        self._observe_timings(metrics)

    def record_refusal(self) -> None:
        """Adds one request that was not let in: a miss as well."""
        self._count(REQUESTS, 1, _REFUSED)
        self._count(SLO_MISSED, 1)

    def record_cancel(self, seconds: float) -> None:
        """Adds the time from seeing a client's cancel to the end of its family."""
        self._observe(CANCEL_LATENCY, seconds)

    def set_state(self, active_families: int, queued_requests: int, free_blocks: int) -> None:
        """Sets what the server holds now."""
        self._gauges[ACTIVE_FAMILIES] = active_families
        self._gauges[QUEUED_REQUESTS] = queued_requests
        self._gauges[KV_FREE_BLOCKS] = free_blocks

    def take_changes(self, max_observations: int) -> list[MetricChange]:
        """Removes and returns all counters' and gauges' changes and some observations."""
        changes = [MetricChange(name, label, n) for (name, label), n in self._counters.items()]
        self._counters.clear()
        changes += [
            MetricChange(name, None, value)
            for name, value in self._gauges.items()
            if self._exported_gauges.get(name) != value
        ]
        self._exported_gauges.update(self._gauges)
        for _ in range(min(max_observations, len(self._observations))):
            name, value = self._observations.popleft()
            changes.append(MetricChange(name, None, value))
        return changes

    @property
    def num_pending_observations(self) -> int:
        """Observations not taken yet."""
        return len(self._observations)

    def _count(self, name: str, amount: float, label: str | None = None) -> None:
        if amount:
            key = (name, label)
            self._counters[key] = self._counters.get(key, 0.0) + amount

    def _observe(self, name: str, value: float) -> None:
        self._observations.append((name, value))

    def _add_externality(self, record: StepRecord) -> None:
        predicted, realised = record.predicted_externality_ms, record.realised_externality_ms
        if predicted is None or realised is None:
            return
        if record.is_probe:
            self._add(PROBE_RESIDUAL, realised)
        elif record.num_extras:
            self._count(BRANCHED_STEPS, 1)
            self._add(EXTERNALITY_PREDICTED, predicted)
            self._add(EXTERNALITY_REALISED, realised)

    def _add(self, name: str, value_ms: float) -> None:
        self._gauges[name] = self._gauges.get(name, 0.0) + value_ms / 1e3

    def _observe_timings(self, metrics: RequestMetrics) -> None:
        for name, value_ms in (
            (REQUEST_TTFT, metrics.ttft_ms),
            (REQUEST_TPOT, metrics.tpot_ms),
            (REQUEST_SERIAL_TPOT, metrics.serial_tpot_ms),
        ):
            if value_ms is not None:
                self._observe(name, value_ms / 1e3)
        if metrics.num_forks:
            self._observe(REQUEST_JOIN_WAIT, metrics.join_wait_ms / 1e3)
        if metrics.first_scheduled_time_ns is not None:
            queued_ns = metrics.first_scheduled_time_ns - metrics.arrival_time_ns
            self._observe(REQUEST_QUEUE_TIME, queued_ns / 1e9)
