"""The interface between the executor and whatever runs an iteration.

The executor owns requests and decides; an engine owns KV memory and computes. An engine keeps
*sequences*: a token list, part of which has KV ("computed"). The rest is pending. Prompts, branch
headers, join texts and preempted text are all pending tokens and are computed by prefill chunks;
a sequence in decode has exactly one pending token, its last.

```
tokens    [ shared with the parent | own, computed | pending ]
                                   ^ fork point    ^ num_computed_tokens
```
Nothing outside an engine's own file may ask which engine it is: what differs is declared in
`EngineCapabilities`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.request import SamplingParams
from taper_trtllm.token_spans import Spans

SequenceId = int


class EngineError(RuntimeError):
    """An iteration failed as a whole; the engine can no longer be used."""


class OutOfBlocksError(RuntimeError):
    """A plan needs more KV blocks than are free. Raised before anything was changed."""


PrefillKind = Literal["prompt", "join"]


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine is able to do; the executor and the planner read nothing else.

    Attributes:
        name: Engine kind, such as ``torch``.
        granularity: ``step``: membership of each iteration is exactly the plan's. ``lease``: a
            planned sequence holds its place until it has drawn its `max_new_tokens` or a later plan
            leaves it out; prefill chunks must be whole, the engine cuts them itself.
        actuation_delay_steps: Iterations between a plan and its effect on membership.
        lease_tokens: Most tokens of a place that was given in competition; None for per-step
            engines.
        resident_when_gated: A sequence left out of a plan keeps its KV and recomputes nothing.
        min_recompute_tokens: Tokens computed again when a gated sequence re-enters.
        width_buckets: Padded decode widths, ascending; None if widths are not padded.
        disaggregated_prefill: What is computed on other devices: its chunks take no time in a step
            and need not be cut. ``prompt``, or ``join``: all that a request computes after its
            first token, headers, joins and what it gave up, which no engine does and studies
            assume.
        prefix_sharing_attention: Attention reads a shared prefix once per family, not per branch.
        kv_merge: Sequences can be assembled from the KV of several (`Engine.assemble_sequence`).
        bitwise_deterministic: Greedy results do not depend on batch membership.
        virtual_time: `StepResult` times come from a virtual clock.
        max_batch_size: Most sequences in one iteration.
        max_seq_len: Most tokens in one sequence.
        tokens_per_block: KV block size.
        num_kv_blocks: Blocks in the pool that sequences can use.
        vocab_size: Token ids are in [0, vocab_size).
    """

    name: str
    granularity: Literal["step", "lease"]
    actuation_delay_steps: int
    lease_tokens: int | None
    resident_when_gated: bool
    min_recompute_tokens: int
    width_buckets: tuple[int, ...] | None
    disaggregated_prefill: frozenset[PrefillKind]
    prefix_sharing_attention: bool
    kv_merge: bool
    bitwise_deterministic: bool
    virtual_time: bool
    max_batch_size: int
    max_seq_len: int
    tokens_per_block: int
    num_kv_blocks: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class SequenceParams:
    """How a sequence samples.

    Attributes:
        sampling: The request's sampling parameters.
        seed: Seed of this sequence alone. The draw at a position depends on (seed, position).
        cache_salt_id: KV is not shared between requests with different ones.
    """

    sampling: SamplingParams
    seed: int
    cache_salt_id: int | None = None


@dataclass(frozen=True, slots=True)
class SequencePiece:
    """Tokens [start, stop) of a sequence, with their KV as far as they have some."""

    sequence_id: SequenceId
    start: int
    stop: int


class WorkerRank(Exception):
    """This process computes a part of an engine that another one leads; it takes no requests.

    Attributes:
        capabilities: The engine's; the leader alone knows its KV pool.
        work: Returns when the leader ends.
    """

    def __init__(self, capabilities: EngineCapabilities, work: Callable[[], None]) -> None:
        super().__init__("this rank works for its leader")
        self.capabilities = capabilities
        self.work = work


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute the next `num_tokens` pending tokens of a sequence.

    Attributes:
        sequence_id: The sequence.
        num_tokens: At most its pending tokens.
        sample: Draw the next token from the last one's logits; only on the chunk that computes the
            last pending token.
        max_new_tokens: Tokens that a lease engine may draw from then on; per-step engines draw one.
        is_remote: It is computed on another device (`EngineCapabilities.disaggregated_prefill`).
    """

    sequence_id: SequenceId
    num_tokens: int
    sample: bool
    max_new_tokens: int = 1
    is_remote: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration.

    Attributes:
        decode: Sequences that compute their one pending token and draw the next, baseline first.
        max_new_tokens: Tokens that a lease engine may draw for each sequence in `decode`, same
            order, should it give it a place now; empty for per-step engines, which draw one.
        prefill: Prefill chunks, in priority order.
        num_protected: Sequences of `decode` that are the protected baseline.
    """

    decode: tuple[SequenceId, ...] = ()
    max_new_tokens: tuple[int, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    num_protected: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""
        return not self.decode and not self.prefill


@dataclass(frozen=True, slots=True)
class IterationAudit:
    """What an engine that iterates by itself says of one iteration, afterwards.

    Attributes:
        iteration: Its number.
        step_ms: How long it took.
        width: Sequences in decode.
        num_context_tokens: Sum of their contexts.
        prefill: Its prefill.
    """

    iteration: int
    step_ms: float
    width: int
    num_context_tokens: int
    prefill: PrefillLoad


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one iteration did; on lease engines, all that was learned since the last result.

    Attributes:
        iteration: Number of the iteration, counted by the engine.
        completed_at_s: Completion time on the engine's clock (`Engine.now_s`).
        step_ms: Duration of the iteration as the engine measured it.
        decoded: Sequences that really were in the decode batch.
        tokens: New tokens by sequence, 0..n each, in order; from decode and sampling chunks.
        prefilled: Pending tokens computed, by sequence.
        num_recomputed_tokens: Tokens computed that had been computed before.
        preempted: Sequences whose KV the engine dropped by itself; their tokens are kept.
        failed: Sequences that cannot go on, with the reason.
        holding: Sequences that keep their place unless the next plan leaves them out.
        vacated: Sequences whose place was taken back and has come to its end: its blocks are free.
        audits: Iterations of which the engine gave account; None where the plan says it all.
    """

    iteration: int
    completed_at_s: float
    step_ms: float
    decoded: tuple[SequenceId, ...]
    tokens: Mapping[SequenceId, tuple[int, ...]]
    prefilled: Mapping[SequenceId, int]
    num_recomputed_tokens: int = 0
    preempted: tuple[SequenceId, ...] = ()
    failed: Mapping[SequenceId, str] = field(default_factory=dict)
    holding: frozenset[SequenceId] = frozenset()
    vacated: frozenset[SequenceId] = frozenset()
    audits: tuple[IterationAudit, ...] | None = None


class Engine(Protocol):
    """Runs iterations and owns KV.

    All calls come from one thread. A `family` is the set of sequences of one request; blocks are
    counted as shared inside a family only, whatever else an engine finds to share.
    """

    @property
    def capabilities(self) -> EngineCapabilities:
        """Constant over the engine's life."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What a latency profile of this engine depends on: engine, model, device, dtype, ..."""

    def now_s(self) -> float:
        """The clock of `StepResult.completed_at_s`, in seconds; monotonic."""

    # ---- sequences

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """Registers a sequence with all its tokens pending. Allocates nothing."""

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """Registers a child of a sequence; allocates no block and computes nothing.

        The child has the parent's first `num_shared_tokens` computed tokens by reference, then the
        parent's remaining tokens and `suffix_ids` pending. The parent must have computed the shared
        tokens; its spans are the child's too. A child can outlive its parent.
        """

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        """Parent takes over the tokens and KV of `child_id`, then `suffix_ids` pending.

        The child's tokens must begin with the parent's. The child ceases to exist.
        """

    def assemble_sequence(
        self,
        sequence_id: SequenceId,
        pieces: Sequence[SequencePiece],
        suffix_ids: Sequence[int],
        spans: Spans,
    ) -> None:
        """The sequence becomes the tokens of `pieces`, in order, then `suffix_ids` pending.

        Their KV is taken as it is, up to the first token that has none; computing the others, then
        or after a preemption, heeds `spans`. The first piece begins at 0 and ends in tokens of its
        own, if others follow. Other sequences than this one cease to exist. It takes no more blocks
        than it frees. For engines that declare `kv_merge`.

        Such KV is not what its tokens have in a plain sequence: no cache may ever offer it to one
        for having the same token ids.

        Raises:
            ValueError: KV would be written to a block that others hold; nothing was changed.
        """

    def preempt_sequence(self, sequence_id: SequenceId) -> None:
        """Frees the KV that the sequence does not share with its parent; keeps its tokens."""

    def release_sequence(self, sequence_id: SequenceId) -> None:
        """Forgets a sequence and drops its references to blocks."""

    def num_tokens(self, sequence_id: SequenceId) -> int:
        """Tokens of the sequence, pending ones included."""

    def num_computed_tokens(self, sequence_id: SequenceId) -> int:
        """Tokens that have KV now."""

    # ---- memory

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody holds."""

    def num_blocks_held(self, family: int) -> int:
        """Distinct KV blocks held by the sequences of a family."""

    def num_blocks_needed(self, sequence_id: SequenceId, num_tokens: int) -> int:
        """Blocks that computing the next `num_tokens` tokens would take, copies included."""

    def check_integrity(self) -> None:
        """Raises AssertionError if ownership of blocks is inconsistent. For tests and idle time."""

    # ---- the iteration

    def step(self, plan: StepPlan) -> StepResult:
        """Runs one iteration.

        Raises:
            OutOfBlocksError: The plan does not fit; nothing was changed.
            EngineError: The engine is lost.
        """

    def idle(self) -> None:
        """Called instead of `step` when there is nothing to plan."""

    def shutdown(self) -> None:
        """Releases what the engine holds. No call may follow."""
