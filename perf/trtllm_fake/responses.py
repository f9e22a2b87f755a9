"""Responses: made from the loop's outcomes, kept until they are awaited.

Follows `LlmRequest::createResult` (batch_manager/llmRequest.cpp) and `awaitResponses` with
`addTerminatedReqId` (executor/executorImpl.cpp @b35ac1b6).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

from perf.trtllm_fake.active_request import ActiveRequest
from perf.trtllm_fake.loop import Outcome
from perf.trtllm_fake.making import Maker


class Mailbox:
    """Responses by request.

    Args:
        module: The bindings' classes; `Result` must have `_defer_metrics`.
    """

    def __init__(self, module: SimpleNamespace) -> None:
        self._reasons = module.FinishReason.__members__
        self._unfinished = module.FinishReason.NOT_FINISHED
        self._make_response = Maker(module.Response)
        self._make_failed = Maker(module.Response)
        self._make_result = Maker(module.Result)
        self._make_metrics = _Metrics(module)
        self._responses: dict[int, list[Any]] = {}
        self._ended: set[int] = set()  # requests whose last response is in the box
        self._terminated: set[int] = set()  # those whose last response was taken

    def post(self, outcomes: Iterable[Outcome]) -> None:
        """Makes and keeps responses."""
        for outcome in outcomes:
            response = self._response(outcome)
            self._responses.setdefault(outcome.request_id, []).append(response)
            if outcome.error is not None or outcome.request is None or outcome.request.is_finished:
                self._ended.add(outcome.request_id)

    def is_terminated(self, request_id: int) -> bool:
        """The last response was taken."""
        return request_id in self._terminated

    def num_ready(self, request_id: int | None = None) -> int:
        """Responses of one request or of all."""
        if request_id is not None:
            return len(self._responses.get(request_id, ()))
        return sum(map(len, self._responses.values()))

    def take_all(self) -> list[Any]:
        """Everything."""
        taken, self._responses = self._responses, {}
        self._terminated |= self._ended
        self._ended.clear()
        return [response for responses in taken.values() for response in responses]

    def take(self, request_id: int) -> list[Any]:
        """What there is of one request; an error if it was terminated before."""
        if request_id in self._terminated:
            error = f"ReqId {request_id} has already been processed and was terminated."
            return [self._response(Outcome(request_id, None, None, [], error))]
        if request_id in self._ended:
            self._ended.discard(request_id)
            self._terminated.add(request_id)
        return self._responses.pop(request_id, [])

    def _response(self, outcome: Outcome) -> Any:
        if outcome.error is not None:
            return self._make_failed(
                request_id=outcome.request_id,
                client_id=outcome.client_id,
                error_msg=outcome.error,
            )
        return self._make_response(
            request_id=outcome.request_id,
            client_id=outcome.client_id,
            result=self._result(outcome),
        )

    def _result(self, outcome: Outcome) -> Any:
        request = outcome.request
        assert request is not None
        is_final = request.is_finished
        result = self._make_result(
            is_final=is_final,
            output_token_ids=[outcome.tokens],
            cum_log_probs=None,
            log_probs=None,
            context_logits=None,
            generation_logits=None,
            spec_dec_fast_logits_info=None,
            encoder_output=None,
            finish_reasons=[self._reasons[request.finish.name] if is_final else self._unfinished],
            sequence_index=0,
            is_sequence_final=is_final,
            decoding_iter=request.decoding_iter,
            avg_decoded_tokens_per_iter=request.tokens_per_step,
            context_phase_params=None,
            request_perf_metrics=None,
            additional_outputs=[],
        )
        if request.asked.return_perf_metrics:
            result._defer_metrics(partial(self._make_metrics, request, request.iter, is_final))
        return result


class _Metrics:
    """Makes `RequestPerfMetrics`.

    Args:
        module: The strict classes.
    """

    def __init__(self, module: SimpleNamespace) -> None:
        self._make = Maker(module.RequestPerfMetrics)
        self._make_times = Maker(module.TimingMetrics)
        self._make_kv_cache = Maker(module.KvCacheMetrics)
        self._no_speculation = Maker(module.SpeculativeDecodingMetrics)(
            acceptance_rate=0.0, total_accepted_draft_tokens=0, total_draft_tokens=0
        )

    def __call__(self, request: ActiveRequest, latest_iter: int | None, ended: bool) -> Any:
        """The metrics of a response.

        Args:
            request: Whose.
            latest_iter: Number of the step that the response is of.
            ended: It is the last one. What a request has more by now is left out.
        """
        counts = request.counts
        return self._make(
            timing_metrics=self._make_times(
                arrival_time=_time(request.fetched_s),
                first_scheduled_time=_time(request.first_scheduled_s),
                first_token_time=_time(request.first_token_s),
                last_token_time=_time(request.last_token_s if ended else None),
                kv_cache_transfer_start=_NEVER,
                kv_cache_transfer_end=_NEVER,
                kv_cache_size=0,
            ),
            kv_cache_metrics=self._make_kv_cache(
                num_total_allocated_blocks=counts.alloc_total,
                num_new_allocated_blocks=counts.alloc_new,
                num_reused_blocks=counts.reused,
                num_missed_blocks=counts.missed,
                kv_cache_hit_rate=counts.hit_rate,
            ),
            speculative_decoding=self._no_speculation,
            first_iter=request.first_iter,
            last_iter=request.last_iter if ended else None,
            iter=latest_iter,
        )


_NEVER = timedelta(0)


def _time(seconds: float | None) -> timedelta:
    return _NEVER if seconds is None else timedelta(seconds=seconds)
