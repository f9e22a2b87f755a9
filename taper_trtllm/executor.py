"""The loop: plan, step, observe. One request in, its streamed outputs out.

`TaperExecutor.run_once` is synchronous and owns the engine; a thread (`ExecutorThread`), a
simulator or a test drives it. `submit` and `cancel` may be called from any thread; they only leave
a note that the next `run_once` picks up.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from taper_trtllm.admission import make_policy, predictor_mode
from taper_trtllm.batch import StepRecord
from taper_trtllm.config import ConfigError, SchedulerConfig, ServingConfig
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.base import (
    Engine,
    EngineCapabilities,
    IterationAudit,
    StepPlan,
    StepResult,
)
from taper_trtllm.fork_format import FORMATS, BoundForkFormat
from taper_trtllm.fork_format_file import load_fork_formats
from taper_trtllm.live_request import LiveRequest, OutputCallback
from taper_trtllm.output import BranchOutput, FinishReason, RequestOutput, StepProgress
from taper_trtllm.planner import PlannedStep, StepPlanner
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import LatencyProfile, load_profile
from taper_trtllm.request import (
    ForkJoinRequest,
    RequestLimits,
    SloTarget,
)
from taper_trtllm.request_gate import FormatTerms, RequestGate
from taper_trtllm.sequence_table import SequenceTable
from taper_trtllm.slo import SlackTracker
from taper_trtllm.start_gate import StartGate
from taper_trtllm.step_trace import StepLog
from taper_trtllm.tokenizer import load_tokenizer
from taper_trtllm.waiting_queue import WaitingQueue
from taper_trtllm.written_forks import WrittenForks

logger = logging.getLogger(__name__)


class RequestHandle:
    """The outputs of one request, as an iterator that ends with the last one."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def put(self, output: RequestOutput) -> None:
        """Called by the executor."""
        self._outputs.put(output)

    def __iter__(self) -> Iterator[RequestOutput]:
        """Blocks until the next output; the executor must be driven by another thread."""
        while True:
            output = self._outputs.get()
            yield output
            if output.finished:
                return


@dataclass(frozen=True, slots=True)
class _Submission:
    request: ForkJoinRequest
    on_output: OutputCallback
    arrival_s: float


class TaperExecutor:
    """Runs fork-join requests on an engine under a policy.

    Args:
        engine: Owned from now on.
        profile: Step latencies of that engine.
        scheduler: Policy and limits of a step.
        limits: What one request may ask for.
        slo: Objective of requests that bring none.
        clock: Seconds, monotonic; the engine's own by default. Must be the clock of
            `StepResult.completed_at_s`.
        fork_formats: Formats in which requests may let the model write forks.

    Raises:
        ConfigError: The policy is unknown or the engine cannot run the configured batch.
    """

    def __init__(
        self,
        engine: Engine,
        profile: LatencyProfile,
        scheduler: SchedulerConfig,
        limits: RequestLimits,
        slo: SloTarget,
        clock: Callable[[], float] | None = None,
        fork_formats: Iterable[BoundForkFormat] = (),
    ) -> None:
        if scheduler.max_batch_size > engine.capabilities.max_batch_size:
            raise ConfigError("scheduler.max_batch_size exceeds the engine's max_batch_size")
        self._engine = engine
        self._scheduler = scheduler
        self._slo = slo
        self._clock = clock or engine.now_s
        self._predictor = StepLatencyPredictor(
            profile, scheduler.max_batch_size, predictor_mode(scheduler.policy)
        )
        self._policy = make_policy(scheduler.policy, scheduler, self._predictor)
        self._sequences = SequenceTable(engine)
        self._planner = StepPlanner(
            engine, self._sequences, self._policy, self._predictor, scheduler, self._requeue
        )
        is_virtual = engine.capabilities.virtual_time
        self._epoch_s = 0.0 if is_virtual else time.time() - self._clock()
        # Shared with other threads, under the lock.
        self._lock = threading.Lock()
        self._submissions: deque[_Submission] = deque()
        self._cancellations: deque[str] = deque()
        self._branch_cancellations: deque[tuple[str, str]] = deque()
        self._limits = limits
        self._fork_formats = {bound.format.name: bound for bound in fork_formats}
        self.format_terms = {
            name: FormatTerms.of(bound, limits, engine.capabilities)
            for name, bound in self._fork_formats.items()
        }
        self._gate = RequestGate(limits, engine.capabilities, self.format_terms)
        self._wake = threading.Event()
        # Owned by the driving thread.
        self._waiting = WaitingQueue(scheduler.late_requests)
        self._start_gate = StartGate(
            scheduler.request_admission, self._predictor, scheduler.margin, slo.tpot_ms,
            None if "prompt" in engine.capabilities.disaggregated_prefill
            else scheduler.max_prefill_tokens,
        )  # fmt: skip
        self._running: list[LiveRequest] = []  # oldest first
        self._families = itertools.count()
        self._previous_completion_s: float | None = None
        self._observers: list[Callable[[StepRecord], None]] = []
        self._step_log: StepLog | None = None
        self.records: deque[StepRecord] = deque(maxlen=scheduler.max_step_records)
        self._num_free_blocks = engine.num_free_blocks  # written by the driving thread alone

    @classmethod
    def from_config(cls, config: ServingConfig) -> TaperExecutor:
        """Builds engine, profile and policy.

        Raises:
            ConfigError: A field is missing or does not fit.
            ProfileError: The profile is missing, malformed, or of something else.
            WorkerRank: Another process leads the engine.
        """
        if config.profile is None:
            raise ConfigError(
                "profile: required; write one with `python -m engine_build calibrate`"
            )
        profile = load_profile(config.profile)
        fork_formats = tuple(_bind_fork_formats(config))
        engine = create_engine(config.engine)
        try:
            profile.check_fingerprint(engine.fingerprint)
            executor = cls(
                engine, profile, config.scheduler, config.limits, config.slo,
                fork_formats=fork_formats,
            )  # fmt: skip
        except Exception:
            engine.shutdown()  # or its other ranks would wait for ever
            raise
        if config.step_log is not None:
            executor.keep_step_log(config.step_log)
        return executor

    # ---------------------------------------------------------------------- from any thread

    @property
    def capabilities(self) -> EngineCapabilities:
        """The engine's."""
        return self._engine.capabilities

    @property
    def policy_name(self) -> str:
        """The policy's specification."""
        return self._policy.name

    def submit(
        self,
        request: ForkJoinRequest,
        on_output: OutputCallback | None = None,
        arrival_s: float | None = None,
    ) -> RequestHandle:
        """Queues a request.

        Args:
            request: What to run.
            on_output: Called with every output on the driving thread, and must not block; without
                it, outputs are read from the handle.
            arrival_s: Arrival on the executor's clock; now by default.

        Raises:
            RequestError: The request is out of limits or its id is in use; nothing was queued.
            QueueFullError: The waiting queue is at its limit.
            ExecutorClosedError: After `drain` or `shutdown`.
        """
        self._gate.check(request)
        handle = RequestHandle(request.request_id)
        arrival_s = self._clock() if arrival_s is None else arrival_s
        with self._lock:
            self._gate.enter(request.request_id)
            self._submissions.append(_Submission(request, on_output or handle.put, arrival_s))
        self._wake.set()
        return handle

    def cancel(self, request_id: str) -> None:
        """Ends a request and its whole family before the next step; unknown ids are ignored."""
        with self._lock:
            self._cancellations.append(request_id)
        self._wake.set()

    def cancel_branch(self, request_id: str, branch_path: str) -> None:
        """Ends a branch before the next step; the join goes on without it.

        Branches that have ended, or that the program does not allow to cancel, are ignored.
        """
        with self._lock:
            self._branch_cancellations.append((request_id, branch_path))
        self._wake.set()

    def is_running(self, request_id: str) -> bool | None:
        """True once it was started, False while it is queued, None if it is not open."""
        with self._lock:
            return self._gate.is_started(request_id)

    @property
    def num_open_requests(self) -> int:
        """Requests that have not had their last output."""
        with self._lock:
            return self._gate.num_open

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody held after the last `run_once`."""
        return self._num_free_blocks

    def add_step_observer(self, observer: Callable[[StepRecord], None]) -> None:
        """Registers a function that the driving thread calls after every step."""
        self._observers.append(observer)

    def keep_step_log(self, path: str | Path) -> None:
        """Writes every step from now on to a JSONL file, until `shutdown`."""
        self._step_log = StepLog(path)
        self.add_step_observer(self._step_log.write)

    def wait_for_work(self, timeout_s: float) -> None:
        """Returns when something was submitted or cancelled, or after the timeout."""
        self._wake.wait(timeout_s)
        self._wake.clear()

    # ------------------------------------------------------------------- the driving thread

    def run_once(self) -> StepRecord | None:
        """One iteration: plan, step, observe. None if there was nothing to compute."""
        started_s = self._clock()
        self._take_notes(started_s)
        planned = self._plan(started_s)
        if planned.plan.is_empty:
            self._engine.idle()
            self._previous_completion_s = None
            self._num_free_blocks = self._engine.num_free_blocks
            return None
        planned_s = self._clock()
        self._note_first_scheduled(planned.plan, planned_s)
        result = self._engine.step(planned.plan)
        record = self._observe(planned, result, started_s, planned_s)
        self._num_free_blocks = record.num_free_blocks
        return record

    def _note_first_scheduled(self, plan: StepPlan, now_s: float) -> None:
        """A request that has a slot may still wait for prefill tokens."""
        requests = [r for r in self._running if r.account.first_scheduled_s is None]
        if not requests:
            return
        scheduled = {*plan.decode, *(chunk.sequence_id for chunk in plan.prefill)}
        for request in requests:
            if any(s.sequence_id in scheduled for s in request.sequences()):
                request.account.first_scheduled_s = now_s

    def _plan(self, now_s: float) -> PlannedStep:
        while True:
            self._start_waiting(now_s)
            changed = [r for r in self._running if r.family in self._sequences.changed]
            if not all(self._fork_and_close(request) for request in changed):
                continue  # one has ended: its place is free
            planned = self._planner.plan(self._running, now_s)
            if not planned.plan.is_empty or not planned.num_preempted:
                return planned
            # All that could run was suspended; it comes back with a full reservation.

    def _fork_and_close(self, request: LiveRequest) -> bool:
        """False if it had to end, because the engine does not take its branches."""
        try:
            request.fork_and_close_where_ready(self._sequences)
        except ValueError as error:
            logger.exception("request %r cannot fork", request.request.request_id)
            self._finish(request, "error", error=str(error))
            return False
        return True

    def drain(self, timeout_s: float | None = None) -> None:
        """Takes no more requests and runs those that are open, until done or out of time."""
        self._close("the server is shutting down")
        deadline_s = None if timeout_s is None else self._clock() + timeout_s
        while self.num_open_requests and (deadline_s is None or self._clock() < deadline_s):
            self.run_once()

    def shutdown(self) -> None:
        """Answers every open request with an error and releases the engine."""
        self.fail_all("the server is shutting down")
        self._engine.shutdown()
        if self._step_log is not None:
            try:
                self._step_log.close()
            except OSError:
                logger.exception("the step log is incomplete")

    def fail_all(self, message: str) -> None:
        """Ends every open request with an error, and takes no more.

        Sequences are left to the engine's `shutdown`: it may be lost, and nothing is asked of it.
        """
        self._close(message)
        self._take_submissions()
        requests = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        for request in requests:
            self._answer(request, "error", error=message)

    def _close(self, because: str) -> None:
        with self._lock:
            self._gate.close(because)

    # --------------------------------------------------------------------- intake and start

    def _take_notes(self, now_s: float) -> None:
        """Queues what was submitted and ends what was cancelled, since the last turn."""
        with self._lock:
            cancelled = set(self._cancellations)
            branches = list(self._branch_cancellations)
            self._cancellations.clear()
            self._branch_cancellations.clear()
        self._take_submissions()  # after the cancels, so that each of them finds its request
        if not cancelled and not branches:
            return
        open_requests = {r.request.request_id: r for r in [*self._running, *self._waiting]}
        for request_id, path in branches:
            if request_id in open_requests and request_id not in cancelled:
                self._end_branch(open_requests[request_id], path, now_s)
        for request_id in cancelled & open_requests.keys():
            self._finish(open_requests[request_id], "cancelled")

    def _take_submissions(self) -> None:
        with self._lock:
            submissions = list(self._submissions)
            self._submissions.clear()
        for submission in submissions:
            self._waiting.append(self._live(submission))

    def _end_branch(self, request: LiveRequest, path: str, now_s: float) -> None:
        if request.state.is_finished:  # by the cancel of another of its branches
            return
        try:
            request.cancel_branch(self._sequences, path, now_s)
        except ValueError as error:
            logger.info("request %r: %s", request.request.request_id, error)
        if request.state.is_finished:
            self._finish(request, "completed", request.take_events())

    def _live(self, submission: _Submission) -> LiveRequest:
        request = submission.request
        fraction = self._scheduler.kv_reserve_fraction
        slo = request.slo or self._slo
        return LiveRequest(
            request,
            family=next(self._families),
            num_reserved_blocks=max(1, int(fraction * self._gate.footprint_blocks(request))),
            tracker=SlackTracker(slo, submission.arrival_s, self._scheduler.margin),
            on_output=submission.on_output,
            arrival_s=submission.arrival_s,
            max_width=self._policy.max_width,
            written=self._written_forks(request),
        )

    def _written_forks(self, request: ForkJoinRequest) -> WrittenForks | None:
        if request.fork_format is None:
            return None
        assert request.max_tokens is not None
        bound = self._fork_formats[request.fork_format]
        return WrittenForks(bound, request.max_tokens, self._limits)

    def _start_waiting(self, now_s: float) -> None:
        """Starts waiting requests in their order, while slots and KV allow it."""
        if not self._waiting:
            return
        unreserved = self._planner.budget(self._running).num_unreserved_blocks
        while len(self._running) < self._scheduler.max_num_requests:
            request = self._waiting.peek(now_s)
            if request is None or request.num_reserved_blocks > unreserved:
                return
            if not self._start_gate.has_time(
                self._running, request, self._waiting, now_s, self._planner.baseline_ms
            ):
                return
            unreserved -= request.num_reserved_blocks
            request.start(self._sequences)
            self._waiting.start(request, now_s)  # after the engine: it is always in one list
            self._running.append(request)
            self._running.sort(key=lambda r: r.family)
            with self._lock:
                self._gate.start(request.request.request_id)

    def _requeue(self, request: LiveRequest) -> None:
        """Suspends a request; it comes back when its whole footprint can be reserved."""
        self._waiting.forget(request)
        self._waiting.put_back(request)  # before the engine: it is in one of the lists
        request.suspend(self._sequences)
        request.num_reserved_blocks = self._gate.footprint_blocks(request.request)

    # ----------------------------------------------------------------------------- observe

    def _observe(
        self, planned: PlannedStep, result: StepResult, started_s: float, planned_s: float
    ) -> StepRecord:
        self._count_decode_step(planned, result)
        began_s = self._previous_completion_s
        step_ms = (result.completed_at_s - (started_s if began_s is None else began_s)) * 1e3
        self._previous_completion_s = result.completed_at_s
        self._learn(planned, result, step_ms)
        owners = {request.family: request for request in self._running}
        failures = self._failures(owners, result)
        outputs = self._advance(owners, planned, result, failures)
        self._waiting.observe()
        self._deliver(outputs, failures, step_ms, result)
        record = self._record(planned, result, started_s, planned_s, step_ms)
        self.records.append(record)
        self._notify(record)
        return record

    def _count_decode_step(self, planned: PlannedStep, result: StepResult) -> None:
        """Tells each request in decode how many of its ready leaves really advanced."""
        if result.decoded == planned.plan.decode:
            for request, num_ready, num_admitted in planned.ready:
                request.count_decode_step(num_ready, num_admitted, planned.is_probe)
            return
        advanced = Counter(self._sequences[i].family for i in result.decoded)
        for request, num_ready, _ in planned.ready:
            num_advanced = min(num_ready, advanced[request.family])
            request.count_decode_step(num_ready, num_advanced, planned.is_probe)

    def _learn(self, planned: PlannedStep, result: StepResult, step_ms: float) -> None:
        """What the iterations say about step times: the engine's account, or the plan's."""
        audits = result.audits
        if audits is None:
            width, context_tokens = len(result.decoded), planned.num_context_tokens
            if width != len(planned.plan.decode):
                return
            audit = IterationAudit(
                result.iteration, step_ms, width, context_tokens, planned.prefill
            )
            audits = (audit,)
        for audit in audits:
            width, context_tokens = audit.width, audit.num_context_tokens
            self._predictor.observe(width, context_tokens, audit.prefill, audit.step_ms)
            has_prefill = audit.prefill.num_tokens > 0
            self._start_gate.observe(width, context_tokens, has_prefill, audit.step_ms)

    def _notify(self, record: StepRecord) -> None:
        """Tells the observers; one that fails (a full disk, say) is called no more."""
        for observer in list(self._observers):
            try:
                observer(record)
            except Exception:
                logger.exception("a step observer failed; it is called no more")
                self._observers.remove(observer)

    def _failures(
        self, owners: dict[int, LiveRequest], result: StepResult
    ) -> dict[LiveRequest, str]:
        """Requests that have a branch which cannot go on, with the reason."""
        failures: dict[LiveRequest, str] = {}
        for sequence_id, message in result.failed.items():
            sequence = self._sequences[sequence_id]
            message = f"branch {sequence.node.path!r} failed: {message}"
            failures.setdefault(owners[sequence.family], message)
        return failures

    def _advance(
        self,
        owners: dict[int, LiveRequest],
        planned: PlannedStep,
        result: StepResult,
        failures: dict[LiveRequest, str],
    ) -> dict[LiveRequest, list[BranchOutput]]:
        """New outputs by request; one whose tokens cannot be taken joins the failures."""
        sequences, now_s = self._sequences, result.completed_at_s
        outputs: dict[LiveRequest, list[BranchOutput]] = {}
        for family, new_tokens in sequences.observe(
            planned.decode_rows, planned.plan, result
        ).items():
            request = owners[family]
            try:
                outputs[request] = request.take_tokens(sequences, new_tokens, now_s)
            except ValueError as error:
                logger.exception("request %r cannot go on", request.request.request_id)
                failures.setdefault(request, str(error))
        return outputs

    def _deliver(
        self,
        outputs: dict[LiveRequest, list[BranchOutput]],
        failures: dict[LiveRequest, str],
        step_ms: float,
        result: StepResult,
    ) -> None:
        for request, message in failures.items():
            self._finish(request, "error", tuple(outputs.pop(request, ())), message)
        for request, branches in outputs.items():
            if request.state.is_finished:
                self._finish(request, "completed", tuple(branches))
                continue
            watched = request.request.events
            progress = _progress(request, branches, step_ms, result) if watched else None
            self._emit(
                request,
                RequestOutput(request.request.request_id, tuple(branches), progress=progress),
            )

    def _finish(
        self,
        request: LiveRequest,
        reason: FinishReason,
        branches: tuple[BranchOutput, ...] = (),
        error: str | None = None,
    ) -> None:
        """Ends a request: its whole family leaves the engine, and the last output goes out."""
        request.release(self._sequences)
        if request in self._running:
            self._running.remove(request)
            self._waiting.forget(request)
        else:
            self._waiting.remove(request)
        self._answer(request, reason, branches, error)

    def _answer(
        self,
        request: LiveRequest,
        reason: FinishReason,
        branches: tuple[BranchOutput, ...] = (),
        error: str | None = None,
    ) -> None:
        """The last output of a request goes out."""
        with self._lock:
            self._gate.leave(request.request.request_id)
        metrics = request.metrics(self._epoch_s)
        self._emit(
            request,
            RequestOutput(request.request.request_id, branches, reason, error, metrics),
        )

    def _emit(self, request: LiveRequest, output: RequestOutput) -> None:
        try:
            request.on_output(output)
        except Exception:
            logger.exception("output callback of %r failed", output.request_id)
            if not output.finished:
                self.cancel(output.request_id)

    def _record(
        self,
        planned: PlannedStep,
        result: StepResult,
        started_s: float,
        planned_s: float,
        step_ms: float,
    ) -> StepRecord:
        decision = planned.decision
        budget_ms = decision.budget_ms if decision else float("inf")
        return StepRecord(
            iteration=result.iteration,
            started_at_s=started_s,
            completed_at_s=result.completed_at_s,
            plan_ms=(planned_s - started_s) * 1e3,
            step_ms=step_ms,
            predicted_step_ms=decision.step_ms if decision else None,
            predicted_baseline_ms=decision.baseline_ms if decision else None,
            budget_ms=budget_ms if budget_ms != float("inf") else None,
            min_slack_ms=planned.min_slack_ms,
            num_requests=len(planned.ready),
            num_ready=sum(num_ready for _, num_ready, _ in planned.ready),
            num_admitted=len(result.decoded),
            num_extras=max(0, len(result.decoded) - len(planned.ready)),
            refusals=planned.refusals,
            num_prefill_tokens=sum(result.prefilled.values()),
            num_queued=len(self._waiting),
            num_free_blocks=self._engine.num_free_blocks,
            num_preempted=planned.num_preempted,
            is_probe=planned.is_probe,
            correction_factor=self._predictor.correction_factor,
            policy=self._policy.name,
        )


def _bind_fork_formats(config: ServingConfig) -> Iterator[BoundForkFormat]:
    """The shipped formats and those of the configuration; none without a tokenizer."""
    tokenizer = load_tokenizer(config.engine)
    formats = {**FORMATS}
    if config.fork_formats is not None:
        formats |= {form.name: form for form in load_fork_formats(config.fork_formats)}
    if tokenizer is not None:
        for form in formats.values():
            yield BoundForkFormat(form, tokenizer)


def _progress(
    request: LiveRequest, outputs: Iterable[BranchOutput], step_ms: float, result: StepResult
) -> StepProgress:
    """For those who watch: how the request stands after a step."""
    slack_s = request.tracker.slack_s(result.completed_at_s)
    return StepProgress(
        step_ms=step_ms,
        slack_ms=None if slack_s == float("inf") else slack_s * 1e3,
        width=sum(not output.event for output in outputs),
        batch_width=len(result.tokens),
    )
