from __future__ import annotations

from dataclasses import replace

import pytest

from taper_trtllm import metrics as names
from taper_trtllm.batch import RefusalReason, Refusals, StepRecord
from taper_trtllm.metrics import FAMILIES, MetricChange, ServingMetrics
from taper_trtllm.output import RequestMetrics

STEP = StepRecord(
    iteration=1,
    started_at_s=0.0,
    completed_at_s=0.01,
    plan_ms=0.1,
    step_ms=10.0,
    predicted_step_ms=12.0,
    predicted_baseline_ms=11.0,
    budget_ms=20.0,
    min_slack_ms=30.0,
    num_requests=2,
    num_ready=5,
    num_admitted=3,
    num_extras=1,
    refusals=(Refusals(RefusalReason.SLACK, ("a", "a"), ("0.1", "0.2")),),
    num_prefill_tokens=7,
    num_queued=0,
    num_free_blocks=9,
    num_preempted=0,
    is_probe=False,
    correction_factor=1.0,
    policy="taper",
)
REQUEST = RequestMetrics(
    num_prompt_tokens=4,
    num_output_tokens=6,
    arrival_time_ns=1_000_000_000,
    first_scheduled_time_ns=1_500_000_000,
    first_token_time_ns=None,
    last_token_time_ns=None,
    ttft_ms=600.0,
    tpot_ms=20.0,
    serial_tpot_ms=None,
    join_wait_ms=0.0,
    num_forks=0,
    num_reused_tokens=0,
    num_reused_blocks=0,
    num_recomputed_tokens=0,
    num_joined_tokens=0,
    num_deferred_branch_steps=0,
    mean_width=1.0,
    join_mode="concat",
    join_is_as_trained=None,
    slo_met=False,
)


def taken(metrics: ServingMetrics, limit: int = 1000) -> dict[tuple[str, str | None], list[float]]:
    values: dict[tuple[str, str | None], list[float]] = {}
    for change in metrics.take_changes(limit):
        values.setdefault((change.name, change.label), []).append(change.value)
    return values


def test_steps_add_up_between_two_reads() -> None:
    """Mean width, deferrals and both externalities follow from differences of sums and counts."""
    metrics = ServingMetrics()
    metrics.record_step(STEP)
    metrics.record_step(replace(STEP, step_ms=8.0))
    metrics.record_step(replace(STEP, num_extras=0, refusals=(), step_ms=50.0))
    values = taken(metrics)
    assert values[names.WIDTH, None] == [3, 3, 3]
    assert values[names.DEFERRED_BRANCHES, "slack"] == [4]
    assert values[names.ADMITTED_BRANCHES, None] == [2]
    assert values[names.BRANCHED_STEPS, None] == [2]
    assert values[names.EXTERNALITY_PREDICTED, None] == [pytest.approx(0.002)]
    assert values[names.EXTERNALITY_REALISED, None] == [pytest.approx(-0.004)]
    metrics.record_step(STEP)
    assert taken(metrics)[names.EXTERNALITY_REALISED, None] == [pytest.approx(-0.005)]
    assert metrics.take_changes(1000) == []


def test_a_slow_exporter_delays_observations_and_loses_nothing() -> None:
    metrics = ServingMetrics()
    for _ in range(5):
        metrics.record_step(STEP)
    first = taken(metrics, limit=3)
    assert first[names.PREFILL_TOKENS, None] == [35]
    left = metrics.num_pending_observations
    assert sum(map(len, taken(metrics).values())) == left > 0
    assert metrics.num_pending_observations == 0


@pytest.mark.parametrize(
    ("finish_reason", "metrics", "counted"),
    [
        ("completed", REQUEST, names.SLO_MISSED),
        ("completed", replace(REQUEST, slo_met=True), names.SLO_ATTAINED),
        ("error", REQUEST, names.SLO_MISSED),
        ("cancelled", REQUEST, None),
    ],
)
def test_failed_requests_miss_and_cancelled_ones_do_neither(
    finish_reason: str, metrics: RequestMetrics, counted: str | None
) -> None:
    serving = ServingMetrics()
    serving.record_request(finish_reason, metrics)
    values = taken(serving)
    assert values[names.REQUESTS, finish_reason] == [1]
    slo_counts = {names.SLO_ATTAINED, names.SLO_MISSED} & {name for name, _ in values}
    assert slo_counts == ({counted} if counted else set())


def test_every_change_has_a_family_and_a_series() -> None:
    metrics = ServingMetrics()
    metrics.record_step(STEP)
    metrics.record_request("completed", REQUEST)
    metrics.record_cancel(0.01)
    metrics.set_state(1, 2, 3)
    series = {
        (family.name, value)
        for family in FAMILIES
        for value in (family.label[1] if family.label else (None,))
    }
    changes: list[MetricChange] = metrics.take_changes(1000)
    assert {(change.name, change.label) for change in changes} <= series
