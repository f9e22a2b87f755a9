"""The clocks of a request, by hand-computed schedules."""

from __future__ import annotations

import pytest

from taper_trtllm.request import SloTarget
from taper_trtllm.slo import SlackTracker

SLO = SloTarget(ttft_ms=1000, tpot_ms=100)


def make_tracker(margin: float = 0.0, slo: SloTarget = SLO) -> SlackTracker:
    return SlackTracker(slo, arrival_s=10.0, margin=margin)


def test_slack_is_time_to_the_next_token_deadline():
    tracker = make_tracker()
    assert tracker.slack_s(10.5) == float("inf")  # no clock before the first token
    tracker.record_tokens(10.5, 1, serial=True)
    assert tracker.slack_s(10.5) == pytest.approx(0.1)
    tracker.record_tokens(10.55, 1, serial=True)
    assert tracker.slack_s(10.55) == pytest.approx(0.15)  # 50 ms are banked


def test_the_margin_holds_back_a_share_of_every_interval():
    tracker = make_tracker(margin=0.1)
    tracker.record_tokens(11.0, 1, serial=True)
    tracker.record_tokens(11.05, 1, serial=True)
    assert tracker.slack_s(11.05) == pytest.approx(2 * 0.09 - 0.05)


def test_lead_of_a_parallel_stage_does_not_pay_for_a_slow_serial_stage():
    tracker = make_tracker()
    tracker.record_tokens(11.0, 1, serial=True)
    tracker.end_serial_stage()
    tracker.record_tokens(11.1, 8, serial=False)  # eight branches in one step
    assert tracker.slack_s(11.1) == pytest.approx(0.9 - 0.1)  # only the all-token clock runs
    tracker.record_tokens(11.2, 1, serial=True)  # the next serial stage begins
    assert tracker.slack_s(11.2) == pytest.approx(0.1)
    tracker.record_tokens(11.5, 1, serial=True)  # 300 ms in one serial interval
    tracker.end_serial_stage()
    assert tracker.tpot_ms == pytest.approx(500 / 10)
    assert tracker.serial_tpot_ms == pytest.approx(300)
    assert not tracker.is_met(num_critical_tokens=4)


def test_serial_lead_is_carried_over_stages():
    tracker = make_tracker()
    for i in range(5):
        tracker.record_tokens(11.0 + 0.05 * i, 1, serial=True)
    tracker.end_serial_stage()  # 4 intervals, 200 ms: 200 ms ahead
    tracker.record_tokens(12.0, 20, serial=False)
    tracker.record_tokens(12.1, 1, serial=True)
    assert tracker.slack_s(12.1) == pytest.approx(min(26 * 0.1 - 1.1, 0.2 + 0.1))


def test_a_request_is_lost_when_even_the_fastest_steps_cannot_save_it():
    tracker = make_tracker()
    tracker.record_tokens(10.9, 1, serial=True)
    assert tracker.is_savable(11.5, 0.02, 10, 10, 10)  # 0.6 + 0.2 of 1.0 s
    assert not tracker.is_savable(11.8, 0.02, 10, 10, 10)
    late = make_tracker()
    late.record_tokens(11.2, 1, serial=True)  # TTFT 1.2 s of 1 s
    assert not late.is_savable(11.2, 0.0, 10, 10, 10)


def test_before_the_first_token_the_whole_program_is_ahead():
    tracker = make_tracker()
    assert tracker.is_savable(10.5, 0.3, 80, 10, 0)  # eight abreast: 9 steps, 7.9 s
    assert not tracker.is_savable(10.5, 0.9, 80, 10, 0)
    assert tracker.is_savable(10.5, 0.1, 80, 80, 0)  # one after another
    assert not tracker.is_savable(10.5, 0.11, 80, 80, 0)
    assert not tracker.is_savable(10.5, 0.3, 80, 10, 1)  # a serial token pays for itself
    assert tracker.is_savable(10.5, 0.3, 1, 1, 0)  # one token: TPOT is vacuous
    assert not tracker.is_savable(11.1, 0.01, 80, 10, 0)  # TTFT is missed


def test_verdict_by_each_condition():
    good = make_tracker()
    for i in range(4):
        good.record_tokens(10.5 + 0.09 * i, 1, serial=True)
    good.end_serial_stage()
    assert good.is_met(4)
    single = make_tracker()
    single.record_tokens(10.9, 1, serial=True)
    assert single.is_met(1)  # one token: TPOT is vacuous
    assert not make_tracker().is_met(0)  # no token at all
    stretched = make_tracker(slo=SloTarget(ttft_ms=1000, tpot_ms=100, stretch=1.0))
    for i in range(4):
        stretched.record_tokens(10.5 + 0.09 * i, 1, serial=True)
    assert not stretched.is_met(4)  # 770 ms for four critical tokens of 100 ms
    assert stretched.is_met(8)
