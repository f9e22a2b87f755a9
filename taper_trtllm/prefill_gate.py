"""How much of the waiting prompts enters a step: as much as the slack of those in decode can pay.

A chunk lengthens the step for everyone in decode, while a prompt has time until its TTFT objective.
So prompts are cut to what the smallest slack leaves beside T0, but never below the pace that meets
the TTFT objectives. Headers and joins are not held back: they stand on the clock of a request that
has begun to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.predictor import StepLatencyPredictor

_TTFT_MARGIN = 0.3  # share of the TTFT objective by which a prompt should be ready ahead of it
_RESOLUTION_TOKENS = 8


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


@dataclass(frozen=True, slots=True)
class PrefillGate:
    """The limit that prompts keep in one step.

    Attributes:
        predictor: Of step latencies.
        max_prefill_tokens: Chunk budget of a step.
        width: Sequences of the protected baseline.
        context_tokens: Sum of their contexts.
    """

    predictor: StepLatencyPredictor
    max_prefill_tokens: int
    width: int
    context_tokens: int

    def limit_ms(self, min_slack_ms: float, prompts: Sequence[WaitingPrompt]) -> float:
        """The longest step that prompts may make, baseline included.

        Args:
            min_slack_ms: Smallest slack of a request that can meet its objective; infinite without.
            prompts: In the order in which they are computed.
        """
        baseline_ms = self._step_ms(PrefillLoad())
        return max(min_slack_ms, baseline_ms + self._pace_ms(baseline_ms, prompts))

    def _pace_ms(self, baseline_ms: float, prompts: Sequence[WaitingPrompt]) -> float:
        """Prefill time per step with which every prompt is ready in time."""
        chunk = PrefillLoad(1, self.max_prefill_tokens, self.max_prefill_tokens**2 / 2)
        token_ms = (self._step_ms(chunk) - baseline_ms) / self.max_prefill_tokens
        pace_ms = work_ms = 0.0
        for prompt in prompts:
            work_ms += token_ms * prompt.num_tokens
            # One that is late already gets as long again: it must not cost others their objective.
            left_ms = prompt.time_left_ms if prompt.time_left_ms > 0 else prompt.ttft_slo_ms
            spare_ms = left_ms - _TTFT_MARGIN * prompt.ttft_slo_ms - work_ms
            if spare_ms <= 0:
                return float("inf")
            # Steps of T0 + pace do `work_ms` within `spare_ms + work_ms`.
            pace_ms = max(pace_ms, baseline_ms * work_ms / spare_ms)
        return pace_ms

    def fitting_tokens(
        self, load: PrefillLoad, num_tokens: int, num_computed_tokens: int, limit_ms: float
    ) -> int:
        """Most tokens of a prompt with which the step keeps the limit.

        Args:
            load: Prefill that the step has already.
            num_tokens: Tokens of the prompt that are left and that the chunk budget allows.
            num_computed_tokens: Tokens of it that have KV.
            limit_ms: See `limit_ms`.
        """
        if self._fits(load, num_tokens, num_computed_tokens, limit_ms):
            return num_tokens
        fits, over = 0, num_tokens
        while over - fits > _RESOLUTION_TOKENS:
            middle = (fits + over) // 2
            if self._fits(load, middle, num_computed_tokens, limit_ms):
                fits = middle
            else:
                over = middle
        return fits

    def _fits(
        self, load: PrefillLoad, num_tokens: int, num_computed_tokens: int, limit_ms: float
    ) -> bool:
        return self._step_ms(load.with_chunk(num_tokens, num_computed_tokens)) <= limit_ms

    def _step_ms(self, load: PrefillLoad) -> float:
        return self.predictor.predict_step_ms(self.width, self.context_tokens, load)
