"""A sequence of the embedded engine, and what one step does with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from taper_trtllm.engines.base import SequenceId, SequenceParams
from taper_trtllm.engines.kv_cache import BlockTable
from taper_trtllm.engines.step_batch import Segment, split_chunk


@dataclass(slots=True)
class EngineSequence:
    """A sequence; `tokens[table.num_tokens:]` are pending.

    Attributes:
        tokens: All tokens.
        params: How it samples.
        table: Its KV.
        max_computed: Tokens that were ever computed, here or where the sequence was forked from.
    """

    tokens: list[int]
    params: SequenceParams
    table: BlockTable
    max_computed: int


@dataclass(slots=True)
class SequenceWork:
    """What a step does with one sequence.

    Attributes:
        sequence_id: The sequence.
        sequence: The same.
        num_tokens: Pending tokens to compute.
        sample: Draw the next token.
        start: Position of the first token to compute.
    """

    sequence_id: SequenceId
    sequence: EngineSequence
    num_tokens: int
    sample: bool
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.sequence.table.num_tokens

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

    def segments(self) -> list[Segment]:
        """The tokens to compute, cut for attention."""
        token_ids = self.sequence.tokens[self.start : self.start + self.num_tokens]
        block_ids = self.sequence.table.block_ids
        return split_chunk(self.sequence_id, token_ids, block_ids, self.start, self.sample)

    def count_recomputed(self) -> int:
        """Counts tokens that were computed before, and remembers the new ones as computed."""
        before, end = self.sequence.max_computed, self.start + self.num_tokens
        self.sequence.max_computed = max(before, end)
        return max(0, min(before, end) - self.start)
