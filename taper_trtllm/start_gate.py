"""When a waiting request starts: while no request that can keep its TPOT objective loses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from taper_trtllm.live_request import LiveRequest
from taper_trtllm.predictor import StepLatencyPredictor

RequestAdmission = Literal["tpot", "slots"]

_MEMORY_STEPS = 50


class StartGate:
    """Holds starts back that T0 has no time for; pure but for what it learns from steps.

    Without it, requests are started until memory or slots end, and when T0 alone exceeds the TPOT
    objective all of them miss it.

    Args:
        request_admission: ``tpot``, or ``slots`` to hold nobody back.
        predictor: Of step latencies.
        margin: m; a step may take (1 - m) tau.
        tpot_slo_ms: The server's own objective; one that is tighter holds nobody else up.
    """

    def __init__(
        self,
        request_admission: RequestAdmission,
        predictor: StepLatencyPredictor,
        margin: float,
        tpot_slo_ms: float,
    ) -> None:
        self._is_bound = request_admission == "tpot"
        self._predictor = predictor
        self._step_share = 1 - margin
        self._tpot_slo_ms = tpot_slo_ms
        self._mean_surplus_ms = 0.0  # of steps over their decode: prefill, the unforeseen

    def has_time(
        self, running: Sequence[LiveRequest], request: LiveRequest, now_s: float, baseline_ms: float
    ) -> bool:
        """Whether those who can meet their objectives still can after this start.

        They can while a step of one sequence per request, with what else steps take, lasts no
        longer than (1 - m) tau. Longer ones are started into only if this request and those at risk
        can afford them to their ends, m again in hand: they are ahead, or have branches enough to
        get ahead. Who cannot meet the objective anyway does not count. A request that had begun to
        answer and comes back, and the first of an idle server, always start.

        Args:
            running: Requests that have started.
            request: The one that waits.
            now_s: Now.
            baseline_ms: T0 without prefill, to tell who can still meet the objective.
        """
        if not self._is_bound or request.has_started_decoding or not running:
            return True
        requests = [*running, request]
        step_ms = self._mean_surplus_ms + self._predictor.predict_step_ms(
            len(requests), sum(r.num_context_tokens for r in requests)
        )
        pace_ms = step_ms / self._step_share
        at_risk = [
            r
            for r in requests
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
