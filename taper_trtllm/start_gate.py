"""When a waiting request starts: while no request that can keep its TPOT objective loses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.config import RequestAdmission
from taper_trtllm.live_request import LiveRequest
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.prefill_gate import TTFT_MARGIN

_MEMORY_STEPS = 50
_LOOKAHEAD = 32  # waiting requests whose prompts are seen coming


class StartGate:
    """Holds starts back that T0 has no time for; pure but for what it learns from steps.

    Without it, requests are started until memory or slots end, and when T0 alone exceeds the TPOT
    objective all of them miss it.

    Args:
        request_admission: ``patient``; ``tpot`` to hold no prompt back for its own time; ``slots``
            for nobody.
        predictor: Of step latencies.
        margin: m; a step may take (1 - m) tau.
        tpot_slo_ms: The server's own objective; one that is tighter holds nobody else up.
        max_prefill_tokens: Of a step; None where prompts are computed elsewhere.
    """

    def __init__(
        self,
        request_admission: RequestAdmission,
        predictor: StepLatencyPredictor,
        margin: float,
        tpot_slo_ms: float,
        max_prefill_tokens: int | None,
    ) -> None:
        self._is_bound = request_admission != "slots"
        self._chunk_tokens = max_prefill_tokens if request_admission == "patient" else None
        self._predictor = predictor
        self._step_share = 1 - margin
        self._tpot_slo_ms = tpot_slo_ms
        self._mean_surplus_ms = 0.0  # of steps over their decode: prefill, the unforeseen

    def has_time(
        self,
        running: Sequence[LiveRequest],
        request: LiveRequest,
        waiting: Iterable[LiveRequest],
        now_s: float,
        baseline_ms: float,
    ) -> bool:
        """Whether those who can meet their objectives still can after this start.

        They can while a step of one sequence per request, with what else steps take, lasts no
        longer than (1 - m) tau. Longer ones are started into only if this request and those at risk
        can afford them to their ends, m again in hand: they are ahead, or have branches enough to
        get ahead. Who cannot meet the objective anyway does not count. A request that had begun to
        answer and comes back, and the first of an idle server, always start.

        With ``patient``, the prompt's own time counts as well: it is held back while it would cost
        somebody the objective, as long as all who wait can still be in time.

        Args:
            running: Requests that have started.
            request: The one that is next.
            waiting: All that wait, in their order.
            now_s: Now.
            baseline_ms: T0 without prefill, to tell who can still meet the objective.
        """
        if not self._is_bound or request.has_started_decoding or not running:
            return True
        width = len(running) + 1
        context_tokens = sum(r.num_context_tokens for r in [*running, request])
        decode_ms = self._predictor.predict_step_ms(width, context_tokens)
        step_ms = decode_ms + self._mean_surplus_ms
        if not self._keeps_pace(running, request, now_s, step_ms, baseline_ms):
            return False
        if self._chunk_tokens is None:
            return True
        chunk = PrefillLoad().with_chunk(self._chunk_tokens, 0)
        chunk_ms = self._predictor.predict_step_ms(width, context_tokens, chunk) - decode_ms
        num_tokens = sum(r.num_prompt_tokens_left for r in [*running, request])
        num_chunks = num_tokens / self._chunk_tokens
        others = islice((r for r in waiting if r is not request), _LOOKAHEAD)
        token_ms = (decode_ms + chunk_ms) / self._chunk_tokens
        return not _can_wait(request, others, now_s, num_tokens, token_ms) or not any(
            r.has_started_decoding
            and r.is_savable(now_s, step_ms)
            and not r.is_savable(now_s + num_chunks * chunk_ms / 1e3, step_ms)
            for r in running
        )

    def _keeps_pace(
        self,
        running: Sequence[LiveRequest],
        request: LiveRequest,
        now_s: float,
        step_ms: float,
        baseline_ms: float,
    ) -> bool:
        """Whether nobody loses the TPOT objective by steps of this length."""
        pace_ms = step_ms / self._step_share
        at_risk = [
            r
            for r in [*running, request]
            if pace_ms > max(r.tracker.slo.tpot_ms, self._tpot_slo_ms)
            and r.is_savable(now_s, baseline_ms)
        ]
        return not at_risk or all(r.is_savable(now_s, pace_ms) for r in [request, *at_risk])

    def observe(self, width: int, context_tokens: int, has_prefill: bool, step_ms: float) -> None:
        """Follows what steps take beyond decode, in the mean.

        Without prefill to explain it, a long pause counts for half a step.
        """
        if not width:
            return
        decode_ms = self._predictor.predict_step_ms(width, context_tokens)
        surplus_ms = max(0.0, step_ms - decode_ms)
        if not has_prefill:
            surplus_ms = min(surplus_ms, 0.5 * decode_ms)
        self._mean_surplus_ms += (surplus_ms - self._mean_surplus_ms) / _MEMORY_STEPS


def _can_wait(
    request: LiveRequest,
    others: Iterable[LiveRequest],
    now_s: float,
    num_tokens: int,
    token_ms: float,
) -> bool:
    """Whether a request can be in time although it does not start now, and those behind it too.

    Who is late already cannot wait: it would for ever. Behind it, who is late does not count.

    Args:
        request: The one that is next.
        others: Those behind it.
        now_s: Now.
        num_tokens: Of prompts that are computed first, its own included.
        token_ms: Time per token of steps that compute prompts, decode included.
    """
    if _spare_ms(request, now_s) < num_tokens * token_ms:
        return False
    for other in others:
        num_tokens += other.num_prompt_tokens_left
        is_late = other.tracker.ttft_left_ms(now_s) <= 0
        if not is_late and _spare_ms(other, now_s) < num_tokens * token_ms:
            return False
    return True


def _spare_ms(request: LiveRequest, now_s: float) -> float:
    """Until its prompt should be ready."""
    return request.tracker.ttft_left_ms(now_s) - TTFT_MARGIN * request.tracker.slo.ttft_ms
