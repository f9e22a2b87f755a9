"""The execution loop: admits, launches and finishes, one step in flight.

Follows `Executor::Impl::executionLoop` (executor/executorImpl.cpp @b35ac1b6) and
`TrtGptModelInflightBatching::{forwardAsync, forwardSync, updateRequests}`
(batch_manager/trtGptModelInflightBatching.cpp @b35ac1b6). A turn is

1. time-outs and cancels are collected; the step in flight ends: its tokens are added, requests that
   end are taken out, then the cancelled ones *if they were in that step* (others wait until they
   have been in one: a queued or unscheduled request that is cancelled still runs one step);
2. responses are built and published;
3. new requests are fetched: the only way in;
4. the next step is scheduled and launched; statistics of it are appended.

Whoever reacts to the responses of step k therefore changes step k+2. An exception in a step ends
all active requests with an error.

The original collects cancels when it begins to wait for the step in flight. A client that is quick
comes in time to have its cancel act at the end of that step, which is what happens here always.

The loop has no thread: `compute` does the heavy part of (1), `turn` the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from perf.trtllm_fake.active_request import ActiveRequest, Finish, State, Submission
from perf.trtllm_fake.block_tree import BlockTree, TokenBlocks
from perf.trtllm_fake.clock import Clock
from perf.trtllm_fake.decoders import ContextChunk, Decoder, Step, StepOutput, StepRecord
from perf.trtllm_fake.schedulers import MicroBatchScheduler, ScheduledBatch, fitting_requests

_IDLE_TURN_S = 1e-4  # a turn in which nothing could be scheduled
_HISTORY_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """Limits of engine and executor configuration together.

    Attributes:
        max_batch_size: Most active requests, and most in a step.
        max_num_tokens: Most tokens in a step.
        max_seq_len: Longest sequence.
        chunked_context: Prompts may be cut to fit a step.
        equal_progress: They are cut by turns instead of in order.
        max_queue_size: Most queued requests; None or 0 for no limit.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    chunked_context: bool
    equal_progress: bool = False
    max_queue_size: int | None = None

    @property
    def max_input_len(self) -> int:
        """Longest prompt (`TrtGptModel`, packed input and context FMHA)."""
        longest = self.max_seq_len - 1
        return longest if self.chunked_context else min(longest, self.max_num_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class QueuedRequest:
    """A request that was not fetched yet."""

    request_id: int
    asked: Submission
    queued_s: float

    @property
    def priority(self) -> float:
        """As asked."""
        return self.asked.priority


@dataclass(slots=True)
class Outcome:
    """What is published for a request: new tokens, or why it failed.

    Attributes:
        request: None if it failed before it was admitted.
    """

    request_id: int
    client_id: int | None
    request: ActiveRequest | None
    tokens: list[int]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TurnReport:
    """What statistics say about a turn (`updateIterationStats`, `updateRequestStats`).

    Attributes:
        iter: Number of the step that the turn launched.
        iter_latency_ms: From the fetch of the turn before, *waiting for requests included*, to the
            publishing of this one: the step before the launched one. 0 if there was none.
        queue_latency_ms: Sum over fetched requests.
        num_new: Fetched requests.
        active: Active requests after the fetch.
        finished: Requests that ended in this turn.
        queued: Requests in the queue.
        step: The launched step; None in the report of the end of the last active request.
    """

    iter: int
    iter_latency_ms: float
    queue_latency_ms: float
    num_new: int
    active: tuple[ActiveRequest, ...]
    finished: tuple[ActiveRequest, ...]
    queued: tuple[QueuedRequest, ...]
    step: Step | None


class ExecutionLoop:
    """The loop's state; whoever drives it sees to it that calls do not overlap.

    Only `compute` may run beside `enqueue` and `cancel`.

    Args:
        limits: Limits.
        tree: KV blocks.
        decoder: Computes the steps.
        clock: Passes the time of steps.
        publish: Takes the responses of a turn.
        report: Takes the statistics of a turn.
    """

    def __init__(
        self,
        limits: LoopLimits,
        tree: BlockTree,
        decoder: Decoder,
        clock: Clock,
        publish: Callable[[list[Outcome]], None],
        report: Callable[[TurnReport], None],
    ) -> None:
        self.limits = limits
        self.tree = tree
        self.history: deque[StepRecord] = deque(maxlen=_HISTORY_LENGTH)
        self.iter = 0
        self._decoder = decoder
        self._clock = clock
        self._publish = publish
        self._report = report
        self._scheduler = MicroBatchScheduler(
            limits.max_batch_size,
            limits.max_num_tokens,
            tree.tokens_per_block if limits.chunked_context else None,
            limits.equal_progress,
        )
        self._queue: list[QueuedRequest] = []
        self._cancelled: set[int] = set()
        self._to_terminate: dict[int, Finish] = {}
        self._active: list[ActiveRequest] = []
        self._step: Step | None = None
        self._output: StepOutput | Exception | None = None
        self._fail_with: str | None = None
        self._fetching_since_s: float | None = None
        self._latency_ms = 0.0
        self._num_new = 0

    # ---- from outside

    @property
    def num_active(self) -> int:
        """Active requests."""
        return len(self._active)

    @property
    def num_queued(self) -> int:
        """Queued requests."""
        return len(self._queue)

    @property
    def is_stuck(self) -> bool:
        """The last turn had active requests and could schedule none of them."""
        return self._step is not None and self._step.is_empty

    def enqueue(self, requests: Iterable[QueuedRequest]) -> None:
        """Queues requests, by priority."""
        for request in requests:
            _insert_by_priority(self._queue, request)

    def cancel(self, request_id: int) -> None:
        """Marks a request; collected at the beginning of a turn."""
        self._cancelled.add(request_id)

    def fail_next_step(self, message: str) -> None:
        """The step in flight, or else the next one, fails with this message."""
        self._fail_with = message

    # ---- a turn

    def compute(self) -> None:
        """Computes the step in flight, if there is one, and lets its time pass."""
        step = self._step
        if step is None or not self._active:
            return
        if step.is_empty:
            self._clock.wait_until(step.launched_s + _IDLE_TURN_S)
            return
        try:
            self._output = output = self._decoder.step(step)
        except Exception as error:  # whatever it is, the step is lost
            self._output = error
        else:
            self._clock.wait_until(step.launched_s + output.duration_s)

    def turn(self) -> bool:
        """One turn, after `compute`.

        Returns:
            False if there is nothing to do until a request is queued.
        """
        finished: list[ActiveRequest] = []
        reported = False
        if self._active:
            finished = self._end_step()
            outcomes = self._outcomes([*self._active, *finished])
            if not self._active:
                self._report_turn(0.0, 0.0, finished, None)
                reported = True
            self._publish(outcomes)
            if self._fetching_since_s is not None:
                self._latency_ms = (self._clock.now_s() - self._fetching_since_s) * 1e3
            self._fetching_since_s = None
        if self._fetching_since_s is None:
            self._fetching_since_s = self._clock.now_s()
        if not self._active and not self._queue:
            return False
        queue_latency_ms = self._fetch()
        if self._active:
            self._launch()
            finished = [] if reported else finished
            self._report_turn(self._latency_ms, queue_latency_ms, finished, self._step)
        return True

    # ---- the end of a step

    def _end_step(self) -> list[ActiveRequest]:
        """Adds the step's tokens and takes out what has ended."""
        self._collect_cancelled()
        step, output = self._step, self._output
        self._output = None
        if self._fail_with is not None:
            output, self._fail_with = RuntimeError(self._fail_with), None
        if isinstance(output, Exception):
            self._terminate_all(f"Encountered an error in forwardSync function: {output}")
            return []
        if step is not None and output is not None:
            self._update_requests(step, output)
            self._terminate_cancelled(step)
        self.iter += 1
        finished = [request for request in self._active if request.state is State.COMPLETE]
        if finished:
            self._active = [request for request in self._active if not request.is_finished]
        return finished

    def _collect_cancelled(self) -> None:
        """Cancels up to now; time-outs up to the launch of the step, where the original looks."""
        now_s = self._clock.now_s() if self._step is None else self._step.launched_s
        for request in self._active:
            timed_out = request.timed_out(now_s)
            if timed_out or request.request_id in self._cancelled:
                self._cancelled.discard(request.request_id)
                finish = Finish.TIMED_OUT if timed_out else Finish.CANCELLED
                self._to_terminate.setdefault(request.request_id, finish)

    def _update_requests(self, step: Step, output: StepOutput) -> None:
        now_s = self._clock.now_s()
        for request, token in zip(step.drawing, output.tokens, strict=True):
            request.take_token(token)
            if request.finish is not Finish.NOT_FINISHED:
                self._free(request)
                request.state = State.COMPLETE
                request.last_iter, request.last_token_s = self.iter, now_s
            if request.first_iter is None:
                request.first_iter, request.first_token_s = self.iter, now_s
            request.iter = self.iter

    def _terminate_cancelled(self, step: Step) -> None:
        if not self._to_terminate:
            return
        for request in [*(chunk.request for chunk in step.context), *step.generation]:
            finish = self._to_terminate.pop(request.request_id, None)
            if finish is not None and not request.is_finished:
                self._free(request)
                request.end_early(finish)

    def _free(self, request: ActiveRequest) -> None:
        if request.sequence is not None:
            self.tree.release(request.sequence)
            request.sequence = None
        self._decoder.release(request)

    def _terminate_all(self, error: str) -> None:
        """Ends every active request with an error (`terminateActiveRequests`)."""
        failed, self._active = self._active, []
        for request in failed:
            self._free(request)
            request.state = State.COMPLETE
        self._step = None
        self._publish([Outcome(r.request_id, r.asked.client_id, r, [], error) for r in failed])

    @staticmethod
    def _outcomes(requests: Iterable[ActiveRequest]) -> list[Outcome]:
        outcomes = []
        for request in requests:
            tokens = request.take_output()
            if tokens is not None:
                outcomes.append(
                    Outcome(request.request_id, request.asked.client_id, request, tokens)
                )
        return outcomes

    # ---- fetching

    def _fetch(self) -> float:
        """Admits queued requests; returns the sum of their queue times in ms.

        As many as there are places for, and those that rank above the lowest active one.
        """
        lowest = self._active[-1].priority if self._active else None
        places = max(self.limits.max_batch_size - len(self._active), 0)
        count = min(places, len(self._queue))
        while count < len(self._queue) and lowest is not None:
            if self._queue[count].priority <= lowest:
                break
            count += 1
        taken, self._queue = self._queue[:count], self._queue[count:]
        now_s = self._clock.now_s()
        latency_ms = 0.0
        self._num_new = 0
        for queued in taken:
            if self._admit(queued, now_s):
                latency_ms += (now_s - queued.queued_s) * 1e3
                self._num_new += 1
        return latency_ms

    def _admit(self, queued: QueuedRequest, now_s: float) -> bool:
        """Checks and admits one; what is wrong is answered (`LlmRequest::validate`)."""
        asked, limits = queued.asked, self.limits
        prompt_len = len(asked.token_ids)
        if prompt_len > limits.max_input_len:
            error = (
                "Encountered an error when fetching new request: "
                f"Prompt length ({prompt_len}) exceeds maximum input length "
                f"({limits.max_input_len}). Set log level to info and check TRTGptModel logs for "
                "how maximum input length is set"
            )
            self._publish([Outcome(queued.request_id, asked.client_id, None, [], error)])
            return False
        namespace = (asked.lora_id, asked.cache_salt_id)
        request = ActiveRequest(
            request_id=queued.request_id,
            asked=asked,
            text=TokenBlocks(asked.token_ids, namespace, self.tree.tokens_per_block),
            prompt_len=prompt_len,
            max_new_tokens=min(asked.max_new_tokens, limits.max_seq_len - prompt_len),
            fetched_s=now_s,
        )
        _insert_by_priority(self._active, request)
        return True

    # ---- launching

    def _launch(self) -> None:
        fitting = fitting_requests(self._active, self.tree, self.limits.max_batch_size)
        batch = self._scheduler.schedule(fitting)
        self._allocate(batch)
        now_s = self._clock.now_s()
        chunks = []
        for request in batch.context:
            size = request.chunk_size
            is_last = size == request.remaining_context
            chunks.append(ContextChunk(request, request.position, size, is_last))
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now_s
        self._step = Step(self.iter, tuple(chunks), tuple(batch.generation), now_s)
        self.history.append(self._step.record())
        self._advance(batch)

    def _allocate(self, batch: ScheduledBatch) -> None:
        """Blocks of the step; the first chunk of a prompt finds out what can be reused."""
        for request in batch.context:
            if request.sequence is None:
                request.sequence = self.tree.add_sequence(request.text, request.asked.retention)
                request.counts = request.sequence.counts
                request.set_reused(request.sequence.num_reused_tokens, self.tree.tokens_per_block)
        for request in batch.generation:
            assert request.sequence is not None
            self.tree.add_token(request.sequence)
        self.tree.refresh()

    def _advance(self, batch: ScheduledBatch) -> None:
        """What is findable as soon as the step is launched, and where the requests are then."""
        for request in batch.context:
            assert request.sequence is not None
            request.position += request.chunk_size
            request.set_chunk_size(0)
            if request.remaining_context == 0:
                request.state = State.GENERATION
                self.tree.store_context(request.sequence)
        for request in batch.generation:
            assert request.sequence is not None
            self.tree.store_new_block(request.sequence)

    def _report_turn(
        self,
        latency_ms: float,
        queue_latency_ms: float,
        finished: Iterable[ActiveRequest],
        step: Step | None,
    ) -> None:
        self._report(
            TurnReport(
                iter=self.iter,
                iter_latency_ms=latency_ms,
                queue_latency_ms=queue_latency_ms,
                num_new=self._num_new,
                active=tuple(self._active),
                finished=tuple(finished),
                queued=tuple(self._queue),
                step=step,
            )
        )


_Request = TypeVar("_Request", QueuedRequest, ActiveRequest)


def _insert_by_priority(requests: list[_Request], request: _Request) -> None:
    """Highest first, in order of arrival among equals."""
    index = len(requests)
    while index and requests[index - 1].priority < request.priority:
        index -= 1
    requests.insert(index, request)
