"""The first beat of a step: from running requests to a plan for the engine.

Order of a plan (design.md section 2): the protected baseline, then prefill chunks under the token
budget, then extras. Memory follows the same order; under pressure no child is started, then extras
are dropped, then the newest request is suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from taper_trtllm.admission import AdmissionPolicy
from taper_trtllm.batch import (
    AdmissionDecision,
    BatchState,
    IntArray,
    PrefillLoad,
    RefusalReason,
)
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.base import Engine, PrefillChunk, StepPlan
from taper_trtllm.kv_budget import KvBudget
from taper_trtllm.live_request import LiveRequest, LiveSequence, PrefillNeed
from taper_trtllm.predictor import StepLatencyPredictor

_Ready = dict[LiveRequest, list[LiveSequence]]  # ready leaves of the running requests


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan with what the executor needs to observe its outcome.

    Attributes:
        plan: For the engine.
        decision: None in a step without decode.
        prefill: Its prefill load.
        ready: Ready leaves by request, in the order of the batch's rows.
        refusals: (request id, branch path, reason) of every refused leaf.
        num_context_tokens: Sum of contexts of the decode batch.
        min_slack_ms: Smallest slack of a savable request; None if no clock runs.
        num_preempted: Subtrees dropped and requests suspended for this plan.
        is_probe: The baseline alone, to measure T0.
    """

    plan: StepPlan
    decision: AdmissionDecision | None
    prefill: PrefillLoad
    ready: tuple[tuple[LiveRequest, int, int], ...]
    refusals: tuple[tuple[str, str, RefusalReason], ...]
    num_context_tokens: int
    min_slack_ms: float | None
    num_preempted: int
    is_probe: bool


class StepPlanner:
    """Plans steps.

    Args:
        engine: Asked for tokens and blocks, never stepped.
        policy: Decides on extras.
        predictor: Says what a prefill token costs.
        scheduler: Limits of a step.
        suspend: Called with a request whose KV must be given up; requeues it.
    """

    def __init__(
        self,
        engine: Engine,
        policy: AdmissionPolicy,
        predictor: StepLatencyPredictor,
        scheduler: SchedulerConfig,
        suspend: Callable[[LiveRequest], None],
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._predictor = predictor
        self._scheduler = scheduler
        self._suspend = suspend
        self._num_steps_with_extras = 0
        self._num_preempted = 0
        self._baseline_ms = 0.0

    def budget(self, requests: Sequence[LiveRequest]) -> KvBudget:
        """KV blocks that are left beside the running requests."""
        budget = KvBudget(self._engine.capabilities.num_kv_blocks)
        for request in requests:
            held = self._engine.num_blocks_held(request.family)
            budget.open(request.family, request.num_reserved_blocks, held)
        return budget

    def plan(self, running: list[LiveRequest], now_s: float) -> PlannedStep:
        """Plans the next step over the running requests, oldest first.

        Requests that are suspended on the way are removed from `running`.
        """
        self._num_preempted = 0
        budget = self.budget(running)
        ready = self._ready(running)
        batch = self._batch(ready, now_s)
        self._protect(running, ready, batch, budget)
        if self._num_preempted:
            ready = self._ready(running)
            batch = self._batch(ready, now_s)
        chunks, prefill = self._plan_prefill(ready, budget)
        return self._admit(ready, batch, budget, chunks, prefill)

    def _ready(self, running: Sequence[LiveRequest]) -> _Ready:
        return {r: r.ready_sequences(self._engine) for r in running}

    # -------------------------------------------------------------------------- protection

    def _protect(
        self, running: list[LiveRequest], ready: _Ready, batch: BatchState, budget: KvBudget
    ) -> None:
        """Secures memory for one branch of every request: its baseline leaf or its prefill."""
        chosen: dict[LiveRequest, tuple[LiveSequence, int]] = {
            request: (sequence, 1) for request, sequence in self._baseline(ready, batch).items()
        }
        for request in running:
            if not ready[request]:
                needs = request.prefill_needs(self._engine, self._policy.max_width)
                num_tokens = min(needs[0].num_tokens, self._scheduler.max_prefill_tokens)
                chosen[request] = (needs[0].sequence, num_tokens)
            request.protected = chosen[request][0].node
        for request, (sequence, num_tokens) in chosen.items():
            if request.is_running:  # not suspended for another meanwhile
                blocks = self._engine.num_blocks_needed(sequence.sequence_id, num_tokens)
                self._take_protected(running, request, blocks, budget)

    def _baseline(self, ready: _Ready, batch: BatchState) -> dict[LiveRequest, LiveSequence]:
        leaves = [s for sequences in ready.values() for s in sequences]
        if not leaves:
            return {}
        requests = [request for request, sequences in ready.items() if sequences]
        rows = self._policy.baseline(batch)
        return {r: leaves[i] for r, i in zip(requests, rows, strict=True)}

    def _take_protected(
        self, running: list[LiveRequest], request: LiveRequest, num_blocks: int, budget: KvBudget
    ) -> None:
        """Takes blocks for a protected branch, whatever must go for it.

        In this order: the request's own extras, the extras of others (newest first), the newest
        request as a whole, which may be this one.
        """
        for owner in (request, *reversed([r for r in running if r is not request])):
            drops = owner.drop_extras(self._engine)
            while not budget.fits(request.family, num_blocks):
                before = self._engine.num_blocks_held(owner.family)
                if next(drops, None) is None:
                    break
                freed = before - self._engine.num_blocks_held(owner.family)
                budget.give_back(owner.family, freed)
                self._num_preempted += 1
        while request.is_running and not budget.fits(request.family, num_blocks):
            newest = running.pop()
            budget.close(newest.family)
            self._suspend(newest)
            self._num_preempted += 1
        if request.is_running:
            budget.take(request.family, num_blocks)

    # ----------------------------------------------------------------------------- prefill

    def _plan_prefill(
        self, ready: _Ready, budget: KvBudget
    ) -> tuple[list[PrefillChunk], PrefillLoad]:
        """Chunks in the order: requests that have begun to answer, then prompts, oldest first.

        The budget counts tokens without context; those behind a long one count for more.
        """
        budget_left = float(self._scheduler.max_prefill_tokens)
        room = self._scheduler.max_batch_size - sum(1 for s in ready.values() if s)
        chunks: list[PrefillChunk] = []
        pairs = 0.0
        for request in sorted(ready, key=lambda r: not r.has_started_decoding):
            for need in request.prefill_needs(self._engine, self._policy.max_width):
                before = self._engine.num_computed_tokens(need.sequence.sequence_id)
                weight = self._predictor.prefill_token_weight(before)
                most = int(budget_left / weight) or int(not chunks)  # one at least, or no progress
                if most == 0 or len(chunks) == room:
                    break
                num_tokens = min(need.num_tokens, most)
                if not self._may_prefill(request, need, num_tokens, budget):
                    continue
                sample = need.sample and num_tokens == need.num_tokens
                chunks.append(PrefillChunk(need.sequence.sequence_id, num_tokens, sample))
                budget_left -= num_tokens * weight
                pairs += num_tokens * (before + num_tokens / 2)
        return chunks, PrefillLoad(len(chunks), sum(c.num_tokens for c in chunks), pairs)

    def _may_prefill(
        self, request: LiveRequest, need: PrefillNeed, num_tokens: int, budget: KvBudget
    ) -> bool:
        """An extra is started only if the rest of its stage fits too."""
        if need.sequence.node is request.protected:
            return True  # its blocks are taken already
        left = need.num_tokens + (need.sequence.node.num_stage_tokens_left if need.sample else 0)
        sequence_id = need.sequence.sequence_id
        if not budget.fits(request.family, self._engine.num_blocks_needed(sequence_id, left)):
            return False
        budget.take(request.family, self._engine.num_blocks_needed(sequence_id, num_tokens))
        return True

    # --------------------------------------------------------------------------- admission

    def _admit(
        self,
        ready: _Ready,
        batch: BatchState,
        budget: KvBudget,
        chunks: list[PrefillChunk],
        prefill: PrefillLoad,
    ) -> PlannedStep:
        leaves = [s for sequences in ready.values() for s in sequences]
        if not leaves:
            plan = StepPlan(prefill=tuple(chunks))
            return PlannedStep(plan, None, prefill, (), (), 0, None, self._num_preempted, False)
        requests = [request for request, sequences in ready.items() if sequences]
        batch = replace(
            batch,
            kv_headroom_blocks=_column([budget.headroom(r.family) for r in requests]),
            num_unreserved_blocks=budget.num_unreserved_blocks,
            prefill=prefill,
            max_batch_size=self._scheduler.max_batch_size - len(chunks),
        )
        is_probe = self._probe_is_due()
        decision = self._policy.admit(batch, extras_allowed=not is_probe)
        if not prefill.num_tokens:  # a chunk's own time says nothing about the steps to come
            self._baseline_ms = decision.baseline_ms
        is_probe = is_probe and batch.num_leaves > batch.num_requests
        if len(decision.extras) or is_probe:
            self._num_steps_with_extras += 1
        admitted = np.concatenate([decision.baseline, decision.extras])
        decode = [leaves[i] for i in admitted]
        plan = StepPlan(
            decode=tuple(s.sequence_id for s in decode),
            max_new_tokens=tuple(s.node.num_stage_tokens_left for s in decode),
            prefill=tuple(chunks),
        )
        num_ready = np.bincount(batch.request_index, minlength=len(requests))
        num_admitted = np.bincount(batch.request_index[admitted], minlength=len(requests))
        owner = [requests[i] for i in batch.request_index]
        refusals = tuple(
            (owner[i].request.request_id, leaves[i].node.path, reason)
            for rows, reason in decision.refused
            for i in rows
        )
        slack_ms = batch.slack_ms[batch.savable & np.isfinite(batch.slack_ms)]
        return PlannedStep(
            plan=plan,
            decision=decision,
            prefill=prefill,
            ready=tuple(zip(requests, num_ready.tolist(), num_admitted.tolist(), strict=True)),
            refusals=refusals,
            num_context_tokens=int(batch.context_tokens[admitted].sum()),
            min_slack_ms=float(slack_ms.min()) if len(slack_ms) else None,
            num_preempted=self._num_preempted,
            is_probe=is_probe,
        )

    def _probe_is_due(self) -> bool:
        interval = self._scheduler.probe_interval_steps
        return interval is not None and self._num_steps_with_extras % interval == interval - 1

    def _batch(self, ready: _Ready, now_s: float) -> BatchState:
        """The ready leaves as they stand; memory and prefill are known later in the plan."""
        engine = self._engine
        rows = [(r, sequences) for r, sequences in ready.items() if sequences]
        requests = [r for r, _ in rows]
        leaves = [s for _, sequences in rows for s in sequences]
        savable = [r.is_savable(now_s, self._baseline_ms) for r in requests]
        counts = _column([len(sequences) for _, sequences in rows])
        return BatchState(
            first_leaf=np.cumsum(counts) - counts,
            request_index=np.repeat(np.arange(len(rows)), counts),
            context_tokens=_column([engine.num_tokens(s.sequence_id) for s in leaves]),
            num_generated=_column([s.node.num_generated for s in leaves]),
            last_advanced=_column([s.last_advanced for s in leaves]),
            blocks_needed=_column([engine.num_blocks_needed(s.sequence_id, 1) for s in leaves]),
            slack_ms=np.array([r.slack_ms(now_s) for r in requests], dtype=np.float64),
            tpot_slo_ms=np.array([r.tracker.slo.tpot_ms for r in requests], dtype=np.float64),
            savable=np.array(savable, dtype=np.bool_),
            stage_width=_column([r.stage_width for r in requests]),
            kv_headroom_blocks=np.zeros(len(rows), dtype=np.int64),
            num_unreserved_blocks=0,
            prefill=PrefillLoad(),
            max_batch_size=self._scheduler.max_batch_size,
        )


def _column(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
