"""What TensorRT-LLM's statistics say of its iterations: who was in them, how long they took.

Both kinds of statistics get an entry when a step was launched (`executionLoop`,
executor/executorImpl.cpp @b35ac1b6): `iter` and `RequestStats.scheduled` are of that step, while
`iter_latency_ms` is of the step *before*, from the fetch of its turn on; after an idle time that
fetch has waited for a request, so its latency says nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.engines.base import IterationAudit
from taper_trtllm.engines.trtllm_session import News

_MAX_ENDED = 1024  # requests that are remembered after their end; statistics come late


@dataclass(frozen=True, slots=True)
class _Launched:
    """The members of a step whose latency is not known yet."""

    iteration: int
    width: int
    num_context_tokens: int
    prefill: PrefillLoad
    is_after_idle: bool


class Auditor:
    """Joins the two kinds of statistics to audits of iterations.

    Attributes:
        num_missed_blocks: Prompt blocks that were thought to have KV and were not found.
    """

    def __init__(self) -> None:
        self.num_missed_blocks = 0
        self._prompt_lengths: dict[int, int] = {}  # of requests that statistics may name
        self._num_known_blocks: dict[int, int] = {}  # of those that have not run
        self._ended: deque[int] = deque()
        self._iterations: deque[Any] = deque()
        self._requests: deque[Any] = deque()
        self._launched: _Launched | None = None

    def begin(self, request_id: int, prompt_length: int, num_known_blocks: int) -> None:
        """A request is going to be named, so many full blocks of whose prompt should be found."""
        self._prompt_lengths[request_id] = prompt_length
        self._num_known_blocks[request_id] = num_known_blocks

    def end(self, request_id: int) -> None:
        """It ended; entries about its last steps may still come."""
        self._ended.append(request_id)
        if len(self._ended) > _MAX_ENDED:
            forgotten = self._ended.popleft()
            self._prompt_lengths.pop(forgotten, None)
            self._num_known_blocks.pop(forgotten, None)

    def audit(self, news: News) -> tuple[IterationAudit, ...]:
        """The iterations whose latency became known."""
        self._iterations.extend(news.iterations)
        self._requests.extend(news.requests)
        audits = []
        while self._iterations and self._requests:
            stats, requests = self._iterations[0], self._requests[0]
            if stats.iter != requests.iter:  # the other half was dropped unread
                late = self._iterations if stats.iter < requests.iter else self._requests
                late.popleft()
                self._launched = None
                continue
            self._iterations.popleft()
            self._requests.popleft()
            if self._launched is not None and stats.iter != self._launched.iteration + 1:
                self._launched = None  # the entry with its latency was dropped unread
            launched, latency_ms = self._launched, float(stats.iter_latency_ms)
            if launched is not None and not launched.is_after_idle and latency_ms > 0:
                audits.append(
                    IterationAudit(
                        launched.iteration,
                        latency_ms,
                        launched.width,
                        launched.num_context_tokens,
                        launched.prefill,
                    )
                )
            self._launched = self._members(stats, requests.request_stats)
        return tuple(audits)

    def _members(self, stats: Any, requests: Sequence[Any]) -> _Launched | None:
        """Who was launched; None if nobody was.

        A request that computes its last prompt tokens counts as generating already; it has drawn
        nothing yet.
        """
        scheduled = [request for request in requests if request.scheduled]
        if not scheduled:
            return None
        for request in scheduled:  # what is reused is found with the first chunk
            num_known = self._num_known_blocks.pop(int(request.id), 0)
            num_found = int(request.reused_blocks_per_request)
            self.num_missed_blocks += max(0, num_known - num_found)
        contexts = [
            self._prompt_lengths.get(int(request.id), 0) + int(request.num_generated_tokens)
            for request in scheduled
            if request.num_generated_tokens
        ]
        ends = [
            int(request.context_prefill_position)
            for request in scheduled
            if not request.num_generated_tokens
        ]
        batch = stats.inflight_batching_stats
        num_chunks, num_tokens = int(batch.num_context_requests), int(batch.num_ctx_tokens)
        # Only the sum of chunk lengths is told: each counts as long as their mean.
        seen = sum(max(0.0, end - num_tokens / len(ends) / 2) for end in ends)
        load = PrefillLoad(num_chunks, num_tokens, num_tokens * seen / max(1, len(ends)))
        return _Launched(
            int(stats.iter), len(contexts), sum(contexts), load, self._launched is None
        )
