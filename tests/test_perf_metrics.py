from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.latency import RequestRecord, TokenEvent, measure
from perf.metrics import (
    SloScore,
    attainment,
    describe,
    goodput,
    group_figures,
    scored,
    victims,
)

SLO = SloScore(ttft_ms=1000, tpot_ms=100)


def record(events, **changes) -> RequestRecord:
    """Events are (time, path, stage, tokens); sent at 10.0 s."""
    tokens = tuple(TokenEvent(*event) for event in events)
    base = RequestRecord(
        request_id="r", family="plain", is_branching=any(e.branch_path for e in tokens),
        num_prompt_tokens=4, critical_tokens=sum(e.num_tokens for e in tokens), scheduled_s=9.9,
        sent_s=10.0, end_s=20.0, events=tokens, finish_reason="completed",
    )  # fmt: skip
    return replace(base, **changes)


def plain(first_s: float, gap_s: float, n: int, **changes) -> RequestRecord:
    return record([(first_s + i * gap_s, "", 0, 1) for i in range(n)], **changes)


def fork(serial_gap_s: float, branch_gap_s: float, branches: int) -> RequestRecord:
    """3 serial tokens, `branches` of 4 tokens at a time, 3 serial tokens."""
    events, now = [], 10.5
    for i in range(3):
        events.append((now + i * serial_gap_s, "", 0, 1))
    now += 2 * serial_gap_s
    for i in range(1, 5):
        events += [(now + i * branch_gap_s, f"1.{b}", 0, 1) for b in range(branches)]
    now += 4 * branch_gap_s
    for i in range(1, 4):
        events.append((now + i * serial_gap_s, "", 2, 1))
    return record(events, critical_tokens=3 + 4 + 3)


def test_hand_computed_latencies():
    r = fork(serial_gap_s=0.08, branch_gap_s=0.10, branches=5)
    m = measure(r)
    assert m.ttft_ms == pytest.approx(500)
    total_ms = 2 * 80 + 4 * 100 + 3 * 80
    assert m.e2el_ms == pytest.approx(500 + total_ms)
    assert m.tpot_ms == pytest.approx(total_ms / (6 + 20 - 1))
    assert m.serial_tpot_ms == pytest.approx(80)  # two stages of two intervals
    assert m.branch_tpot_ms == pytest.approx(100)
    assert m.critical_tpot_ms == pytest.approx(total_ms / 9)
    assert m.parallel_stage_ms == pytest.approx(300)
    assert m.stretch(r.critical_tokens, 100) == pytest.approx((500 + total_ms) / 1000)
    assert len(m.itl_ms) == 9 and sum(m.itl_ms) == pytest.approx(total_ms)


def test_overlap_alone_does_not_pass():
    slow = fork(serial_gap_s=0.15, branch_gap_s=0.15, branches=8)
    assert measure(slow).tpot_ms < 100  # eight tokens per gap flatter it
    assert not SLO.is_met(slow)
    assert SLO.is_met(fork(serial_gap_s=0.09, branch_gap_s=0.15, branches=8))


def test_slow_branches_fail_by_the_clock_over_all_tokens():
    assert not SLO.is_met(fork(serial_gap_s=0.05, branch_gap_s=0.9, branches=1))


def test_coalesced_responses_count_every_token():
    m = measure(record([(10.2, "", 0, 3), (10.6, "", 0, 2)]))
    assert m.tpot_ms == pytest.approx(400 / 4) and m.serial_tpot_ms == pytest.approx(400 / 4)


def test_a_single_token_has_vacuous_tpot():
    one = record([(10.5, "", 0, 1)])
    assert measure(one).tpot_ms is None and measure(one).serial_tpot_ms is None
    assert SLO.is_met(one)
    assert not SLO.is_met(replace(one, sent_s=9.0))  # TTFT still counts


def test_serial_tpot_is_vacuous_without_serial_intervals():
    r = record([(10.1, "0.0", 0, 1), (10.15, "0.0", 0, 1), (10.2, "", 1, 1)])
    assert measure(r).serial_tpot_ms is None
    assert SLO.is_met(r)


@pytest.mark.parametrize(
    "changes",
    [
        {"finish_reason": "error", "error": "shed"},
        {"finish_reason": None},
        {"finish_reason": "cancelled"},
    ],
)
def test_failed_unfinished_and_empty_requests_are_misses(changes):
    assert not SLO.is_met(plain(10.1, 0.01, 5, **changes))
    assert not SLO.is_met(record([], **changes)) and measure(record([])) is None


def test_stretch_and_e2el_are_scored_when_asked():
    r = plain(10.1, 0.09, 10)
    assert SLO.is_met(r)
    assert not SloScore(ttft_ms=1000, tpot_ms=100, stretch=0.5).is_met(r)
    assert not SloScore(e2el_ms=500).is_met(r)
    with pytest.raises(ValueError, match="stretch is relative to TPOT"):
        SloScore(stretch=2)


def test_goodput_and_attainment_of_a_run():
    good, late, failed = plain(10.1, 0.05, 6), plain(12.0, 0.05, 6), plain(10.1, 0.05, 6, end_s=11)
    failed = replace(failed, finish_reason="error")
    withdrawn = replace(good, was_cancelled=True, finish_reason="cancelled")
    figures = goodput([good, late, failed, withdrawn], SLO, window_s=4.0)
    assert figures["request_goodput"] == pytest.approx(1 / 4)
    assert figures["token_goodput"] == pytest.approx(6 / 4)
    assert figures["slo_attainment"] == pytest.approx(1 / 3)
    assert goodput([good], SloScore(), 4.0)["request_goodput"] is None


def test_victims_are_plain_requests_that_decoded_beside_a_branching_one():
    branching = fork(0.05, 0.05, 2)
    beside, after = plain(10.6, 0.05, 4), plain(15.0, 0.05, 4)
    assert victims([branching, beside, after]) == [beside]


def test_keys_are_those_of_vllm():
    figures = group_figures([plain(10.1, 0.05, 6)], SLO, percentiles=(50, 99, 99.9))
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p99", "p99.9"):
            assert figures[f"{statistic}_{name}_ms"] is not None
    assert figures["mean_branch_tpot_ms"] is None
    assert describe("x", [], (99,)) == dict.fromkeys(("mean_x", "median_x", "std_x", "p99_x"))


gaps = st.lists(st.floats(0.001, 0.5), min_size=1, max_size=30)


@given(gaps=gaps, bound=st.floats(1, 1000), looser=st.floats(1, 10))
def test_a_looser_bound_never_loses_a_request(gaps, bound, looser):
    times = [10.1 + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    r = record([(t, "", 0, 1) for t in times])
    tight, loose = SloScore(tpot_ms=bound), SloScore(tpot_ms=bound * looser)
    assert tight.is_met(r) <= loose.is_met(r)


@given(gaps=gaps)
def test_of_a_plain_request_all_three_clocks_agree(gaps):
    times = [10.1 + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    m = measure(record([(t, "", 0, 1) for t in times]))
    assert m.tpot_ms == pytest.approx(m.serial_tpot_ms) == pytest.approx(m.critical_tpot_ms)
    assert m.e2el_ms == pytest.approx(m.ttft_ms + sum(m.itl_ms))


@given(met=st.integers(0, 8), missed=st.integers(0, 8))
def test_attainment_is_the_share_of_met_requests(met, missed):
    records = [plain(10.1, 0.01, 3)] * met + [plain(19.0, 0.01, 3)] * missed
    share = attainment(scored(records), SLO)
    assert share == (met / (met + missed) if met + missed else None)
