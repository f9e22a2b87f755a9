"""Requests that wait for a slot and for memory, and the order in which they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Literal

from taper_trtllm.live_request import LiveRequest

LateRequests = Literal["defer", "fcfs"]


class WaitingQueue:
    """First come, first served; with ``defer``, those that missed their TTFT objective come last.

    Serving a request that has missed already helps no objective, and may cost the next ones theirs.
    It is never dropped: it starts when nobody who can still be in time waits. A request that had
    begun to answer and was suspended comes back first.

    Args:
        late_requests: ``defer`` or ``fcfs``.
    """

    def __init__(self, late_requests: LateRequests) -> None:
        self._defers = late_requests == "defer"
        self._queue: deque[LiveRequest] = deque()
        self._late: deque[LiveRequest] = deque()

    def __len__(self) -> int:
        return len(self._queue) + len(self._late)

    def __iter__(self) -> Iterator[LiveRequest]:
        return chain(self._queue, self._late)

    def append(self, request: LiveRequest) -> None:
        """A new request."""
        self._queue.append(request)

    def put_back(self, request: LiveRequest) -> None:
        """A suspended request: before all others."""
        self._queue.appendleft(request)

    def peek(self, now_s: float) -> LiveRequest | None:
        """Who is next; stays in the queue."""
        while self._defers and self._queue and _is_late(self._queue[0], now_s):
            self._late.append(self._queue.popleft())
        return next(iter(self), None)

    def remove(self, request: LiveRequest) -> None:
        """Takes a request out.

        Raises:
            ValueError: It does not wait.
        """
        (self._queue if request in self._queue else self._late).remove(request)

    def clear(self) -> None:
        """Takes all out."""
        self._queue.clear()
        self._late.clear()


def _is_late(request: LiveRequest, now_s: float) -> bool:
    return not request.has_started_decoding and request.tracker.ttft_left_ms(now_s) < 0
