"""The data that planning reads and writes: the batch, the decision, the record of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class RefusalReason(str, Enum):
    """Why a ready branch is left out of a step."""

    SLACK = "slack"  # the next prefix of the order would exceed the step budget
    EFFICIENCY = "efficiency"  # it fits the budget, but the step yields more per second without it
    CAP = "cap"  # the policy's fixed width is reached
    BATCH_SIZE = "batch_size"  # max_batch_size sequences are in the step
    KV_PRESSURE = "kv_pressure"  # no unreserved block to write its next token to
    PROBE = "probe"  # a baseline-only step that measures T0


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """The prefill work P of a step.

    Attributes:
        num_chunks: Sequences that prefill in this step.
        num_tokens: Tokens over all chunks.
        token_context: Sum over chunks of tokens x mean context seen by a token of the chunk: the
            number of query-key pairs.
    """

    num_chunks: int = 0
    num_tokens: int = 0
    token_context: float = 0.0

    def with_chunk(self, num_tokens: int, num_computed_tokens: int) -> PrefillLoad:
        """The load with one chunk more, behind tokens that have KV."""
        return PrefillLoad(
            self.num_chunks + 1,
            self.num_tokens + num_tokens,
            self.token_context + num_tokens * (num_computed_tokens + num_tokens / 2),
        )


@dataclass(frozen=True, slots=True)
class BatchState:
    """The ready leaves of all requests in decode, in columns.

    Leaves are grouped by request and, inside a request, stand in program order. L leaves, R
    requests; each request has at least one leaf.

    Attributes:
        first_leaf: [R] row of each request's first leaf.
        request_index: [L] row of each leaf's request, ascending.
        context_tokens: [L] tokens whose KV the leaf's next step reads.
        extra_context_tokens: [L] those that it reads as an extra: where the engine reads a shared
            prefix once, the prefix that its request's baseline reads too counts for less.
        num_generated: [L] tokens decoded in the leaf's branch so far.
        last_advanced: [L] step in which the leaf was last advanced.
        holding: [L] it holds a place on a lease engine; to leave it out costs a re-entry.
        blocks_needed: [L] KV blocks that its next token would take; its next lease, on a lease
            engine.
        slack_ms: [R] time to the request's next deadline (`slo.py`).
        tpot_slo_ms: [R] its TPOT objective.
        savable: [R] it can still meet its objective.
        stage_width: [R] width granted in the first step of the request's running parallel stages;
            0 if there was none yet.
        kv_headroom_blocks: [R] blocks reserved for the request that it does not hold; 0 while some
            are lent.
        num_unreserved_blocks: Blocks that no request has reserved or holds; negative by the number
            of those lent.
        prefill: Prefill work already planned for the step.
        max_batch_size: Most sequences in the step.
    """

    first_leaf: IntArray
    request_index: IntArray
    context_tokens: IntArray
    extra_context_tokens: IntArray
    num_generated: IntArray
    last_advanced: IntArray
    holding: BoolArray
    blocks_needed: IntArray
    slack_ms: FloatArray
    tpot_slo_ms: FloatArray
    savable: BoolArray
    stage_width: IntArray
    kv_headroom_blocks: IntArray
    num_unreserved_blocks: int
    prefill: PrefillLoad
    max_batch_size: int

    @property
    def num_leaves(self) -> int:
        """L."""
        return len(self.request_index)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.slack_ms)


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """Which leaves enter the step; every index is a row of the batch.

    Attributes:
        baseline: The protected baseline, one leaf per request, in request order.
        extras: Admitted extras, in the policy's order.
        refused: Refused leaves with their reasons.
        baseline_ms: Predicted T0 = T(S0, P).
        step_ms: Predicted T(S, P) of what is admitted.
        budget_ms: The step budget B; infinite for policies without one.
    """

    baseline: IntArray
    extras: IntArray
    refused: tuple[tuple[IntArray, RefusalReason], ...]
    baseline_ms: float
    step_ms: float
    budget_ms: float


@dataclass(frozen=True, slots=True)
class Refusals:
    """The leaves that one reason kept out of a step.

    Attributes:
        reason: The reason.
        request_ids: Request of each leaf.
        branch_paths: Branch of each leaf.
    """

    reason: RefusalReason
    request_ids: tuple[str, ...]
    branch_paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One iteration as planned and as it happened.

    Attributes:
        iteration: The engine's number of the iteration.
        started_at_s: When planning began, on the engine's clock.
        completed_at_s: When the engine completed it.
        plan_ms: Time spent planning.
        step_ms: Measured T: time between this completion and the previous one, or since planning
            began if the executor was idle before.
        predicted_step_ms: T(S, P); None in a step without decode.
        predicted_baseline_ms: T(S0, P), corrected; None in a step without decode.
        budget_ms: Step budget; None where the policy has none.
        min_slack_ms: Smallest slack that counted; None if no clock ran.
        num_requests: Requests in decode.
        num_ready: Ready leaves.
        num_admitted: Leaves in the decode batch.
        num_extras: Of those, extras.
        refusals: Refused leaves by reason.
        num_prefill_tokens: Tokens prefilled.
        num_queued: Requests waiting to be started.
        num_free_blocks: Free KV blocks after the step.
        num_preempted: Sequences preempted for this step.
        is_probe: A baseline-only step.
        correction_factor: See `StepLatencyPredictor`.
        policy: Name of the policy.
    """

    iteration: int
    started_at_s: float
    completed_at_s: float
    plan_ms: float
    step_ms: float
    predicted_step_ms: float | None
    predicted_baseline_ms: float | None
    budget_ms: float | None
    min_slack_ms: float | None
    num_requests: int
    num_ready: int
    num_admitted: int
    num_extras: int
    refusals: tuple[Refusals, ...]
    num_prefill_tokens: int
    num_queued: int
    num_free_blocks: int
    num_preempted: int
    is_probe: bool
    correction_factor: float
    policy: str

    @property
    def refused_leaves(self) -> Iterator[tuple[str, str, RefusalReason]]:
        """Each refused leaf: request id, branch path, reason."""
        for refusals in self.refusals:
            for request_id, path in zip(refusals.request_ids, refusals.branch_paths, strict=True):
                yield request_id, path, refusals.reason

    @property
    def predicted_externality_ms(self) -> float | None:
        """Predicted E(S)."""
        if self.predicted_step_ms is None or self.predicted_baseline_ms is None:
            return None
        return self.predicted_step_ms - self.predicted_baseline_ms

    @property
    def realised_externality_ms(self) -> float | None:
        """Measured T minus predicted T0."""
        if self.predicted_baseline_ms is None:
            return None
        return self.step_ms - self.predicted_baseline_ms
