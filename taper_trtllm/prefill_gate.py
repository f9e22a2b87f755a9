"""How much prefill enters a step: as much as the slack of those in decode can pay for.

A chunk lengthens the step for everyone in decode. How long it may wait depends on what it is for:
a prompt has time until its TTFT objective, a join holds up a request that has begun to answer, and
the header of an extra branch is opportunistic work like the branch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.predictor import StepLatencyPredictor

TTFT_MARGIN = 0.3  # share of the TTFT objective by which a prompt should be ready ahead of it
_LEAST_PROTECTED_SHARE = 0.25  # of the chunk budget, for what a request needs to go on at all
_RESOLUTION_TOKENS = 8


class Urgency(Enum):
    """What a chunk is for."""

    PROMPT = auto()  # cut to the slack, but never below the pace of the TTFT objectives
    PROTECTED = auto()  # a request cannot go on without it: cut to the slack, at a least pace
    EXTRA = auto()  # one more branch: only within the slack


@dataclass(frozen=True, slots=True)
class WaitingPrompt:
    """A started request whose prompt is not computed yet.

    Attributes:
        num_tokens: Tokens to compute.
        time_left_ms: Until its TTFT objective.
        ttft_slo_ms: The objective.
    """

    num_tokens: int
    time_left_ms: float
    ttft_slo_ms: float


class PrefillGate:
    """The limits that chunks keep in one step.

    Args:
        predictor: Of step latencies.
        max_prefill_tokens: Chunk budget of a step.
        width: Sequences of the protected baseline.
        context_tokens: Sum of their contexts.
        min_slack_ms: Smallest slack of a request that can meet its objective; infinite without.
        prompts: Waiting ones, in the order in which they are computed.
    """

    def __init__(
        self,
        predictor: StepLatencyPredictor,
        max_prefill_tokens: int,
        width: int,
        context_tokens: int,
        min_slack_ms: float,
        prompts: Sequence[WaitingPrompt],
    ) -> None:
        self._predictor = predictor
        self._max_prefill_tokens = max_prefill_tokens
        self._width = width
        self._context_tokens = context_tokens
        self._slack_limit_ms = min_slack_ms
        baseline_ms = self._step_ms(PrefillLoad())
        pace_ms = self._pace_ms(baseline_ms, prompts)
        self._prompt_limit_ms = max(min_slack_ms, baseline_ms + pace_ms)

    def limit_ms(self, urgency: Urgency) -> float:
        """The longest step that a chunk may make, baseline included."""
        return self._prompt_limit_ms if urgency is Urgency.PROMPT else self._slack_limit_ms

    def fitting_tokens(
        self, load: PrefillLoad, num_tokens: int, num_computed_tokens: int, urgency: Urgency
    ) -> int:
        """Most tokens of a sequence that may enter the step; 0 if none.

        Args:
            load: Prefill that the step has already.
            num_tokens: Pending tokens that the chunk budget allows.
            num_computed_tokens: Tokens of the sequence that have KV.
            urgency: What they are for.
        """
        limit_ms = self.limit_ms(urgency)
        if self._fits(load, num_tokens, num_computed_tokens, limit_ms):
            return num_tokens
        least = 0
        if urgency is Urgency.PROTECTED:
            least = min(num_tokens, int(_LEAST_PROTECTED_SHARE * self._max_prefill_tokens))
        fits, over = least, num_tokens
        while over - fits > _RESOLUTION_TOKENS:
            middle = (fits + over) // 2
            if self._fits(load, middle, num_computed_tokens, limit_ms):
                fits = middle
            else:
                over = middle
        return fits

    def _pace_ms(self, baseline_ms: float, prompts: Sequence[WaitingPrompt]) -> float:
        """Prefill time per step with which every prompt is ready in time."""
        if not prompts:
            return 0.0
        chunk = PrefillLoad(1, self._max_prefill_tokens, self._max_prefill_tokens**2 / 2)
        token_ms = (self._step_ms(chunk) - baseline_ms) / self._max_prefill_tokens
        pace_ms = work_ms = 0.0
        for prompt in prompts:
            work_ms += token_ms * prompt.num_tokens
            # One that is late already gets as long again: it must not cost others their objective.
            left_ms = prompt.time_left_ms if prompt.time_left_ms > 0 else prompt.ttft_slo_ms
            spare_ms = left_ms - TTFT_MARGIN * prompt.ttft_slo_ms - work_ms
            if spare_ms <= 0:
                return float("inf")
            # Steps of T0 + pace do `work_ms` within `spare_ms + work_ms`.
            pace_ms = max(pace_ms, baseline_ms * work_ms / spare_ms)
        return pace_ms

    def _fits(
        self, load: PrefillLoad, num_tokens: int, num_computed_tokens: int, limit_ms: float
    ) -> bool:
        return self._step_ms(load.with_chunk(num_tokens, num_computed_tokens)) <= limit_ms

    def _step_ms(self, load: PrefillLoad) -> float:
        return self._predictor.predict_step_ms(self._width, self._context_tokens, load)
