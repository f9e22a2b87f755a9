"""Prompts are cut to the slack of those in decode, and are ready in time all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_engine import toy_profile

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.prefill_gate import PrefillGate, Urgency, WaitingPrompt

PREDICTOR = StepLatencyPredictor(toy_profile())
BASELINE_MS = PREDICTOR.predict_step_ms(8, 800)
RELAXED = WaitingPrompt(200, time_left_ms=1e6, ttft_slo_ms=1000)


def gate(min_slack_ms: float = 0.0, *prompts: WaitingPrompt) -> PrefillGate:
    return PrefillGate(PREDICTOR, 128, 8, 800, min_slack_ms, prompts)


@given(
    st.lists(st.floats(0, 40), min_size=2, max_size=2).map(sorted),
    st.integers(1, 300),
    st.integers(0, 2000),
    st.sampled_from(Urgency),
)
def test_tokens_keep_the_limit_and_grow_with_the_slack(slacks_ms, num_tokens, computed, urgency):
    gates = [gate(slack_ms, RELAXED) for slack_ms in slacks_ms]
    nums = [g.fitting_tokens(PrefillLoad(), num_tokens, computed, urgency) for g in gates]
    assert nums[0] <= nums[1] <= num_tokens
    for each, num in zip(gates, nums, strict=True):
        step_ms = PREDICTOR.predict_step_ms(8, 800, PrefillLoad().with_chunk(num, computed))
        kept = num == 0 or step_ms <= each.limit_ms(urgency)
        assert kept or (urgency is Urgency.PROTECTED and num <= 32)


def test_without_slack_a_join_goes_on_and_an_extra_waits():
    none = gate(BASELINE_MS)
    assert none.fitting_tokens(PrefillLoad(), 100, 0, Urgency.PROTECTED) == 32
    assert none.fitting_tokens(PrefillLoad(), 10, 0, Urgency.PROTECTED) == 10
    assert none.fitting_tokens(PrefillLoad(), 10, 0, Urgency.EXTRA) == 0
    assert gate(float("inf")).fitting_tokens(PrefillLoad(), 100, 0, Urgency.EXTRA) == 100


def test_without_haste_prompts_take_what_slack_leaves():
    assert gate(BASELINE_MS + 5, RELAXED).limit_ms(Urgency.PROMPT) == BASELINE_MS + 5
    assert gate(BASELINE_MS - 1, RELAXED).fitting_tokens(PrefillLoad(), 99, 0, Urgency.PROMPT) == 0


def test_a_prompt_that_is_due_takes_the_whole_budget_and_one_that_is_late_takes_its_time():
    due = WaitingPrompt(200, time_left_ms=310, ttft_slo_ms=1000)
    assert gate(0.0, due).limit_ms(Urgency.PROMPT) == float("inf")
    late = WaitingPrompt(200, time_left_ms=-1, ttft_slo_ms=1000)
    assert BASELINE_MS < gate(0.0, late).limit_ms(Urgency.PROMPT) < BASELINE_MS * 1.2


@pytest.mark.parametrize("num_prompts", [1, 4])
def test_the_pace_alone_has_every_prompt_ready_before_its_margin(num_prompts):
    left = [300] * num_prompts
    now_ms = 0.0
    while left:
        step = gate(0.0, *(WaitingPrompt(n, 2000 - now_ms, 2000) for n in left))
        computed = 300 - left[0]
        num = step.fitting_tokens(PrefillLoad(), min(left[0], 128), computed, Urgency.PROMPT)
        load = PrefillLoad().with_chunk(num, computed) if num else PrefillLoad()
        now_ms += PREDICTOR.predict_step_ms(8, 800, load)
        left[0] -= num
        left = [n for n in left if n]
    assert now_ms <= 2000
