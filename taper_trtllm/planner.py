"""The first beat of a step: from running requests to a plan for the engine.

Order of a plan: the protected baseline, then prefill chunks under the token
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
    BoolArray,
    FloatArray,
    IntArray,
    PrefillLoad,
    Refusals,
)
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.base import Engine, PrefillChunk, PrefillKind, StepPlan
from taper_trtllm.kv_budget import KvBudget
from taper_trtllm.lease_terms import LeaseTerms
from taper_trtllm.live_request import LiveRequest, PrefillNeed
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.prefill_gate import PrefillGate, Urgency, WaitingPrompt
from taper_trtllm.sequence_table import LiveSequence, Rows, SequenceTable

_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Ready:
    """The ready leaves: L leaves of R requests in decode.

    Attributes:
        indices: [R] index of each request among the running ones.
        requests: [R].
        rows: [L] rows of the leaves in the sequence table.
        columns: [L] what the table says of them.
        baseline: [R] the leaf of each request that the policy protects.
        batch: The same for the policy; memory and prefill are known later in the plan.
    """

    indices: IntArray
    requests: list[LiveRequest]
    rows: IntArray
    columns: Rows
    baseline: IntArray
    batch: BatchState


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan with what the executor needs to observe its outcome.

    Attributes:
        plan: For the engine.
        decode_rows: Rows of `plan.decode` in the sequence table.
        decision: None in a step without decode.
        prefill: Its prefill load.
        ready: Requests in decode, each with its numbers of ready and of admitted leaves.
        refusals: Every refused leaf.
        num_context_tokens: Tokens whose KV the decode batch reads.
        min_slack_ms: Smallest slack of a savable request; None if no clock runs.
        num_preempted: Subtrees dropped and requests suspended for this plan.
        is_probe: The baseline alone, to measure T0.
    """

    plan: StepPlan
    decode_rows: IntArray
    decision: AdmissionDecision | None
    prefill: PrefillLoad
    ready: tuple[tuple[LiveRequest, int, int], ...]
    refusals: tuple[Refusals, ...]
    num_context_tokens: int
    min_slack_ms: float | None
    num_preempted: int
    is_probe: bool


class StepPlanner:
    """Plans steps.

    Args:
        engine: Asked for blocks, never stepped.
        sequences: Its sequences.
        policy: Decides on extras.
        predictor: Says what a prefill token costs.
        scheduler: Limits of a step.
        suspend: Called with a request whose KV must be given up; requeues it.

    Attributes:
        baseline_ms: Predicted T0 of the last step with decode, without its prefill.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: SequenceTable,
        policy: AdmissionPolicy,
        predictor: StepLatencyPredictor,
        scheduler: SchedulerConfig,
        suspend: Callable[[LiveRequest], None],
    ) -> None:
        self._engine = engine
        self._sequences = sequences
        self._is_lease = engine.capabilities.granularity == "lease"
        self._leases = LeaseTerms(engine, sequences, predictor) if self._is_lease else None
        self._policy = policy
        self._predictor = predictor
        self._scheduler = scheduler
        self._suspend = suspend
        self._num_steps_with_extras = 0
        self._num_preempted = 0
        self._step_ms = 0.0  # predicted for the last plan
        self.baseline_ms = 0.0

    def budget(self, requests: Sequence[LiveRequest]) -> KvBudget:
        """KV blocks that are left beside the running requests."""
        num_held = self._engine.num_blocks_held
        return KvBudget(
            self._engine.capabilities.num_kv_blocks,
            reserved=_column([request.num_reserved_blocks for request in requests]),
            held=_column([num_held(request.family) for request in requests]),
        )

    def plan(self, running: list[LiveRequest], now_s: float) -> PlannedStep:
        """Plans the next step over the running requests, oldest first.

        Requests that are suspended on the way are removed from `running`.
        """
        self._num_preempted = 0
        budget = self.budget(running)
        ready = self._survey(running, now_s)
        self._protect(running, ready, budget)
        if self._num_preempted:
            ready = self._survey(running, now_s)
        chunks, prefill = self._plan_prefill(running, ready, budget, now_s)
        planned = self._admit(ready, budget, chunks, prefill)
        self._step_ms = planned.decision.step_ms if planned.decision else 0.0
        if self._leases is None:
            return planned
        return replace(
            planned, plan=self._leases.grant(planned.plan, planned.decision, running, budget)
        )

    def _survey(self, running: Sequence[LiveRequest], now_s: float) -> _Ready:
        """The ready leaves as they stand."""
        sequences = self._sequences
        sequences.refresh()
        for request in running:
            if request.family in sequences.changed:
                request.survey(sequences)
        sequences.changed.clear()
        counts = _column([len(request.ready_rows) for request in running])
        indices = np.flatnonzero(counts)
        counts = counts[indices]
        requests = [running[index] for index in indices.tolist()]
        rows = np.concatenate([_NO_ROWS, *(request.ready_rows for request in requests)])
        columns = sequences.rows(rows)
        slack_s = [request.tracker.slack_s(now_s) for request in requests]
        tpot_ms = np.array([r.tracker.slo.tpot_ms for r in requests], dtype=np.float64)
        savable = [request.is_savable(now_s, self.baseline_ms) for request in requests]
        batch = BatchState(
            first_leaf=counts.cumsum() - counts,
            request_index=np.arange(len(counts)).repeat(counts),
            context_tokens=columns["num_tokens"],
            extra_context_tokens=self._extra_context_tokens(columns),
            num_generated=columns["num_generated"],
            last_advanced=columns["last_advanced"],
            holding=self._is_holding(columns),
            blocks_needed=columns["blocks_needed"],
            slack_ms=self._slack_when_acted_ms(1e3 * np.array(slack_s, dtype=np.float64), tpot_ms),
            tpot_slo_ms=tpot_ms,
            savable=np.array(savable, dtype=np.bool_),
            stage_width=_column([request.stage_width for request in requests]),
            kv_headroom_blocks=_NO_ROWS,
            num_unreserved_blocks=0,
            prefill=PrefillLoad(),
            max_batch_size=self._scheduler.max_batch_size,
        )
        baseline = self._policy.baseline(batch) if requests else _NO_ROWS
        return _Ready(indices, requests, rows, columns, baseline, batch)

    def _extra_context_tokens(self, columns: Rows) -> IntArray:
        context_tokens: IntArray = columns["num_tokens"]
        if self._engine.capabilities.prefix_sharing_attention:
            weight = 1.0 - self._predictor.shared_context_weight
            context_tokens = context_tokens - (weight * columns["num_shared"]).astype(np.int64)
        return context_tokens

    def _is_holding(self, columns: Rows) -> BoolArray:
        holding = self._sequences.holding
        if not holding:
            return np.zeros(len(columns), dtype=np.bool_)
        return np.isin(columns["sequence_id"], np.fromiter(holding, dtype=np.int64))

    def _slack_when_acted_ms(self, slack_ms: FloatArray, tpot_ms: FloatArray) -> FloatArray:
        """Slack that is left when the plan takes effect, after steps that cannot be changed.

        Each of them takes its time and yields one token at least; what they may gain is not
        counted before it is there.
        """
        delay = self._engine.capabilities.actuation_delay_steps
        overrun_ms = self._step_ms - (1 - self._scheduler.margin) * tpot_ms
        return slack_ms - delay * np.maximum(0.0, overrun_ms)

    # -------------------------------------------------------------------------- protection

    def _protect(self, running: list[LiveRequest], ready: _Ready, budget: KvBudget) -> None:
        """Secures memory for one branch of every request: its baseline leaf or its prefill."""
        sequence_ids = ready.columns["sequence_id"][ready.baseline].tolist()
        for request, sequence_id in zip(ready.requests, sequence_ids, strict=True):
            request.protected = self._sequences[sequence_id]
        num_tokens = np.ones(len(running), dtype=np.int64)
        blocks = np.zeros(len(running), dtype=np.int64)
        left = ready.columns["num_stage_tokens_left"][ready.baseline]
        num_tokens[ready.indices] = np.minimum(left, self._sequences.lease_tokens)
        blocks[ready.indices] = ready.batch.blocks_needed[ready.baseline]
        budget_left = self._scheduler.max_prefill_tokens
        not_ready = [index for index, request in enumerate(running) if not request.ready_paths]
        for index in _prefill_order(running, not_ready):
            request = running[index]
            need = request.prefill_needs[0]
            request.protected = need.sequence
            request.num_protected_tokens = self._num_tokens_to_protect(need, budget_left)
            if not self._is_remote(need):
                budget_left = max(0, budget_left - request.num_protected_tokens)
            num_tokens[index] = request.num_protected_tokens
            blocks[index] = self._blocks_to_protect(need.sequence, request.num_protected_tokens)
        if not budget.take_all(blocks):
            self._protect_one_by_one(running, num_tokens.tolist(), budget)

    def _num_tokens_to_protect(self, need: PrefillNeed, budget_left: int) -> int:
        """What a request must have memory for, to get on with its prefill in this step."""
        if self._is_lease:
            return need.num_tokens + self._lease_tokens(need)
        if self._is_remote(need):
            return need.num_tokens
        return min(need.num_tokens, budget_left)

    def _protect_one_by_one(
        self, running: list[LiveRequest], num_tokens: list[int], budget: KvBudget
    ) -> None:
        """Requests in decode first, each with as much pressure on the others as it needs."""
        order = sorted(range(len(running)), key=lambda index: not running[index].ready_paths)
        for index in order:
            if index < len(running):  # not suspended for another meanwhile
                protected = running[index].protected
                assert protected is not None
                blocks = self._blocks_to_protect(protected, num_tokens[index])
                self._take_protected(running, index, blocks, budget)

    def _take_protected(
        self, running: list[LiveRequest], index: int, num_blocks: int, budget: KvBudget
    ) -> None:
        """Takes blocks for a protected branch, whatever must go for it.

        In this order: the request's own extras; once these are gone it may borrow, and then goes
        what keeps blocks from being free: the extras of others (newest first), the newest request
        as a whole, which may be this one.
        """
        self._drop_extras(
            running, index, budget, until=lambda: budget.fits_baseline(index, num_blocks)
        )
        for other in reversed(range(len(running))):
            if other != index:
                self._drop_extras(
                    running, other, budget, until=lambda: num_blocks <= budget.num_free_blocks
                )
        while index < len(running) and num_blocks > budget.num_free_blocks:
            newest = running.pop()
            budget.close(len(running))
            self._suspend(newest)
            self._num_preempted += 1
        if index < len(running):
            budget.take(index, num_blocks)

    def _drop_extras(
        self,
        running: Sequence[LiveRequest],
        index: int,
        budget: KvBudget,
        until: Callable[[], bool],
    ) -> None:
        """Drops extras of a request, one subtree at a time, until it is enough or all are gone."""
        request = running[index]
        drops = request.drop_extras(self._sequences)
        while not until():
            before = self._engine.num_blocks_held(request.family)
            if next(drops, None) is None:
                return
            budget.take(index, self._engine.num_blocks_held(request.family) - before)
            self._num_preempted += 1

    def _blocks_to_protect(self, sequence: LiveSequence, num_tokens: int) -> int:
        """What it has yet to take; a place on a lease engine has its blocks."""
        if sequence.sequence_id in self._sequences.holding:
            return 0
        return self._blocks_needed(sequence, num_tokens)

    def _blocks_needed(self, sequence: LiveSequence, num_tokens: int) -> int:
        return self._engine.num_blocks_needed(sequence.sequence_id, num_tokens)

    # ----------------------------------------------------------------------------- prefill

    def _plan_prefill(
        self, running: Sequence[LiveRequest], ready: _Ready, budget: KvBudget, now_s: float
    ) -> tuple[list[PrefillChunk], PrefillLoad]:
        """Chunks in the order: requests that have begun to answer, then prompts, oldest first.

        The budget counts tokens without context; those behind a long one count for more. What is
        computed elsewhere comes whole and before all: it costs this step nothing. On lease engines
        all come whole, and those that are under way count.
        """
        budget_left = float(self._scheduler.max_prefill_tokens)
        room = self._scheduler.max_batch_size - len(ready.requests)
        local, remote = self._prefill_places(running)
        chunks = self._remote_chunks(running, remote, budget, room)
        load = PrefillLoad()
        gate = self._prefill_gate([running[index] for index in local], ready, now_s)
        for index in _prefill_order(running, local):
            request = running[index]
            for need in request.prefill_needs:
                before = self._sequences.num_computed(need.sequence)
                weight = self._predictor.prefill_token_weight(before)
                if len(chunks) == room:
                    break
                if need.sequence.sequence_id in self._sequences.holding:  # it is under way
                    chunks.append(_whole(need))
                    budget_left -= need.num_tokens * weight
                    continue
                most = max(0, int(budget_left / weight)) or int(not chunks)  # one, or no progress
                if most == 0:
                    break
                is_protected = need.sequence is request.protected and (
                    request.num_protected_tokens > 0
                )
                if is_protected:  # blocks are taken for so many
                    most = min(most, request.num_protected_tokens)
                num_tokens = need.num_tokens if self._is_lease else min(need.num_tokens, most)
                if gate is not None:
                    urgency = _urgency(request, is_protected)
                    num_tokens = gate.fitting_tokens(load, num_tokens, before, urgency)
                    if num_tokens == 0:
                        break
                if not is_protected and not self._take_for_extra(index, need, num_tokens, budget):
                    continue
                sample = need.sample and num_tokens == need.num_tokens
                chunks.append(PrefillChunk(need.sequence.sequence_id, num_tokens, sample))
                budget_left -= num_tokens * weight
                load = load.with_chunk(num_tokens, before)
        return chunks, load

    def _remote_chunks(
        self, running: Sequence[LiveRequest], remote: Sequence[int], budget: KvBudget, room: int
    ) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        for index in remote:
            request = running[index]
            for need in request.prefill_needs:
                if len(chunks) == room:
                    return chunks
                is_protected = need.sequence is request.protected
                if is_protected or self._take_for_extra(index, need, need.num_tokens, budget):
                    chunks.append(replace(_whole(need), is_remote=True))
        return chunks

    def _prefill_places(self, running: Sequence[LiveRequest]) -> tuple[list[int], list[int]]:
        """Indices of the requests whose prefill is due here, and of those where it is not."""
        local: list[int] = []
        remote: list[int] = []
        for index, request in enumerate(running):
            if request.prefill_needs:
                is_remote = self._is_remote(request.prefill_needs[0])
                (remote if is_remote else local).append(index)
        return local, remote

    def _is_remote(self, need: PrefillNeed) -> bool:
        """Its tokens are computed on another device."""
        kind: PrefillKind = "prompt" if need.is_prompt else "join"
        return kind in self._engine.capabilities.disaggregated_prefill

    def _prefill_gate(
        self, needy: Sequence[LiveRequest], ready: _Ready, now_s: float
    ) -> PrefillGate | None:
        """The gate that prefill passes in this step; None where nobody in decode would wait."""
        if self._scheduler.prefill_chunking == "full" or not ready.requests:
            return None
        prompts = [
            WaitingPrompt(
                request.prefill_needs[0].num_tokens,
                request.tracker.ttft_left_ms(now_s),
                request.tracker.slo.ttft_ms,
            )
            for request in needy
            if not request.has_started_decoding
        ]
        batch = ready.batch
        return PrefillGate(
            self._predictor,
            self._scheduler.max_prefill_tokens,
            width=len(ready.baseline),
            context_tokens=int(batch.context_tokens[ready.baseline].sum()),
            min_slack_ms=float(batch.slack_ms.min(where=batch.savable, initial=np.inf)),
            prompts=prompts,
        )

    def _take_for_extra(
        self, index: int, need: PrefillNeed, num_tokens: int, budget: KvBudget
    ) -> bool:
        """Takes blocks to start an extra, only if the rest of its stage fits too."""
        left = need.num_tokens + (need.sequence.node.num_stage_tokens_left if need.sample else 0)
        if not budget.fits(index, self._blocks_needed(need.sequence, left)):
            return False
        if self._is_lease:
            num_tokens += self._lease_tokens(need)
        budget.take(index, self._blocks_needed(need.sequence, num_tokens))
        return True

    def _lease_tokens(self, need: PrefillNeed) -> int:
        """Tokens that a sequence may draw right after its prefill, on a lease engine."""
        return self._sequences.lease_of(need.sequence) if need.sample else 1  # 1: drawn in vain

    # --------------------------------------------------------------------------- admission

    def _admit(
        self, ready: _Ready, budget: KvBudget, chunks: list[PrefillChunk], prefill: PrefillLoad
    ) -> PlannedStep:
        if not ready.requests:
            plan = StepPlan(prefill=tuple(chunks))
            return PlannedStep(
                plan, _NO_ROWS, None, prefill, (), (), 0, None, self._num_preempted, False
            )
        batch = replace(
            ready.batch,
            kv_headroom_blocks=budget.headroom[ready.indices],
            num_unreserved_blocks=budget.num_unreserved_blocks,
            # When a lease engine acts on the plan, this step's prefill may be over: a place would
            # be given up for a step that is not there any more. Its slack tells soon enough.
            prefill=PrefillLoad() if self._is_lease else prefill,
            max_batch_size=self._scheduler.max_batch_size - len(chunks),
        )
        is_probe = self._probe_is_due()
        decision = self._policy.admit(batch, ready.baseline, extras_allowed=not is_probe)
        # A chunk's own time says nothing about the steps to come.
        self.baseline_ms = self._predictor.predict_step_ms(
            len(ready.baseline), int(batch.context_tokens[ready.baseline].sum())
        )
        is_probe = is_probe and batch.num_leaves > batch.num_requests
        if len(decision.extras) or is_probe:
            self._num_steps_with_extras += 1
        admitted = np.concatenate([decision.baseline, decision.extras])
        columns = ready.columns.take(admitted)
        plan = StepPlan(
            decode=tuple(columns["sequence_id"].tolist()),
            prefill=tuple(chunks),
            num_protected=len(decision.baseline),
        )
        num_ready = np.bincount(batch.request_index)
        num_admitted = np.bincount(batch.request_index[admitted])
        slack_ms = batch.slack_ms[batch.savable & np.isfinite(batch.slack_ms)]
        return PlannedStep(
            plan=plan,
            decode_rows=ready.rows[admitted],
            decision=decision,
            prefill=prefill,
            ready=tuple(
                zip(ready.requests, num_ready.tolist(), num_admitted.tolist(), strict=True)
            ),
            refusals=_refusals(ready, decision),
            num_context_tokens=int(
                batch.context_tokens[decision.baseline].sum()
                + batch.extra_context_tokens[decision.extras].sum()
            ),
            min_slack_ms=float(slack_ms.min()) if len(slack_ms) else None,
            num_preempted=self._num_preempted,
            is_probe=is_probe,
        )

    def _probe_is_due(self) -> bool:
        interval = self._scheduler.probe_interval_steps
        if interval is None or self._is_lease:  # every extra would lose its place for it
            return False
        return self._num_steps_with_extras % interval == interval - 1


def _prefill_order(running: Sequence[LiveRequest], indices: Sequence[int]) -> list[int]:
    """Requests that have begun to answer first, then prompts, oldest first."""
    return sorted(indices, key=lambda index: not running[index].has_started_decoding)


def _whole(need: PrefillNeed) -> PrefillChunk:
    return PrefillChunk(need.sequence.sequence_id, need.num_tokens, need.sample)


def _urgency(request: LiveRequest, is_protected: bool) -> Urgency:
    """What a chunk is for."""
    if not request.has_started_decoding:
        return Urgency.PROMPT
    return Urgency.PROTECTED if is_protected else Urgency.EXTRA


def _refusals(ready: _Ready, decision: AdmissionDecision) -> tuple[Refusals, ...]:
    """Names what was refused."""
    if not decision.refused:
        return ()
    ids = [request.request.request_id for request in ready.requests]
    paths = [path for request in ready.requests for path in request.ready_paths]
    return tuple(
        Refusals(
            reason,
            tuple([ids[i] for i in ready.batch.request_index[leaves].tolist()]),
            tuple([paths[i] for i in leaves.tolist()]),
        )
        for leaves, reason in decision.refused
    )


def _column(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
