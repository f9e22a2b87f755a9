"""An engine without a model, for tests of the executor.

The next token is a hash of every token of the sequence *as read through its block table*, so a
block that is shared, copied or freed wrongly changes the output. Time is virtual.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taper_trtllm.engines.base import (
    EngineCapabilities,
    EngineError,
    SequenceId,
    SequenceParams,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.kv_cache import BlockPool, BlockTable
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


@dataclass(eq=False)
class _Sequence:
    tokens: list[int]
    table: BlockTable
    params: SequenceParams


class ToyEngine:
    def __init__(self, num_kv_blocks: int = 256, tokens_per_block: int = 4) -> None:
        self.capabilities = EngineCapabilities(
            name="toy",
            granularity="step",
            actuation_delay_steps=0,
            lease_tokens=None,
            resident_when_gated=True,
            min_recompute_tokens=0,
            width_buckets=None,
            prefix_sharing_attention=False,
            bitwise_deterministic=True,
            virtual_time=True,
            max_batch_size=256,
            max_seq_len=4096,
            tokens_per_block=tokens_per_block,
            num_kv_blocks=num_kv_blocks,
            vocab_size=VOCAB_SIZE,
        )
        self.pool = BlockPool(num_kv_blocks, tokens_per_block)
        self.clock_s = 0.0
        self.num_steps = 0
        self.num_computed = 0  # tokens computed, over all steps
        self.fail_next: dict[SequenceId, str] = {}
        self.break_next = False
        self._content: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self._sequences: dict[SequenceId, _Sequence] = {}

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {"engine": "toy"}

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def now_s(self) -> float:
        return self.clock_s

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        assert sequence_id not in self._sequences
        self._sequences[sequence_id] = _Sequence(list(token_ids), self.pool.create(family), params)

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        parent = self._sequences[parent_id]
        assert child_id not in self._sequences
        self._sequences[child_id] = _Sequence(
            [*parent.tokens, *suffix_ids],
            self.pool.fork(parent.table, num_shared_tokens),
            params,
        )

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        parent, child = self._sequences[parent_id], self._sequences.pop(child_id)
        assert child.tokens[: len(parent.tokens)] == parent.tokens
        self.pool.release(parent.table)
        parent.table = child.table
        parent.tokens = [*child.tokens, *suffix_ids]

    def preempt_sequence(self, sequence_id: SequenceId) -> None:
        self.pool.drop_unshared(self._sequences[sequence_id].table)

    def release_sequence(self, sequence_id: SequenceId) -> None:
        self.pool.release(self._sequences.pop(sequence_id).table)

    def num_tokens(self, sequence_id: SequenceId) -> int:
        return len(self._sequences[sequence_id].tokens)

    def num_computed_tokens(self, sequence_id: SequenceId) -> int:
        return self._sequences[sequence_id].table.num_tokens

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free_blocks

    def num_blocks_held(self, family: int) -> int:
        return self.pool.num_blocks_held(family)

    def num_blocks_needed(self, sequence_id: SequenceId, num_tokens: int) -> int:
        return self.pool.num_blocks_needed(self._sequences[sequence_id].table, num_tokens)

    def check_integrity(self) -> None:
        self.pool.check_integrity()

    def step(self, plan: StepPlan) -> StepResult:
        if self.break_next:
            raise EngineError("the device fell off the bus")
        work = [(s, 1, True) for s in plan.decode]
        work += [(c.sequence_id, c.num_tokens, c.sample) for c in plan.prefill]
        assert len({s for s, _, _ in work}) == len(work), "a sequence stands in the plan twice"
        assert len(work) <= self.capabilities.max_batch_size
        context = sum(self.num_tokens(s) for s in plan.decode)
        tokens = self._compute(work)
        self.clock_s += step_ms(len(plan.decode), context, self._num_prefill(plan)) / 1e3
        self.num_steps += 1
        failed = {s: self.fail_next.pop(s) for s, _, _ in work if s in self.fail_next}
        return StepResult(
            iteration=self.num_steps,
            completed_at_s=self.clock_s,
            step_ms=step_ms(len(plan.decode), context, self._num_prefill(plan)),
            decoded=plan.decode,
            tokens=tokens,
            prefilled={c.sequence_id: c.num_tokens for c in plan.prefill},
            failed=failed,
        )

    @staticmethod
    def _num_prefill(plan: StepPlan) -> int:
        return sum(c.num_tokens for c in plan.prefill)

    def _compute(
        self, work: list[tuple[SequenceId, int, bool]]
    ) -> dict[SequenceId, tuple[int, ...]]:
        started = {s: self._sequences[s].table.num_tokens for s, _, _ in work}
        for s, n, sample in work:
            pending = len(self._sequences[s].tokens) - started[s]
            assert 1 <= n <= pending, f"{n} of {pending} pending tokens planned"
            assert not sample or n == pending, "sampling before all is computed"
        writes = [(self._sequences[s].table, n) for s, n, _ in work]
        for copy in self.pool.reserve(writes):
            for offset in range(self.pool.tokens_per_block):
                if (copy.src, offset) in self._content:
                    self._content[copy.dst, offset] = self._content[copy.src, offset]
        for s, n, _ in work:
            sequence = self._sequences[s]
            for position in range(started[s], started[s] + n):
                self._content[self._slot(sequence, position)] = sequence.tokens[position]
            self.num_computed += n
        drawn: dict[SequenceId, tuple[int, ...]] = {}
        for s, _, sample in work:
            if sample:
                sequence = self._sequences[s]
                read = [self._content[self._slot(sequence, i)] for i in range(len(sequence.tokens))]
                seed = sequence.params.seed if sequence.params.sampling.temperature else 0
                drawn[s] = (next_token(read, seed),)
                sequence.tokens.append(drawn[s][0])
        return drawn

    def _slot(self, sequence: _Sequence, position: int) -> tuple[int, int]:
        size = self.pool.tokens_per_block
        return sequence.table.block_ids[position // size], position % size

    def shutdown(self) -> None:
        self._sequences.clear()
