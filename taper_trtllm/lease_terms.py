"""How long a place on a lease engine lasts; per-step engines give none.

A request's only leaf keeps its place to the end of its stage: it is the request's baseline, which
nobody contests. Leaves that have siblings get the engine's lease, so that the place is decided anew
every so many tokens. One that has yet to prefill starts only if the step has time for one more,
since its prefill and its place are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from taper_trtllm.batch import AdmissionDecision
from taper_trtllm.engines.base import Engine, PrefillChunk, StepPlan
from taper_trtllm.kv_budget import KvBudget
from taper_trtllm.live_request import LiveRequest
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.sequence_table import LiveSequence, SequenceTable


class LeaseTerms:
    """Writes leases into plans.

    Args:
        engine: Asked for blocks.
        sequences: Its sequences.
        predictor: Says whether a step has time for those that prefill.
    """

    def __init__(
        self, engine: Engine, sequences: SequenceTable, predictor: StepLatencyPredictor
    ) -> None:
        self._engine = engine
        self._sequences = sequences
        self._predictor = predictor

    def grant(
        self,
        plan: StepPlan,
        decision: AdmissionDecision | None,
        running: Sequence[LiveRequest],
        budget: KvBudget,
    ) -> StepPlan:
        """The plan with the tokens that each place in it may last.

        Args:
            plan: Who shall run.
            decision: On its decode; None without any.
            running: The requests, in the order of the budget.
            budget: Has what the plan takes already; the rest of long leases is taken from it.
        """
        index = {request.family: i for i, request in enumerate(running)}
        decode = [self._sequences[sequence_id] for sequence_id in plan.decode]
        num_tokens = tuple(
            self._lease(
                sequence, running[index[sequence.family]], index[sequence.family], 0, budget
            )
            for sequence in decode
        )
        width, context = len(decode), sum(map(self._sequences.num_tokens, decode))
        chunks: list[PrefillChunk] = []
        for chunk in plan.prefill:
            sequence = self._sequences[chunk.sequence_id]
            request = running[index[sequence.family]]
            lease = 1
            if chunk.sample:
                wider = (width + 1, context + self._sequences.num_tokens(sequence))
                if (
                    decision is not None
                    and sequence is not request.protected
                    and chunk.sequence_id not in self._sequences.holding
                    and self._predictor.predict_step_ms(*wider) > decision.budget_ms
                ):
                    continue
                width, context = wider
                lease = self._lease(
                    sequence, request, index[sequence.family], chunk.num_tokens, budget
                )
            chunks.append(replace(chunk, max_new_tokens=lease))
        return replace(plan, max_new_tokens=num_tokens, prefill=tuple(chunks))

    def _lease(
        self,
        sequence: LiveSequence,
        request: LiveRequest,
        index: int,
        num_prefill_tokens: int,
        budget: KvBudget,
    ) -> int:
        """To the end of the stage, if that is certain to fit, or the engine's lease."""
        sequence_id, lease = sequence.sequence_id, self._sequences.lease_of(sequence)
        if not request.has_one_leaf or sequence_id in self._sequences.holding:
            return lease
        left = sequence.node.num_stage_tokens_left
        needed = self._engine.num_blocks_needed
        more = needed(sequence_id, num_prefill_tokens + left)
        more -= needed(sequence_id, num_prefill_tokens + lease)
        if more > int(budget.headroom[index]):
            return lease
        budget.take(index, more)
        return left
