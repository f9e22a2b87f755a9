"""Who may come in: every check on a request before it is queued, and which requests are open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from taper_trtllm.engines.base import EngineCapabilities
from taper_trtllm.fork_format import BoundForkFormat
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import ForkJoinRequest, RequestError, RequestLimits, check_request


class QueueFullError(RequestError):
    """The waiting queue is at its limit."""


class ExecutorClosedError(RuntimeError):
    """The executor takes no more requests."""


@dataclass(frozen=True, slots=True)
class FormatTerms:
    """What a request in a fork format must be known for, wherever it is checked.

    Attributes:
        max_depth: How deep the model may nest its forks.
        has_join_text: The model goes on behind a text of the format's; KV cannot be merged without.
        refusal: Why the format cannot be served; None if it can.
    """

    max_depth: int
    has_join_text: bool = True
    refusal: str | None = None

    @classmethod
    def of(
        cls, bound: BoundForkFormat, limits: RequestLimits, capabilities: EngineCapabilities
    ) -> FormatTerms:
        """Terms of a format for a model, under limits, on an engine."""
        refusal = None
        given = (*bound.branch_header_ids("1"), *bound.join_ids(), *bound.forced_close_ids())
        if max(given) >= capabilities.vocab_size:
            refusal = f"its texts have tokens outside the vocabulary of {capabilities.vocab_size}"
        elif bound.tag_ids is None and capabilities.granularity == "lease":
            refusal = (
                "its tags are not single tokens of this model, and the engine draws several tokens "
                "before anyone can look at them"
            )
        max_depth = min(bound.format.limits.max_depth, limits.max_depth)
        return cls(max_depth, bool(bound.format.join_text), refusal)


class RequestGate:
    """Keeps the open requests. Not locked: whoever shares it between threads locks.

    Args:
        limits: What one request may ask for.
        capabilities: The engine's limits count too: what it cannot hold is refused, not tried.
        format_terms: Fork formats, by name.
    """

    def __init__(
        self,
        limits: RequestLimits,
        capabilities: EngineCapabilities,
        format_terms: Mapping[str, FormatTerms],
    ) -> None:
        longest = min(limits.max_total_tokens, capabilities.max_seq_len)
        self._limits = limits.model_copy(update={"max_total_tokens": longest})
        self._capabilities = capabilities
        self._format_terms = format_terms
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
        if request.join_mode == "kv_merge" and not self._capabilities.kv_merge:
            name = self._capabilities.name
            raise RequestError("join_mode", f"'kv_merge' is not supported by engine {name!r}")
        if self.footprint_blocks(request) > self._capabilities.num_kv_blocks:
            field = "stages" if request.stages else "max_tokens"
            raise RequestError(field, "needs more KV cache than the engine has")

    def footprint_blocks(self, request: ForkJoinRequest) -> int:
        """Worst-case serial footprint (`kv_budget.py`); needs no lock.

        Raises:
            RequestError: Its fork format cannot be served.
        """
        return serial_footprint_blocks(
            len(request.input_ids),
            request.program,
            self._capabilities.tokens_per_block,
            self._written_depth(request),
        )

    def _written_depth(self, request: ForkJoinRequest) -> int:
        name = request.fork_format
        if name is None:
            return 0
        terms = self._format_terms.get(name)
        if terms is None:
            known = ", ".join(sorted(self._format_terms))
            reason = f"is not one of {known}" if known else "needs a tokenizer of the served model"
            raise RequestError("fork_format", f"{name!r:.80} {reason}")
        if terms.refusal is not None:
            raise RequestError("fork_format", f"{name!r} cannot be served: {terms.refusal}")
        if request.join_mode == "kv_merge" and not terms.has_join_text:
            raise RequestError("join_mode", f"'kv_merge' needs a join text, {name!r} has none")
        return terms.max_depth

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
