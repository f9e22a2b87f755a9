"""Sends outputs to clients off the step loop, and notices clients that have gone.

A send is blocking inter-process communication (some hundred microseconds). The executor's callback
therefore only appends to a buffer; one thread drains the buffers. What a request got since its last
response goes into one response, so a slow sender makes responses larger, never steps longer. The
same thread does everything else that talks to the server process: polling for cancels, and metric
updates, which are not safe from two threads.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from taper_trtllm.batch import StepRecord
from taper_trtllm.executor_process import ExecutorProcess
from taper_trtllm.metrics import MetricChange, ServingMetrics
from taper_trtllm.output import BranchOutput, RequestOutput
from taper_trtllm.request import ForkJoinRequest, RequestError

# A cancel must end a family within 100 ms; asking costs 34-105 us.
_POLL_RUNNING_S = 0.04
_POLL_QUEUED_S = 0.5
# At least so long between two responses of one request: tritonserver 2.51 can crash when a client
# cancels a stream whose responses come back to back.
_MIN_PASS_S = 0.001
_STATE_INTERVAL_S = 0.1
_MAX_OBSERVATIONS_PER_PASS = 16  # about 50 us each


class ResponseSink(Protocol):
    """Where the outputs of one request go."""

    def send(self, output: RequestOutput) -> None:
        """Sends one response; the last one if `output.finished`."""

    def is_cancelled(self) -> bool:
        """The client has cancelled or disconnected."""


@dataclass(slots=True, eq=False)
class _Stream:
    request_id: str
    sink: ResponseSink
    streaming: bool
    pending: deque[RequestOutput] = field(default_factory=deque)
    polled_at_s: float = 0.0
    cancelled_at_s: float | None = None
    closed: bool = False


class ResponseStreamer:
    """Owns the sender thread and every open request's way back to its client."""

    def __init__(
        self,
        executor: ExecutorProcess,
        export_change: Callable[[MetricChange], None],
        log_error: Callable[[str], None],
    ) -> None:
        """Starts the sender thread.

        Args:
            executor: Runs the requests.
            export_change: Applies a change to the server's metrics; called on the sender thread.
            log_error: Receives messages about responses that cannot be sent.
        """
        self._executor = executor
        self._export_change = export_change
        self._log_error = log_error
        self._metrics = ServingMetrics()
        # Appended to by other threads, drained by the sender.
        self._opened: deque[_Stream] = deque()
        self._dirty: deque[_Stream] = deque()
        self._steps: deque[StepRecord] = deque()
        self._refusals: deque[str] = deque()
        self._wake = threading.Event()
        self._closing = False
        # Sender thread only.
        self._open: set[_Stream] = set()  # not by id: an ended request's id may be used again
        self._polls: list[tuple[float, int, _Stream]] = []
        self._poll_order = itertools.count()
        self._state_due_s = 0.0
        executor.add_step_observer(self._steps.append)
        self._thread = threading.Thread(target=self._run, name="response-sender", daemon=True)
        self._thread.start()

    def submit(self, request: ForkJoinRequest, sink: ResponseSink, *, streaming: bool) -> None:
        """Hands a request to the executor; its outputs go to `sink`.

        Raises:
            RequestError: The executor refuses the request, also because its queue is full; nothing
                is sent to `sink`.
            ExecutorClosedError: The executor takes no more requests.
        """
        stream = _Stream(request.request_id, sink, streaming)
        self._executor.submit(request, on_output=partial(self._on_output, stream))
        self._opened.append(stream)
        self._wake.set()

    def cancel_branches(self, request_id: str, branch_paths: Iterable[str]) -> None:
        """Ends branches of an open request; the join goes on without them.

        Raises:
            RequestError: No such request is open.
        """
        if self._executor.is_running(request_id) is None:
            raise RequestError("cancel_request_id", f"{request_id!r:.80} is not open")
        for path in branch_paths:
            self._executor.cancel_branch(request_id, path)

    def count_refusal(self, request_id: str) -> None:
        """A request was answered with an error and never submitted."""
        self._refusals.append(request_id)

    def close(self) -> None:
        """Sends what is left, ends every open request with an error, and stops the thread.

        Call after the executor has stopped.
        """
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _on_output(self, stream: _Stream, output: RequestOutput) -> None:
        """On the executor's reader thread: must stay as cheap as this."""
        stream.pending.append(output)
        if stream.streaming or output.finished:
            self._dirty.append(stream)
            self._wake.set()

    # -------------------------------------------------------------------------- sender thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._idle_s())
            self._wake.clear()
            started_s = time.monotonic()
            try:
                self._run_pass(started_s)
            except Exception:  # one request's trouble must not silence all the others
                self._log_error(f"response sender: {traceback.format_exc()}")
            time.sleep(max(0.0, _MIN_PASS_S - (time.monotonic() - started_s)))
        self._run_pass(time.monotonic())
        for stream in list(self._open):
            self._send(
                stream,
                RequestOutput(
                    stream.request_id, finish_reason="error", error="the server is shutting down"
                ),
            )

    def _idle_s(self) -> float:
        """How long the thread may sleep if nobody wakes it."""
        if self._metrics.num_pending_observations:
            return 0.0
        due_s = min(self._state_due_s, self._polls[0][0] if self._polls else float("inf"))
        return max(0.0, due_s - time.monotonic())

    def _run_pass(self, now_s: float) -> None:
        self._adopt_opened(now_s)
        self._send_pending()
        self._poll_cancels(now_s)
        self._update_metrics(now_s)

    def _adopt_opened(self, now_s: float) -> None:
        while self._opened:
            stream = self._opened.popleft()
            if stream.closed:  # it ended before `submit` got here
                continue
            self._open.add(stream)
            stream.polled_at_s = now_s
            self._schedule_poll(stream, now_s)

    def _send_pending(self) -> None:
        for _ in range(len(self._dirty)):  # what arrives meanwhile waits for the next pass
            stream = self._dirty.popleft()
            outputs = [stream.pending.popleft() for _ in range(len(stream.pending))]
            if outputs and not stream.closed:
                self._send(stream, merge_outputs(outputs))

    def _send(self, stream: _Stream, output: RequestOutput) -> None:
        try:
            stream.sink.send(output)
        except Exception as error:
            self._log_error(f"request {stream.request_id}: cannot send a response: {error}")
            if not output.finished:
                self._cancel(stream)
            elif output.error is None:  # whatever it was about, the stream must still end
                message = f"the last response cannot be sent: {error}"
                self._send(stream, output._replace(finish_reason="error", error=message))
                return
        if output.finish_reason is not None:
            stream.closed = True
            self._open.discard(stream)
            self._metrics.record_request(output.finish_reason, output.metrics)
            if stream.cancelled_at_s is not None:
                self._metrics.record_cancel(time.monotonic() - stream.cancelled_at_s)

    def _poll_cancels(self, now_s: float) -> None:
        while self._polls and self._polls[0][0] <= now_s:
            _, _, stream = heapq.heappop(self._polls)
            if stream.closed or stream.cancelled_at_s is not None:
                continue
            is_queued = self._executor.is_running(stream.request_id) is False
            if not is_queued or now_s - stream.polled_at_s >= _POLL_QUEUED_S:
                stream.polled_at_s = now_s
                if stream.sink.is_cancelled():
                    self._cancel(stream)
                    continue
            # A queued request may start at any time: look again soon, ask the server rarely.
            self._schedule_poll(stream, now_s)

    def _schedule_poll(self, stream: _Stream, now_s: float) -> None:
        heapq.heappush(self._polls, (now_s + _POLL_RUNNING_S, next(self._poll_order), stream))

    def _cancel(self, stream: _Stream) -> None:
        if stream.cancelled_at_s is None:
            stream.cancelled_at_s = time.monotonic()
            self._executor.cancel(stream.request_id)

    def _update_metrics(self, now_s: float) -> None:
        for _ in range(len(self._steps)):
            self._metrics.record_step(self._steps.popleft())
        for _ in range(len(self._refusals)):
            self._refusals.popleft()
            self._metrics.record_refusal()
        if now_s >= self._state_due_s:
            self._state_due_s = now_s + _STATE_INTERVAL_S
            running = [self._executor.is_running(stream.request_id) for stream in self._open]
            self._metrics.set_state(
                running.count(True), running.count(False), self._executor.num_free_blocks
            )
        for change in self._metrics.take_changes(_MAX_OBSERVATIONS_PER_PASS):
            self._export_change(change)


def merge_outputs(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """One output for several consecutive ones of a request: tokens joined per branch and stage.

    Events stay where they are; tokens that follow one move up to those before it, and that is never
    before the event with which their branch or stage began.
    """
    merged: dict[tuple[str, int] | int, BranchOutput] = {}
    last: RequestOutput | None = None
    for output in outputs:
        last = output
        for new in output.branches:
            key = len(merged) if new.event else (new.branch_path, new.stage_index)
            before = merged.get(key)
            merged[key] = new if before is None else _extend(before, new)
    assert last is not None
    return RequestOutput(
        request_id=last.request_id,
        branches=tuple(merged.values()),
        finish_reason=last.finish_reason,
        error=last.error,
        metrics=last.metrics,
        progress=last.progress,
    )


def _extend(before: BranchOutput, new: BranchOutput) -> BranchOutput:
    return BranchOutput(
        branch_path=new.branch_path,
        stage_index=new.stage_index,
        token_ids=before.token_ids + new.token_ids,
        finish_reason=new.finish_reason,
    )
