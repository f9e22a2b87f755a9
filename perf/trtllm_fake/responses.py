"""Responses: made from the loop's outcomes, kept until they are awaited.

Follows `LlmRequest::createResult` (batch_manager/llmRequest.cpp) and `awaitResponses` with
`addTerminatedReqId` (executor/executorImpl.cpp @b35ac1b6).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from perf.trtllm_fake import strict
from perf.trtllm_fake.active_request import ActiveRequest
from perf.trtllm_fake.loop import Outcome


class Mailbox:
    """Responses by request.

    Args:
        module: The strict classes.
    """

    def __init__(self, module: SimpleNamespace) -> None:
        self._module = module
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
        failed = outcome.error is not None
        return strict.create(
            self._module.Response,
            request_id=outcome.request_id,
            client_id=outcome.client_id,
            has_error=failed,
            error_msg=outcome.error,
            result=None if failed else self._result(outcome),
        )

    def _result(self, outcome: Outcome) -> Any:
        request = outcome.request
        assert request is not None
        return strict.create(
            self._module.Result,
            is_final=request.is_finished,
            output_token_ids=[outcome.tokens],
            finish_reasons=[self._module.FinishReason[request.finish.name]],
            sequence_index=0,
            is_sequence_final=request.is_finished,
            decoding_iter=request.decoding_iter,
            avg_decoded_tokens_per_iter=request.tokens_per_step,
            request_perf_metrics=self._metrics(request),
        )

    def _metrics(self, request: ActiveRequest) -> Any:
        if not request.asked.return_perf_metrics:
            return None
        module, counts = self._module, request.counts
        return strict.create(
            module.RequestPerfMetrics,
            timing_metrics=strict.create(
                module.RequestPerfMetrics.TimingMetrics,
                arrival_time=_time(request.fetched_s),
                first_scheduled_time=_time(request.first_scheduled_s),
                first_token_time=_time(request.first_token_s),
                last_token_time=_time(request.last_token_s),
            ),
            kv_cache_metrics=strict.create(
                module.RequestPerfMetrics.KvCacheMetrics,
                num_total_allocated_blocks=counts.alloc_total,
                num_new_allocated_blocks=counts.alloc_new,
                num_reused_blocks=counts.reused,
                num_missed_blocks=counts.missed,
                kv_cache_hit_rate=counts.hit_rate,
            ),
            first_iter=request.first_iter,
            last_iter=request.last_iter,
            iter=request.iter,
        )


def _time(seconds: float | None) -> timedelta:
    return timedelta(seconds=seconds or 0.0)
