"""Iteration and request statistics, kept in bounded queues that drop the oldest silently.

Follows `appendCurrentIterStats`, `getCurrentIterationStats` and `getCurrentRequestStats`
(executor/executorImpl.cpp, batch_manager/trtGptModelInflightBatching.cpp @b35ac1b6). An entry is
appended when a step was launched: its `iter`, its in-flight numbers and `scheduled` are of that
step, while its latency is of the step before. One more is appended when the last active request has
ended.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from perf.trtllm_fake.active_request import ActiveRequest, State
from perf.trtllm_fake.block_tree import BlockCounts, BlockTree
from perf.trtllm_fake.loop import TurnReport
from perf.trtllm_fake.making import Maker

_NO_COUNTS = BlockCounts()
_Row = tuple[int, str, int, int, float, bool, BlockCounts]


class Statistics:
    """Keeps what the loop reports until somebody asks.

    Args:
        module: The strict classes.
        tree: KV blocks.
        max_num_active: Most active requests.
        max_iterations: Iteration statistics kept; 0 for none.
        max_request_iterations: Request statistics kept; 0 for none.
    """

    def __init__(
        self,
        module: SimpleNamespace,
        tree: BlockTree,
        max_num_active: int,
        max_iterations: int,
        max_request_iterations: int,
    ) -> None:
        self._make_iteration = Maker(module.IterationStats)
        self._make_inflight = Maker(module.InflightBatchingStats)
        self._make_kv_cache = Maker(module.KvCacheStats)
        self._make_requests = Maker(module.RequestStatsPerIteration)
        self._make_request = Maker(module.RequestStats)
        self._stages = module.RequestStage.__members__
        self._tree = tree
        self._max_num_active = max_num_active
        self._iterations: deque[tuple[dict[str, Any], ...]] = deque(maxlen=max_iterations)
        self._requests: deque[tuple[int, list[_Row]]] = deque(maxlen=max_request_iterations)

    def append(self, report: TurnReport) -> None:
        """Takes the report of a turn."""
        if self._iterations.maxlen:
            self._iterations.append((self._numbers(report), _inflight(report), self._kv_cache()))
        if self._requests.maxlen:
            self._requests.append((report.iter, _rows(report)))

    def take_iterations(self) -> list[Any]:
        """`IterationStats` since the last call, oldest first."""
        taken = [self._iteration(*entry) for entry in self._iterations]
        self._iterations.clear()
        return taken

    def take_requests(self) -> list[Any]:
        """`RequestStatsPerIteration` since the last call, oldest first."""
        taken = [
            self._make_requests(iter=number, request_stats=[self._request(row) for row in rows])
            for number, rows in self._requests
        ]
        self._requests.clear()
        return taken

    def _kv_cache(self) -> dict[str, Any]:
        tree, counts = self._tree, self._tree.counts
        return {
            "max_num_blocks": tree.num_blocks,
            "free_num_blocks": tree.num_free_blocks,
            "used_num_blocks": tree.num_blocks - tree.num_free_blocks,
            "tokens_per_block": tree.tokens_per_block,
            "alloc_total_blocks": counts.alloc_total,
            "alloc_new_blocks": counts.alloc_new,
            "reused_blocks": counts.reused,
            "missed_blocks": counts.missed,
            "cache_hit_rate": counts.hit_rate,
        }

    def _numbers(self, report: TurnReport) -> dict[str, Any]:
        return {
            "timestamp": "",
            "iter": report.iter,
            "iter_latency_ms": report.iter_latency_ms,
            "new_active_requests_queue_latency_ms": report.queue_latency_ms,
            "num_new_active_requests": report.num_new,
            "num_active_requests": len(report.active),
            "num_queued_requests": len(report.queued),
            "num_completed_requests": len(report.finished),
            "max_num_active_requests": self._max_num_active,
            "gpu_mem_usage": 0,
            "cpu_mem_usage": 0,
            "pinned_mem_usage": 0,
        }

    def _iteration(
        self, numbers: dict[str, Any], inflight: dict[str, Any], kv_cache: dict[str, Any]
    ) -> Any:
        return self._make_iteration(
            **numbers,
            kv_cache_stats=self._make_kv_cache(**kv_cache),
            cross_kv_cache_stats=None,
            static_batching_stats=None,
            inflight_batching_stats=self._make_inflight(**inflight),
            specdec_stats=None,
        )

    def _request(self, row: _Row) -> Any:
        request_id, stage, position, num_generated, per_iter, scheduled, counts = row
        return self._make_request(
            id=request_id,
            stage=self._stages[stage],
            context_prefill_position=position,
            num_generated_tokens=num_generated,
            avg_num_decoded_tokens_per_iter=per_iter,
            scheduled=scheduled,
            paused=False,
            dis_serving_stats=None,
            alloc_total_blocks_per_request=counts.alloc_total,
            alloc_new_blocks_per_request=counts.alloc_new,
            reused_blocks_per_request=counts.reused,
            missed_blocks_per_request=counts.missed,
            kv_cache_hit_rate_per_request=counts.hit_rate,
        )


def _inflight(report: TurnReport) -> dict[str, Any]:
    step = report.step
    num_context = len(step.context) if step else 0
    num_generation = len(step.generation) if step else 0
    return {
        "num_scheduled_requests": num_context + num_generation,
        "num_context_requests": num_context,
        "num_gen_requests": num_generation,
        "num_paused_requests": 0,
        "num_ctx_tokens": step.num_context_tokens if step else 0,
        "micro_batch_id": 0,
        "avg_num_decoded_tokens_per_iter": 1.0 if num_generation else 0.0,
    }


def _rows(report: TurnReport) -> list[_Row]:
    """What the requests were like at the end of the turn: active, queued, finished."""
    scheduled: set[int] = set()
    if report.step is not None:
        scheduled.update(chunk.request.request_id for chunk in report.step.context)
        scheduled.update(request.request_id for request in report.step.generation)
    rows = [_row(r, _STAGES[r.state], r.request_id in scheduled) for r in report.active]
    rows += [(q.request_id, "QUEUED", 0, 0, 0.0, False, _NO_COUNTS) for q in report.queued]
    rows += [_row(request, "GENERATION_COMPLETE", False) for request in report.finished]
    return rows


_STAGES = {
    State.CONTEXT: "CONTEXT_IN_PROGRESS",
    State.GENERATION: "GENERATION_IN_PROGRESS",
    State.COMPLETE: "GENERATION_COMPLETE",
}


def _row(request: ActiveRequest, stage: str, scheduled: bool) -> _Row:
    return (
        request.request_id,
        stage,
        request.position,
        request.num_generated,
        request.tokens_per_step,
        scheduled,
        request.counts,
    )
