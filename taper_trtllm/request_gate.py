"""Who may come in: every check on a request before it is queued, and which requests are open."""

from __future__ import annotations

from taper_trtllm.engines.base import EngineCapabilities
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import ForkJoinRequest, RequestError, RequestLimits, check_request


class QueueFullError(RequestError):
    """The waiting queue is at its limit."""


class ExecutorClosedError(RuntimeError):
    """The executor takes no more requests."""


class RequestGate:
    """Keeps the open requests. Not locked: whoever shares it between threads locks.

    Args:
        limits: What one request may ask for.
        capabilities: The engine's limits count too: what it cannot hold is refused, not tried.
    """

    def __init__(self, limits: RequestLimits, capabilities: EngineCapabilities) -> None:
        longest = min(limits.max_total_tokens, capabilities.max_seq_len)
        self._limits = limits.model_copy(update={"max_total_tokens": longest})
        self._capabilities = capabilities
        self._is_started: dict[str, bool] = {}
        self._num_waiting = 0
        self._closed_because: str | None = None

    def check(self, request: ForkJoinRequest) -> None:
        """Checks a request by itself; needs no lock.

        Raises:
            RequestError: It is out of limits.
            ExecutorClosedError: The gate is closed.
        """
        self._check_open()
        check_request(request, self._limits, self._capabilities.vocab_size)
        footprint = serial_footprint_blocks(
            len(request.input_ids), request.program, self._capabilities.tokens_per_block
        )
        if footprint > self._capabilities.num_kv_blocks:
            raise RequestError("stages", "needs more KV cache than the engine has")

    def enter(self, request_id: str) -> None:
        """Opens a request, waiting.

        Raises:
            RequestError: The id is in use.
            QueueFullError: Too many requests wait.
            ExecutorClosedError: The gate is closed.
        """
        self._check_open()
        if request_id in self._is_started:
            raise RequestError("request_id", f"{request_id!r} is already in use")
        limit = self._limits.max_queue_length
        if self._num_waiting >= limit:
            raise QueueFullError("request", f"the queue is full ({limit} requests wait)")
        self._is_started[request_id] = False
        self._num_waiting += 1

    def start(self, request_id: str) -> None:
        """An open request does not wait any more."""
        if not self._is_started[request_id]:
            self._is_started[request_id] = True
            self._num_waiting -= 1

    def leave(self, request_id: str) -> None:
        """Closes a request."""
        if not self._is_started.pop(request_id):
            self._num_waiting -= 1

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise ExecutorClosedError(self._closed_because)

    def close(self, because: str) -> None:
        """Nothing enters from now on; the first reason given is told to whoever tries."""
        self._closed_because = self._closed_because or because

    def is_started(self, request_id: str) -> bool | None:
        """None if the request is not open."""
        return self._is_started.get(request_id)

    @property
    def num_open(self) -> int:
        """Open requests."""
        return len(self._is_started)
