"""Who runs the loop: a thread in real time, or the caller who waits, in virtual time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from perf.trtllm_fake.clock import VirtualClock
from perf.trtllm_fake.loop import ExecutionLoop


class Drive(Protocol):
    """Runs turns of a loop; `lock` guards everything but `ExecutionLoop.compute`."""

    lock: threading.Condition

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        """Waits until something is ready, at most so long; called with the lock held."""

    def wake(self) -> None:
        """Something was queued; called with the lock held."""

    def stop(self) -> None:
        """Runs what is active and queued to its end, as the original does; then no more."""


class VirtualDrive:
    """The caller who waits runs turns himself; in between, nothing happens.

    Args:
        loop: What to run.
        clock: Its clock.
    """

    def __init__(self, loop: ExecutionLoop, clock: VirtualClock) -> None:
        self.lock = threading.Condition(threading.RLock())
        self._loop = loop
        self._clock = clock

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        """Runs turns, at least one unless something is ready.

        Returns when something is ready, when the time is over, or when there is nothing to do; the
        original would wait on for a request.

        Raises:
            RuntimeError: There is no time limit and no request can ever be scheduled.
        """
        loop, clock = self._loop, self._clock
        end_s = None if timeout_s is None else clock.now_s() + timeout_s
        while not ready():
            loop.compute()
            if not loop.turn() or (end_s is not None and clock.now_s() >= end_s):
                return
            if end_s is None and loop.is_stuck and not loop.num_queued:
                raise RuntimeError(
                    f"{loop.num_active} active requests, none of which can be scheduled: too few "
                    "KV blocks"
                )

    def wake(self) -> None:
        """See `Drive`."""

    def stop(self) -> None:
        """See `Drive`; gives up on what can never be scheduled."""
        busy = True
        while busy and not (self._loop.is_stuck and self._loop.num_active):
            self._loop.compute()
            busy = self._loop.turn()


class ThreadedDrive:
    """A daemon thread runs the loop in real time.

    The thread holds the lock from the publishing of responses to the launch of the next step: who
    is woken by the responses of step k acts while step k + 1 runs.

    Args:
        loop: What to run.
    """

    def __init__(self, loop: ExecutionLoop) -> None:
        self.lock = threading.Condition(threading.RLock())
        self._loop = loop
        self._stopping = False
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="executionLoop", daemon=True)
        self._thread.start()

    def wait_for(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        """See `Drive`."""
        self.lock.wait_for(lambda: ready() or self._stopping or self._crash is not None, timeout_s)
        if self._crash is not None:
            raise RuntimeError("the loop of the fake executor has crashed") from self._crash

    def wake(self) -> None:
        """See `Drive`."""
        self.lock.notify_all()

    def stop(self) -> None:
        """See `Drive`; gives up on what can never be scheduled."""
        with self.lock:
            self._stopping = True
            self.lock.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            with self.lock:
                self._crash = error
                self.lock.notify_all()

    def _turn(self) -> bool:
        self._loop.compute()
        with self.lock:
            busy = self._loop.turn()
            self.lock.notify_all()
            if self._stopping and (not busy or self._loop.is_stuck):
                return False
            if not busy:
                self.lock.wait_for(lambda: self._loop.num_queued > 0 or self._stopping)
        return True
