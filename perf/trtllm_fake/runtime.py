"""The fake executor without the bindings' classes around it: loop, responses, statistics, drive.

What calls do and raise follows `Executor::Impl` (executor/executorImpl.cpp @b35ac1b6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from perf.trtllm_fake.active_request import Submission
from perf.trtllm_fake.block_tree import BlockTree
from perf.trtllm_fake.clock import Clock, VirtualClock, WallClock
from perf.trtllm_fake.decoders import Decoder, StepRecord
from perf.trtllm_fake.drive import Drive, ThreadedDrive, VirtualDrive
from perf.trtllm_fake.loop import ExecutionLoop, LoopLimits, QueuedRequest
from perf.trtllm_fake.responses import Mailbox
from perf.trtllm_fake.stats import Statistics


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What a runtime is made of, engine and executor configuration together.

    Attributes:
        limits: Of requests and steps.
        num_kv_blocks: Size of the KV pool.
        tokens_per_block: KV block size.
        drive: ``threaded``: a thread, in real time. ``virtual``: the caller who waits, in virtual
            time.
        enable_block_reuse: See `BlockTree`.
        enable_partial_reuse: See `BlockTree`.
        copy_on_partial_reuse: See `BlockTree`.
        iter_stats_max_iterations: Iteration statistics kept.
        request_stats_max_iterations: Request statistics kept.
    """

    limits: LoopLimits
    num_kv_blocks: int
    tokens_per_block: int
    drive: Literal["threaded", "virtual"]
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    iter_stats_max_iterations: int = 1000
    request_stats_max_iterations: int = 0


class Runtime:
    """Runs requests; also what tests hold on to.

    Args:
        config: Limits and memory.
        decoder: Computes the steps.
        module: The bindings' classes, for responses and statistics.

    Attributes:
        tree: The KV blocks.
    """

    def __init__(self, config: RuntimeConfig, decoder: Decoder, module: SimpleNamespace) -> None:
        virtual_clock = VirtualClock()
        self._clock: Clock = virtual_clock if config.drive == "virtual" else WallClock()
        self.tree = BlockTree(
            config.num_kv_blocks,
            config.tokens_per_block,
            self._clock.now_s,
            enable_reuse=config.enable_block_reuse,
            enable_partial_reuse=config.enable_partial_reuse,
            copy_on_partial_reuse=config.copy_on_partial_reuse,
        )
        self._mailbox = Mailbox(module)
        self._statistics = Statistics(
            module,
            self.tree,
            config.limits.max_batch_size,
            config.iter_stats_max_iterations,
            config.request_stats_max_iterations,
        )
        self._loop = ExecutionLoop(
            config.limits,
            self.tree,
            decoder,
            self._clock,
            self._mailbox.post,
            self._statistics.append,
        )
        self._drive: Drive = (
            VirtualDrive(self._loop, virtual_clock)
            if config.drive == "virtual"
            else ThreadedDrive(self._loop)
        )
        self._num_ids = 0
        self._shut_down = False

    # ---- requests and responses

    def enqueue(self, requests: Sequence[Submission]) -> list[int]:
        """Queues requests; returns their ids, counted from 1.

        Raises:
            RuntimeError: Shut down, or the queue is full; nothing was queued.
        """
        with self._drive.lock:
            self._check_running("Shutdown called, cannot enqueue requests")
            limit = self._loop.limits.max_queue_size
            if limit and self._loop.num_queued + len(requests) > limit:
                raise RuntimeError(
                    f"Maximum queue size of {limit} has been reached, please try again later"
                )
            now_s = self._clock.now_s()
            first = self._num_ids + 1
            self._num_ids += len(requests)
            ids = list(range(first, self._num_ids + 1))
            self._loop.enqueue(
                QueuedRequest(request_id, asked, now_s)
                for request_id, asked in zip(ids, requests, strict=True)
            )
            self._drive.wake()
            return ids

    def cancel(self, request_id: int) -> None:
        """Asks for a request to end; ignored if its last response was taken."""
        with self._drive.lock:
            self._check_running()
            if not self._mailbox.is_terminated(request_id):
                self._loop.cancel(request_id)

    def await_all(self, timeout_s: float | None) -> list[Any]:
        """Responses of all requests, as soon as there are some."""
        with self._drive.lock:
            self._check_running()
            self._drive.wait_for(lambda: self._mailbox.num_ready() > 0, timeout_s)
            return self._mailbox.take_all()

    def await_one(self, request_id: int, timeout_s: float | None) -> list[Any]:
        """Responses of one request, as soon as there are some."""
        with self._drive.lock:
            self._check_running()
            mailbox = self._mailbox
            if not mailbox.is_terminated(request_id):
                self._drive.wait_for(lambda: mailbox.num_ready(request_id) > 0, timeout_s)
            return mailbox.take(request_id)

    def await_several(self, ids: Iterable[int], timeout_s: float | None) -> list[list[Any]]:
        """Responses of requests, one after the other; the time limit is for all together."""
        end_s = None if timeout_s is None else self._clock.now_s() + timeout_s
        responses = []
        for request_id in ids:
            left_s = None if end_s is None else max(0.0, end_s - self._clock.now_s())
            responses.append(self.await_one(request_id, left_s))
        return responses

    def num_ready(self, request_id: int | None) -> int:
        """Responses that can be taken."""
        with self._drive.lock:
            self._check_running()
            return self._mailbox.num_ready(request_id)

    # ---- statistics

    def take_iteration_stats(self) -> list[Any]:
        """Those since the last call."""
        with self._drive.lock:
            self._check_running()
            return self._statistics.take_iterations()

    def take_request_stats(self) -> list[Any]:
        """Those since the last call."""
        with self._drive.lock:
            self._check_running()
            return self._statistics.take_requests()

    # ---- the end

    @property
    def can_enqueue(self) -> bool:
        """It was not shut down."""
        return not self._shut_down

    def shutdown(self) -> None:
        """Lets queued and active requests run to their end, then stops for good."""
        if not self._shut_down:
            self._shut_down = True
            self._drive.stop()

    def _check_running(self, message: str = "Shutdown called") -> None:
        if self._shut_down:
            raise RuntimeError(message)

    # ---- hooks of tests and simulations

    def now_s(self) -> float:
        """The clock of everything here."""
        return self._clock.now_s()

    def advance_to(self, time_s: float) -> None:
        """Lets virtual time pass without a turn; never back."""
        self._clock.wait_until(time_s)

    def fail_next_step(self, message: str) -> None:
        """The step in flight, or else the next one, fails with this message."""
        with self._drive.lock:
            self._loop.fail_next_step(message)

    @property
    def num_iterations(self) -> int:
        """Steps that have ended."""
        return self._loop.iter

    @property
    def num_active(self) -> int:
        """Requests that were fetched and have not ended."""
        return self._loop.num_active

    @property
    def num_queued(self) -> int:
        """Requests that were not fetched."""
        return self._loop.num_queued

    @property
    def history(self) -> Sequence[StepRecord]:
        """Launched steps, oldest first; the last few thousand."""
        with self._drive.lock:
            return list(self._loop.history)

    def check_integrity(self) -> None:
        """Recounts all KV blocks.

        Raises:
            AssertionError: See `BlockTree.check_integrity`.
        """
        with self._drive.lock:
            self.tree.check_integrity()
