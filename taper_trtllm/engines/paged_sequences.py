"""Sequences with paged KV: the part of `Engine` that engines with blocks of their own share.

It is also the ledger of engines whose blocks are kept by somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper_trtllm.engines.base import (
    EngineCapabilities,
    SequenceId,
    SequenceParams,
    SequencePiece,
)
from taper_trtllm.engines.kv_cache import BlockPool, BlockTable
from taper_trtllm.token_spans import Spans


@dataclass(slots=True)
class EngineSequence:
    """A sequence; `tokens[table.num_tokens:]` are pending.

    Attributes:
        tokens: All tokens.
        params: How it samples.
        table: Its KV.
        max_computed: Tokens that were ever computed, here or where the sequence was forked from.
        spans: Where the tokens stand, and what they see.
    """

    tokens: list[int]
    params: SequenceParams
    table: BlockTable
    max_computed: int
    spans: Spans = ()


class PagedSequences:
    """Implements `engines.base.Engine` but for the iteration and the clock.

    Args:
        capabilities: What the engine declares.
    """

    def __init__(self, capabilities: EngineCapabilities) -> None:
        self._capabilities = capabilities
        self._pool = BlockPool(capabilities.num_kv_blocks, capabilities.tokens_per_block)
        self._sequences: dict[SequenceId, EngineSequence] = {}

    @property
    def capabilities(self) -> EngineCapabilities:
        """See `Engine`."""
        return self._capabilities

    # ---- sequences

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        tokens = list(token_ids)
        self._check_new(sequence_id, tokens, tokens)
        self._sequences[sequence_id] = EngineSequence(tokens, params, self._pool.create(family), 0)

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        parent = self._sequences[parent_id]
        tokens = [*parent.tokens, *suffix_ids]
        self._check_new(child_id, tokens, suffix_ids)
        table = self._pool.fork(parent.table, num_shared_tokens)
        self._sequences[child_id] = EngineSequence(
            tokens, params, table, parent.max_computed, parent.spans
        )

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        """See `Engine`."""
        parent, child = self._sequences[parent_id], self._sequences[child_id]
        if child.tokens[: len(parent.tokens)] != parent.tokens:
            raise ValueError(f"sequence {child_id} does not begin with the tokens of {parent_id}")
        tokens = [*child.tokens, *suffix_ids]
        self._check_tokens(parent_id, tokens, suffix_ids)
        # A preempted child may have less KV than the parent, whose tokens it begins with.
        keep, drop = child.table, parent.table
        if keep.num_tokens < drop.num_tokens:
            keep, drop = drop, keep
        self._pool.release(drop)
        parent.table = keep
        parent.tokens = tokens
        parent.spans = child.spans
        parent.max_computed = max(parent.max_computed, child.max_computed)
        del self._sequences[child_id]

    def assemble_sequence(
        self,
        sequence_id: SequenceId,
        pieces: Sequence[SequencePiece],
        suffix_ids: Sequence[int],
        spans: Spans,
    ) -> None:
        """See `Engine`."""
        if not self._capabilities.kv_merge:
            raise ValueError(f"engine {self._capabilities.name!r} cannot merge KV")
        target = self._sequences[sequence_id]
        sources = [self._sequences[piece.sequence_id] for piece in pieces]
        tokens = [
            token
            for piece, source in zip(pieces, sources, strict=True)
            for token in source.tokens[piece.start : piece.stop]
        ]
        tokens += suffix_ids
        self._check_tokens(sequence_id, tokens, suffix_ids)
        first_stop = pieces[0].stop
        # A preempted branch may have less KV than the sequence, whose tokens it begins with.
        table = max(sources[0].table, target.table, key=lambda t: min(t.num_tokens, first_stop))
        num_kept = min(table.num_tokens, first_stop)
        parts = _parts(pieces[1:], sources[1:]) if num_kept == first_stop else []
        others = {id(s.table): s.table for s in (target, *sources) if s.table is not table}
        self._copy_kv(*self._pool.append(table, num_kept, parts, list(others.values())))
        target.table, target.tokens, target.spans = table, tokens, spans
        target.max_computed = max(table.num_tokens, _max_computed(pieces, sources))
        for piece in pieces:
            if piece.sequence_id != sequence_id:
                del self._sequences[piece.sequence_id]

    def _copy_kv(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the KV of slots, all layers; all are read before any is written."""
        raise NotImplementedError

    def preempt_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        self._pool.drop_unshared(self._sequences[sequence_id].table)

    def release_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        self._pool.release(self._sequences.pop(sequence_id).table)

    def num_tokens(self, sequence_id: SequenceId) -> int:
        """See `Engine`."""
        return len(self._sequences[sequence_id].tokens)

    def num_computed_tokens(self, sequence_id: SequenceId) -> int:
        """See `Engine`."""
        return self._sequences[sequence_id].table.num_tokens

    def _check_new(
        self, sequence_id: SequenceId, tokens: list[int], new_ids: Sequence[int]
    ) -> None:
        if sequence_id in self._sequences:
            raise ValueError(f"sequence {sequence_id} exists already")
        self._check_tokens(sequence_id, tokens, new_ids)

    def _check_tokens(
        self, sequence_id: SequenceId, tokens: list[int], new_ids: Sequence[int]
    ) -> None:
        """Checks the length of all, and those tokens that no other sequence had before."""
        limits = self._capabilities
        if not 1 <= len(tokens) <= limits.max_seq_len:
            raise ValueError(
                f"sequence {sequence_id}: {len(tokens)} tokens, must be 1..{limits.max_seq_len}"
            )
        if new_ids and not 0 <= min(new_ids) <= max(new_ids) < limits.vocab_size:
            raise ValueError(
                f"sequence {sequence_id}: token ids must be in [0, {limits.vocab_size})"
            )

    # ---- memory

    @property
    def num_free_blocks(self) -> int:
        """See `Engine`."""
        return self._pool.num_free_blocks

    def num_blocks_held(self, family: int) -> int:
        """See `Engine`."""
        return self._pool.num_blocks_held(family)

    def num_blocks_needed(self, sequence_id: SequenceId, num_tokens: int) -> int:
        """See `Engine`."""
        return self._pool.num_blocks_needed(self._sequences[sequence_id].table, num_tokens)

    def check_integrity(self) -> None:
        """See `Engine`."""
        self._pool.check_integrity()
        tables = {id(sequence.table) for sequence in self._sequences.values()}
        assert len(tables) == len(self._sequences) == self._pool.num_tables, "a table is lost"
        for sequence in self._sequences.values():
            assert sequence.table.num_tokens <= sequence.max_computed <= len(sequence.tokens)


def _parts(
    pieces: Sequence[SequencePiece], sources: Sequence[EngineSequence]
) -> list[tuple[BlockTable, int, int]]:
    """What has KV of pieces that follow each other, up to the first gap."""
    parts = []
    for piece, source in zip(pieces, sources, strict=True):
        stop = min(piece.stop, source.table.num_tokens)
        if stop > piece.start:
            parts.append((source.table, piece.start, stop))
        if stop < piece.stop:
            break
    return parts


def _max_computed(pieces: Sequence[SequencePiece], sources: Sequence[EngineSequence]) -> int:
    """Tokens of the pieces that were ever computed, up to the first that was not."""
    total = 0
    for piece, source in zip(pieces, sources, strict=True):
        total += max(0, min(piece.stop, source.max_computed) - piece.start)
        if source.max_computed < piece.stop:
            break
    return total
