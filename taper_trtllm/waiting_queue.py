"""Requests that wait for a slot and for memory, and the order in which they get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

from taper_trtllm.config import LateRequests
from taper_trtllm.live_request import LiveRequest

_MEAN_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4  # RFC 6298
_DEVIATIONS = 2.0
_MOST_OF_TTFT = 0.5  # of the objective that the expected delay may take: nobody arrives late
_STARTS_PER_LATE = 16  # one start in so many goes to a late request, if any waits


class FirstTokenDelay:
    """How long a started request takes to its first token, learned from those before it.

    Mean and deviation as TCP keeps them for its retransmission timeout (RFC 6298).
    """

    def __init__(self) -> None:
        self._mean_ms: float | None = None
        self._deviation_ms = 0.0

    @property
    def expected_ms(self) -> float:
        """Long enough for nearly all; 0 before the first observation."""
        return (self._mean_ms or 0.0) + _DEVIATIONS * self._deviation_ms

    def observe(self, delay_ms: float) -> None:
        """One more request had its first token."""
        if self._mean_ms is None:
            self._mean_ms = delay_ms
        error_ms = delay_ms - self._mean_ms
        self._mean_ms += _MEAN_GAIN * error_ms
        self._deviation_ms += _DEVIATION_GAIN * (abs(error_ms) - self._deviation_ms)


class WaitingQueue:
    """First come, first served; with ``defer``, who will miss the TTFT objective comes last.

    Serving a request that will miss helps no objective, and costs the next ones theirs: without
    this, a queue under overload settles where everyone starts at the edge of the objective, and all
    miss it. Nobody is dropped: who is late starts when nobody who can still be in time waits, and
    one start in sixteen is theirs in any case. A request that had begun to answer and was suspended
    comes back first.

    Args:
        late_requests: ``defer`` or ``fcfs``.
    """

    def __init__(self, late_requests: LateRequests) -> None:
        self._defers = late_requests == "defer"
        self._queue: deque[LiveRequest] = deque()
        self._late: deque[LiveRequest] = deque()
        self._delay = FirstTokenDelay()
        self._starting: dict[LiveRequest, float] = {}  # started at, and no token yet
        self._num_starts = 0  # since a late request was started

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
        while self._defers and self._queue and self._is_late(self._queue[0], now_s):
            self._late.append(self._queue.popleft())
        first = next(iter(self), None)
        is_their_turn = self._late and self._num_starts >= _STARTS_PER_LATE - 1
        if is_their_turn and first is not None and not first.has_started_decoding:
            return self._late[0]
        return first

    def start(self, request: LiveRequest, now_s: float) -> None:
        """Takes a request out that begins to run; its first token is learned from.

        Raises:
            ValueError: It does not wait.
        """
        self._num_starts = 0 if request in self._late else self._num_starts + 1
        self.remove(request)
        if not request.has_started_decoding:
            self._starting[request] = now_s

    def observe(self) -> None:
        """Learns from the started requests that have had their first token."""
        for request in [r for r in self._starting if r.has_started_decoding]:
            started_s, first_token_s = self._starting.pop(request), request.tracker.first_token_s
            assert first_token_s is not None
            self._delay.observe((first_token_s - started_s) * 1e3)

    def remove(self, request: LiveRequest) -> None:
        """Takes a request out.

        Raises:
            ValueError: It does not wait.
        """
        (self._queue if request in self._queue else self._late).remove(request)

    def forget(self, request: LiveRequest) -> None:
        """A request that was started has ended, or is suspended."""
        self._starting.pop(request, None)

    def clear(self) -> None:
        """Takes all out."""
        self._queue.clear()
        self._late.clear()
        self._starting.clear()

    def _is_late(self, request: LiveRequest, now_s: float) -> bool:
        """It will have missed its TTFT objective by its first token."""
        tracker = request.tracker
        delay_ms = min(self._delay.expected_ms, _MOST_OF_TTFT * tracker.slo.ttft_ms)
        return not request.has_started_decoding and tracker.ttft_left_ms(now_s) < delay_ms
