"""An engine without a model, for tests of the executor.

The next token is a hash of every token of the sequence *as read through its block table*, so a
block that is shared, copied or freed wrongly changes the output. Time is virtual.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from taper_trtllm.engines.base import (
    EngineError,
    SequenceId,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.kv_cache import BlockCopy, BlockPool
from taper_trtllm.engines.paged_engine import (
    ChunkWork,
    PagedEngine,
    per_step_capabilities,
)
from taper_trtllm.engines.paged_sequences import EngineSequence
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

VOCAB_SIZE = 97


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    """The toy model: a hash of the whole context."""
    return zlib.crc32(np.asarray([seed, *tokens], dtype=np.int64).tobytes()) % VOCAB_SIZE


def step_ms(width: int, context_tokens: int, num_prefill_tokens: int) -> float:
    """The toy device."""
    decode = 3.0 + 0.3 * width + 4e-4 * context_tokens if width else 2.0
    return decode + 0.08 * num_prefill_tokens


def toy_profile() -> LatencyProfile:
    return LatencyProfile(
        fingerprint={"engine": "toy"},
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=step_ms(w, w * c, 0))
            for w in (1, 2, 4, 8, 16, 32, 64)
            for c in (16, 64, 256)
        ),
        prefill=tuple(
            PrefillPoint(
                width=w,
                context_tokens=64 if w else 0,
                num_chunks=1,
                num_tokens=n,
                token_context=n * n / 2,
                step_ms=step_ms(w, 64 * w, n),
            )
            for w in (0, 4)
            for n in (8, 32)
        ),
    )


class ToyEngine(PagedEngine):
    kv_merge = False

    def __init__(self, num_kv_blocks: int = 256, tokens_per_block: int = 4) -> None:
        super().__init__(
            per_step_capabilities(
                name="toy",
                kv_merge=self.kv_merge,
                bitwise_deterministic=True,
                virtual_time=True,
                max_batch_size=256,
                max_seq_len=4096,
                tokens_per_block=tokens_per_block,
                num_kv_blocks=num_kv_blocks,
                vocab_size=VOCAB_SIZE,
            )
        )
        self.clock_s = 0.0
        self.num_computed = 0  # tokens computed, over all steps
        self.fail_next: dict[SequenceId, str] = {}
        self.break_next = False
        self._content: dict[tuple[int, int], int] = {}  # (block, offset) -> token

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {"engine": "toy"}

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_steps(self) -> int:
        return self._iteration

    def now_s(self) -> float:
        return self.clock_s

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        stepped = (*plan.decode, *(chunk.sequence_id for chunk in plan.prefill))
        failed = {s: self.fail_next.pop(s) for s in stepped if s in self.fail_next}
        return replace(result, failed=failed)

    def _compute(
        self,
        plan: StepPlan,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> dict[SequenceId, int]:
        if self.break_next:
            raise EngineError("the device fell off the bus")
        for copy in copies:
            for offset in range(self.pool.tokens_per_block):
                if (copy.src, offset) in self._content:
                    self._content[copy.dst, offset] = self._content[copy.src, offset]
        for sequence in decode:
            self._write(sequence, len(sequence.tokens) - 1, 1)
        for chunk in chunks:
            self._write(chunk.sequence, chunk.start, chunk.num_tokens)
        context = sum(len(sequence.tokens) for sequence in decode)
        num_prefill = sum(chunk.num_tokens for chunk in chunks)
        self.clock_s += step_ms(len(decode), context, num_prefill) / 1e3
        drawn = {i: self._draw(s) for i, s in zip(plan.decode, decode, strict=True)}
        drawn |= {c.sequence_id: self._draw(c.sequence) for c in chunks if c.sample}
        return drawn

    def _write(self, sequence: EngineSequence, start: int, num_tokens: int) -> None:
        for position in range(start, start + num_tokens):
            self._content[self._slot(sequence, position)] = sequence.tokens[position]
        self.num_computed += num_tokens

    def _draw(self, sequence: EngineSequence) -> int:
        read = [self._content[self._slot(sequence, i)] for i in range(len(sequence.tokens))]
        return next_token(read, sequence.params.seed if sequence.params.sampling.temperature else 0)

    def _slot(self, sequence: EngineSequence, position: int) -> tuple[int, int]:
        size = self.pool.tokens_per_block
        return sequence.table.block_ids[position // size], position % size
