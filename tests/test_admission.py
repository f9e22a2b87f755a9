"""The decision: rules 1, 2 and 9 on random batches, and the traps that have names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import toy_profile

from taper_trtllm.admission import POLICIES, make_policy, predictor_mode
from taper_trtllm.batch import AdmissionDecision, BatchState, PrefillLoad, RefusalReason
from taper_trtllm.config import ConfigError, SchedulerConfig
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import DecodePoint, LatencyProfile

SPECS = [p.replace(":N", ":2").replace(":F", ":0.9") for p in POLICIES]
PREDICTOR = StepLatencyPredictor(toy_profile())


def staircase_predictor() -> StepLatencyPredictor:
    """Padded widths where 5..8 sequences cost more than 9..16: T falls at the next tile."""
    price = {1: 5.0, 4: 6.0, 8: 20.0, 16: 9.0, 32: 30.0}
    return StepLatencyPredictor(
        LatencyProfile(
            fingerprint={"engine": "tiles"},
            width_buckets=tuple(price),
            decode=tuple(
                DecodePoint(width=w, context_tokens=c, step_ms=ms + 1e-5 * w * c)
                for w, ms in price.items()
                for c in (16, 256)
            ),
            prefill=toy_profile().prefill,
        )
    )


def make_batch(leaves_per_request: list[int], slack_ms: float = 50.0, **changes) -> BatchState:
    num_requests = len(leaves_per_request)
    request_index = np.repeat(np.arange(num_requests), leaves_per_request)
    num = len(request_index)
    zeros = np.zeros(num, dtype=np.int64)
    batch = BatchState(
        first_leaf=np.cumsum(leaves_per_request) - leaves_per_request,
        request_index=request_index,
        context_tokens=zeros + 64,
        extra_context_tokens=zeros + 64,
        num_generated=zeros,
        last_advanced=zeros,
        holding=np.zeros(len(zeros), dtype=np.bool_),
        blocks_needed=zeros,
        slack_ms=np.full(num_requests, slack_ms),
        tpot_slo_ms=np.full(num_requests, 10.0),
        savable=np.ones(num_requests, dtype=np.bool_),
        stage_width=np.zeros(num_requests, dtype=np.int64),
        kv_headroom_blocks=np.full(num_requests, 10),
        num_unreserved_blocks=100,
        prefill=PrefillLoad(),
        max_batch_size=512,
    )
    return replace(batch, **changes)


@st.composite
def batches(draw) -> BatchState:
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num, num_requests = sum(counts), len(counts)
    context_tokens = rng.integers(1, 600, num)
    is_shared = draw(st.booleans())
    return make_batch(
        counts,
        context_tokens=context_tokens,
        extra_context_tokens=context_tokens // 3 if is_shared else context_tokens,
        num_generated=rng.integers(0, 50, num),
        last_advanced=rng.integers(0, 20, num),
        blocks_needed=rng.integers(0, 3, num),
        slack_ms=rng.uniform(-20, 60, num_requests),
        tpot_slo_ms=rng.uniform(3, 20, num_requests),
        savable=rng.random(num_requests) < 0.8,
        stage_width=rng.integers(0, 6, num_requests),
        kv_headroom_blocks=rng.integers(0, 6, num_requests),
        num_unreserved_blocks=int(rng.integers(0, 30)),
        prefill=PrefillLoad(*draw(st.sampled_from([(0, 0, 0.0), (2, 40, 900.0)]))),
        max_batch_size=num_requests + int(rng.integers(0, 60)),
    )


def admit(spec: str, batch: BatchState, predictor=PREDICTOR) -> AdmissionDecision:
    policy = make_policy(spec, SchedulerConfig(policy=spec, rho=1.0), predictor)
    return policy.admit(batch, policy.baseline(batch))


def predicted(batch: BatchState, decision: AdmissionDecision, predictor=PREDICTOR) -> float:
    width = len(decision.baseline) + len(decision.extras)
    context = int(batch.context_tokens[decision.baseline].sum())
    context += int(batch.extra_context_tokens[decision.extras].sum())
    return predictor.predict_step_ms(width, context, batch.prefill)


@settings(deadline=None, max_examples=200)
@given(batch=batches(), spec=st.sampled_from(SPECS), extras_allowed=st.booleans())
def test_every_leaf_is_in_the_plan_or_refused_once(batch, spec, extras_allowed):
    """Rules 1 and 10, and the limits that are not time."""
    policy = make_policy(spec, SchedulerConfig(policy=spec, rho=1.0), PREDICTOR)
    decision = policy.admit(batch, policy.baseline(batch), extras_allowed)
    refused = [rows for rows, _ in decision.refused]
    everything = np.concatenate([decision.baseline, decision.extras, *refused])
    assert sorted(everything.tolist()) == list(range(batch.num_leaves))
    assert batch.request_index[decision.baseline].tolist() == list(range(batch.num_requests))
    assert len(decision.baseline) + len(decision.extras) <= batch.max_batch_size
    assert extras_allowed or not len(decision.extras)
    needed = np.bincount(
        batch.request_index[decision.extras],
        weights=batch.blocks_needed[decision.extras],
        minlength=batch.num_requests,
    )
    beyond = np.maximum(needed - batch.kv_headroom_blocks, 0).sum()
    assert beyond <= batch.num_unreserved_blocks
    assert decision.step_ms == pytest.approx(predicted(batch, decision))


@settings(deadline=None, max_examples=200)
@given(batch=batches(), tiles=st.booleans(), spec=st.sampled_from(["taper", "taper:widest"]))
def test_taper_fits_its_budget_with_the_best_prefix(batch, tiles, spec):
    """Rule 2, and that no other prefix of the order would have been better."""
    predictor = staircase_predictor() if tiles else PREDICTOR
    decision = admit(spec, batch, predictor)
    baseline_ms = decision.baseline_ms
    if batch.savable.any():
        slack = batch.slack_ms[batch.savable].min()
        tau = batch.tpot_slo_ms[batch.savable].min()
        budget = min(baseline_ms + max(0.0, slack - baseline_ms), tau)
        assert decision.budget_ms == pytest.approx(budget)
    if len(decision.extras):
        assert decision.step_ms <= decision.budget_ms
    order = [*decision.extras, *_left_out_by_time(decision)]
    best = _worth(spec, len(decision.baseline) + len(decision.extras), decision.step_ms)
    for k in range(len(order) + 1):
        rows = np.concatenate([decision.baseline, order[:k]]).astype(np.int64)
        read = [batch.context_tokens[rows[: batch.num_requests]].sum()]
        read.append(batch.extra_context_tokens[rows[batch.num_requests :]].sum())
        step_ms = predictor.predict_step_ms(len(rows), int(sum(read)), batch.prefill)
        if k == 0 or step_ms <= decision.budget_ms:
            assert _worth(spec, len(rows), step_ms) <= best * (1 + 1e-9)


def _worth(spec: str, width: int, step_ms: float) -> float:
    return width if spec == "taper:widest" else width / step_ms


def _left_out_by_time(decision: AdmissionDecision) -> list[int]:
    """In order: those that fit the budget, then those beyond it."""
    left_out = {reason: rows for rows, reason in decision.refused}
    reasons = (RefusalReason.EFFICIENCY, RefusalReason.SLACK)
    return [row for reason in reasons for row in left_out.get(reason, np.zeros(0, int)).tolist()]


@settings(deadline=None, max_examples=200)
@given(
    batch=batches(),
    more=st.floats(0, 100),
    tiles=st.booleans(),
    spec=st.sampled_from(["taper", "taper:widest"]),
)
def test_more_slack_never_admits_fewer(batch, more, tiles, spec):
    """Rule 9, on a staircase too."""
    predictor = staircase_predictor() if tiles else PREDICTOR
    richer = replace(batch, slack_ms=batch.slack_ms + more)
    less, plenty = admit(spec, batch, predictor), admit(spec, richer, predictor)
    assert len(less.extras) <= len(plenty.extras)
    assert less.extras.tolist() == plenty.extras[: len(less.extras)].tolist()


@settings(deadline=None, max_examples=100)
@given(batch=batches())
def test_step_ceiling_holds_its_ceiling(batch):
    decision = admit("step-ceiling:0.9", batch)
    assert not len(decision.extras) or decision.step_ms <= 0.9 * batch.tpot_slo_ms.min() + 1e-9


def test_prefix_evaluation_passes_a_tile_where_first_fit_stalls():
    """One extra more would cost 20 ms, but eight more only 9 ms: the budget of 10 allows eight."""
    predictor = staircase_predictor()
    batch = make_batch([16], slack_ms=10.0)
    times = [predictor.predict_step_ms(w, 64 * w) for w in range(1, 17)]
    first_fit = next(w for w in range(1, 17) if times[w] > 10.0)
    assert first_fit == 4  # stalls at the first tile that does not fit
    decision = admit("taper", batch, predictor)
    assert 1 + len(decision.extras) == 16


def test_slack_is_not_spent_on_a_tile_that_yields_less():
    """Up to 16 sequences the tile costs 9 ms, beyond it 30: both fit, 16 is the better rate."""
    predictor = staircase_predictor()
    batch = make_batch([32], slack_ms=40.0, tpot_slo_ms=np.array([50.0]))
    assert 1 + len(admit("taper:widest", batch, predictor).extras) == 32
    decision = admit("taper", batch, predictor)
    assert 1 + len(decision.extras) == 16
    assert [(len(rows), why) for rows, why in decision.refused] == [(16, RefusalReason.EFFICIENCY)]


def test_deferred_branches_do_not_shrink_the_budget():
    """Slack belongs to requests: how long a leaf waited changes who runs, not how many."""
    waited = np.zeros(12, dtype=np.int64)
    waited[3:] = 1000
    fresh = admit("taper", make_batch([12], slack_ms=6.0))
    aged = admit("taper", make_batch([12], slack_ms=6.0, last_advanced=1000 - waited))
    assert len(fresh.extras) == len(aged.extras)
    assert aged.baseline.tolist() == [3]


def test_a_request_beyond_rescue_does_not_pin_the_slack():
    slack = np.array([-100.0, 40.0])
    pinned = make_batch([4, 4], slack_ms=slack)
    freed = replace(pinned, savable=np.array([False, True]))
    assert len(admit("taper", pinned).extras) == 0
    assert len(admit("taper", freed).extras) == 6


def test_least_progressed_branch_first_inside_a_request():
    batch = make_batch(
        [5], num_generated=np.array([9, 2, 7, 1, 4]), last_advanced=np.array([0, 1, 2, 3, 4])
    )
    eager = admit("taper", batch)
    assert eager.baseline.tolist() == [0]
    assert eager.extras.tolist() == [3, 1, 4, 2]


def test_fixed_cap_takes_branches_in_program_order_whatever_the_slack():
    decision = admit("fixed-cap:2", make_batch([4, 1, 3], slack_ms=-50.0))
    assert decision.baseline.tolist() == [0, 4, 5]
    assert decision.extras.tolist() == [1, 6]
    assert [(r.tolist(), why) for r, why in decision.refused] == [([2, 3, 7], RefusalReason.CAP)]


def test_no_replan_keeps_the_width_of_the_stage():
    batch = make_batch([6, 6], slack_ms=-50.0, stage_width=np.array([3, 0]))
    decision = admit("taper:no-replan", batch)
    rows = batch.request_index[decision.extras]
    assert (rows == 0).sum() == 2 and (rows == 1).sum() == 0


def test_unknown_policies_are_named_with_the_known_ones():
    for spec in (
        "tapir",
        "taper:",
        "fixed-cap",
        "fixed-cap:0",
        "step-ceiling:x",
        "taper:magic",
        "irp-off:2",
    ):
        with pytest.raises(ConfigError, match=r"scheduler.policy.*irp-eager"):
            make_policy(spec, SchedulerConfig(), PREDICTOR)
    assert predictor_mode("taper:uncorrected") == "uncorrected"
