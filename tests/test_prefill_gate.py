"""Prompts are cut to the slack of those in decode, and are ready in time all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_engine import toy_profile

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.prefill_gate import PrefillGate, WaitingPrompt

PREDICTOR = StepLatencyPredictor(toy_profile())
GATE = PrefillGate(PREDICTOR, max_prefill_tokens=128, width=8, context_tokens=800)
BASELINE_MS = PREDICTOR.predict_step_ms(8, 800)
RELAXED = WaitingPrompt(200, time_left_ms=1e6, ttft_slo_ms=1000)


def fitting(limit_ms: float, num_tokens: int = 128, computed: int = 0) -> int:
    return GATE.fitting_tokens(PrefillLoad(), num_tokens, computed, limit_ms)


@given(st.floats(0, 40), st.floats(0, 40), st.integers(1, 300), st.integers(0, 2000))
def test_tokens_keep_the_limit_and_grow_with_it(first, second, num_tokens, computed):
    fewer, more = (fitting(limit, num_tokens, computed) for limit in sorted((first, second)))
    assert fewer <= more
    for limit_ms in (first, second):
        num = fitting(limit_ms, num_tokens, computed)
        assert 0 <= num <= num_tokens
        if num:
            load = PrefillLoad().with_chunk(num, computed)
            assert PREDICTOR.predict_step_ms(8, 800, load) <= limit_ms


def test_without_haste_prompts_take_what_slack_leaves():
    assert GATE.limit_ms(BASELINE_MS + 5, [RELAXED]) == BASELINE_MS + 5
    assert fitting(GATE.limit_ms(BASELINE_MS - 1, [RELAXED])) == 0
    assert GATE.limit_ms(float("inf"), [RELAXED]) == float("inf")


def test_a_prompt_that_is_due_takes_the_whole_budget_and_one_that_is_late_takes_its_time():
    due = WaitingPrompt(200, time_left_ms=310, ttft_slo_ms=1000)
    assert GATE.limit_ms(0.0, [due]) == float("inf")
    late = WaitingPrompt(200, time_left_ms=-1, ttft_slo_ms=1000)
    assert BASELINE_MS < GATE.limit_ms(0.0, [late]) < BASELINE_MS * 1.2


@pytest.mark.parametrize("num_prompts", [1, 4])
def test_the_pace_alone_has_every_prompt_ready_before_its_margin(num_prompts):
    left = [300] * num_prompts
    now_ms = 0.0
    while left:
        prompts = [WaitingPrompt(n, 2000 - now_ms, 2000) for n in left]
        limit_ms = GATE.limit_ms(0.0, prompts)
        num = GATE.fitting_tokens(PrefillLoad(), min(left[0], 128), 300 - left[0], limit_ms)
        load = PrefillLoad().with_chunk(num, 300 - left[0]) if num else PrefillLoad()
        now_ms += PREDICTOR.predict_step_ms(8, 800, load)
        left[0] -= num
        left = [n for n in left if n]
    assert now_ms <= 2000
