"""What per-step engines with paged KV have in common: the iteration and the check of plans.

A subclass computes: it turns the work of a step into tokens, and has a clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taper_trtllm.engines.base import (
    EngineCapabilities,
    PrefillKind,
    SequenceId,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.kv_cache import BlockCopy
from taper_trtllm.engines.paged_sequences import EngineSequence, PagedSequences


@dataclass(slots=True)
class ChunkWork:
    """A prefill chunk.

    Attributes:
        sequence_id: Whose.
        sequence: The same.
        start: Position of the first token to compute.
        num_tokens: Pending tokens to compute.
        sample: Draw the next token.
        is_remote: See `PrefillChunk`.
    """

    sequence_id: SequenceId
    sequence: EngineSequence
    start: int
    num_tokens: int
    sample: bool
    is_remote: bool = False

    def check(self, max_seq_len: int) -> None:
        """Checks that the sequence can do this.

        Raises:
            ValueError: It has not so many pending tokens, may not draw, or is at its limit.
        """
        num_tokens = len(self.sequence.tokens)
        pending = num_tokens - self.start
        if not 1 <= self.num_tokens <= pending:
            raise ValueError(f"{self._name}: {self.num_tokens} tokens of {pending} pending ones")
        if self.sample and self.num_tokens < pending:
            raise ValueError(f"{self._name}: {pending} tokens are pending, so it cannot draw")
        if self.sample and num_tokens >= max_seq_len:
            raise ValueError(f"{self._name}: has reached max_seq_len")

    @property
    def _name(self) -> str:
        return f"sequence {self.sequence_id}"


def per_step_capabilities(
    name: str,
    *,
    max_batch_size: int,
    max_seq_len: int,
    tokens_per_block: int,
    num_kv_blocks: int,
    vocab_size: int,
    bitwise_deterministic: bool,
    virtual_time: bool,
    width_buckets: tuple[int, ...] | None = None,
    disaggregated_prefill: frozenset[PrefillKind] = frozenset(),
    prefix_sharing_attention: bool = False,
    kv_merge: bool = False,
) -> EngineCapabilities:
    """What holds for every engine here: a plan takes effect at once, and gated sequences stay."""
    return EngineCapabilities(
        name=name,
        granularity="step",
        actuation_delay_steps=0,
        lease_tokens=None,
        resident_when_gated=True,
        min_recompute_tokens=0,
        width_buckets=width_buckets,
        disaggregated_prefill=disaggregated_prefill,
        prefix_sharing_attention=prefix_sharing_attention,
        kv_merge=kv_merge,
        bitwise_deterministic=bitwise_deterministic,
        virtual_time=virtual_time,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        num_kv_blocks=num_kv_blocks,
        vocab_size=vocab_size,
    )


class PagedEngine(PagedSequences, ABC):
    """Implements `engines.base.Engine` but for the computing.

    Args:
        capabilities: What the engine declares.
    """

    def __init__(self, capabilities: EngineCapabilities) -> None:
        super().__init__(capabilities)
        self._iteration = 0

    @abstractmethod
    def now_s(self) -> float:
        """See `Engine`."""

    @abstractmethod
    def _compute(
        self,
        plan: StepPlan,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> dict[SequenceId, int]:
        """Runs one step; the tables have their blocks already, and count the new tokens.

        Args:
            plan: What was asked for.
            decode: The sequences of `plan.decode`; each computes its last token and draws the next.
            chunks: The work of `plan.prefill`.
            copies: Blocks to copy before anything is written.

        Returns:
            The token that each sequence draws.

        Raises:
            EngineError: The engine is lost.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> Mapping[str, str]:
        """See `Engine`."""

    # ---- the iteration

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine`.

        Raises:
            ValueError: The plan is malformed; nothing was changed.
        """
        started_s = self.now_s()
        decode = [self._sequences[i] for i in plan.decode]
        chunks = self._chunks(plan)
        self._check_plan(plan, decode, chunks)
        writes = [(sequence.table, 1) for sequence in decode]
        writes += [(chunk.sequence.table, chunk.num_tokens) for chunk in chunks]
        copies = self._pool.reserve(writes)
        tokens = self._compute(plan, decode, chunks, copies)
        num_recomputed = self._count_recomputed(decode, chunks)
        for sequence_id, token in tokens.items():
            self._sequences[sequence_id].tokens.append(token)
        completed_at_s = self.now_s()
        iteration = self._iteration
        self._iteration += 1
        return StepResult(
            iteration=iteration,
            completed_at_s=completed_at_s,
            step_ms=(completed_at_s - started_s) * 1e3,
            decoded=plan.decode,
            tokens={i: (token,) for i, token in tokens.items()},
            prefilled={chunk.sequence_id: chunk.num_tokens for chunk in plan.prefill},
            num_recomputed_tokens=num_recomputed,
        )

    def idle(self) -> None:
        """See `Engine`: there is nothing to do."""

    def shutdown(self) -> None:
        """See `Engine`."""
        self._sequences.clear()

    def _chunks(self, plan: StepPlan) -> list[ChunkWork]:
        chunks = []
        for chunk in plan.prefill:
            sequence = self._sequences[chunk.sequence_id]
            start = sequence.table.num_tokens
            chunks.append(
                ChunkWork(
                    chunk.sequence_id, sequence, start, chunk.num_tokens, chunk.sample,
                    chunk.is_remote,
                )
            )  # fmt: skip
        return chunks

    def _check_plan(
        self, plan: StepPlan, decode: Sequence[EngineSequence], chunks: Sequence[ChunkWork]
    ) -> None:
        """Raises ValueError for what the executor must not ask for."""
        limits = self._capabilities
        num_sequences = len(decode) + len(chunks)
        if len({*plan.decode, *(chunk.sequence_id for chunk in chunks)}) != num_sequences:
            raise ValueError("a sequence stands in the plan twice")
        if not 1 <= num_sequences <= limits.max_batch_size:
            raise ValueError(
                f"a step takes 1..{limits.max_batch_size} sequences, not {num_sequences}"
            )
        for sequence in decode:
            num_tokens, start = len(sequence.tokens), sequence.table.num_tokens
            if num_tokens != start + 1 or num_tokens >= limits.max_seq_len:
                sequence_id = plan.decode[decode.index(sequence)]
                ChunkWork(sequence_id, sequence, start, 1, True).check(limits.max_seq_len)
        for chunk in chunks:
            chunk.check(limits.max_seq_len)

    @staticmethod
    def _count_recomputed(decode: Sequence[EngineSequence], chunks: Sequence[ChunkWork]) -> int:
        """Counts tokens that were computed before, and remembers the new ones as computed."""
        num_recomputed = 0
        for sequence in decode:
            end = sequence.table.num_tokens
            if sequence.max_computed < end:
                sequence.max_computed = end
            else:
                num_recomputed += 1
        for chunk in chunks:
            before, end = chunk.sequence.max_computed, chunk.start + chunk.num_tokens
            chunk.sequence.max_computed = max(before, end)
            num_recomputed += max(0, min(before, end) - chunk.start)
        return num_recomputed
