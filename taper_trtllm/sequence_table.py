"""All live sequences, with what planning reads of them in columns.

Whatever changes a sequence goes through here to the engine. A step that gave every decoding
sequence one token moves their rows together; a row to which anything else happened is read anew
before the next plan. So a plan costs next to nothing for a leaf that only waits.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taper_trtllm.batch import IntArray
from taper_trtllm.engines.base import (
    Engine,
    SequenceId,
    SequenceParams,
    SequencePiece,
    StepPlan,
    StepResult,
)
from taper_trtllm.fork_join import BranchNode, BranchStatus

Rows = npt.NDArray[np.void]
"""Structured [N], fields as in `ROW`."""

ROW = np.dtype(
    [
        ("sequence_id", np.int64),
        ("num_tokens", np.int64),  # of the sequence, pending ones included
        ("num_computed", np.int64),  # of them, those with KV
        ("num_shared", np.int64),  # of them, those taken over from the parent by reference
        ("num_generated", np.int64),  # decoded in the branch so far
        ("num_stage_tokens_left", np.int64),  # that its serial stage may still decode
        ("last_advanced", np.int64),  # step in which it last got a token
        ("blocks_needed", np.int64),  # that its next token or lease would take, if it is to decode
    ]
)

NewTokens = list[tuple["LiveSequence", tuple[int, ...]]]


@dataclass(slots=True, eq=False)
class LiveSequence:
    """One branch's sequence on the engine.

    Attributes:
        sequence_id: The engine's id.
        family: Of its request.
        node: The branch.
        num_shared_tokens: Tokens it took over from its parent by reference.
        row: Its row in the table.
    """

    sequence_id: SequenceId
    family: int
    node: BranchNode
    num_shared_tokens: int
    row: int


class SequenceTable:
    """The sequences of all running requests.

    Args:
        engine: Owns the sequences.

    Attributes:
        step: Steps that were observed.
        changed: Families to which more happened than tokens in stages that go on; whoever draws
            conclusions from that clears it.
        holding: Sequences that hold a place on a lease engine.
        lease_tokens: Tokens that a sequence in decode must have memory for: a lease, or one step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens_per_block = engine.capabilities.tokens_per_block
        self.step = 0
        self.changed: set[int] = set()
        self.holding: frozenset[SequenceId] = frozenset()
        self.lease_tokens = engine.capabilities.lease_tokens or 1
        self._sequences: dict[SequenceId, LiveSequence] = {}
        self._ids = itertools.count()
        self._rows: Rows = np.zeros(0, dtype=ROW)
        self._free_rows: list[int] = []
        self._touched: set[LiveSequence] = set()  # rows to be read anew

    def __getitem__(self, sequence_id: SequenceId) -> LiveSequence:
        return self._sequences[sequence_id]

    # --------------------------------------------------------------------------- sequences

    def add(
        self, node: BranchNode, family: int, token_ids: Sequence[int], params: SequenceParams
    ) -> LiveSequence:
        """See `Engine.add_sequence`."""
        sequence_id = next(self._ids)
        self._engine.add_sequence(sequence_id, family, token_ids, params)
        sequence = LiveSequence(sequence_id, family, node, 0, self._take_row())
        if node.spans:
            self._assemble(sequence, (), 0, ())
        return self._enter(sequence)

    def fork(
        self, parent: LiveSequence, node: BranchNode, num_shared: int, params: SequenceParams
    ) -> LiveSequence:
        """A child for a branch that begins with its tokens; see `Engine.fork_sequence`."""
        sequence_id = next(self._ids)
        self._engine.fork_sequence(parent.sequence_id, sequence_id, num_shared, node.tokens, params)
        sequence = LiveSequence(sequence_id, parent.family, node, num_shared, self._take_row())
        if node.spans != parent.node.spans:
            self._assemble(sequence, (), 0, ())
        return self._enter(sequence)

    def join(self, parent: LiveSequence, child: LiveSequence, suffix_ids: Sequence[int]) -> None:
        """The parent takes over the child's row in history; see `Engine.join_sequence`."""
        self._engine.join_sequence(parent.sequence_id, child.sequence_id, suffix_ids)
        self._leave(child)
        self._rows["last_advanced"][parent.row] = self.step  # it has no claim to go first
        self.touch(parent)

    def merge(
        self, parent: LiveSequence, children: Sequence[LiveSequence], suffix_ids: Sequence[int]
    ) -> None:
        """The parent goes on behind the KV of its children, side by side."""
        self._assemble(parent, children, 0, suffix_ids)
        for child in children:
            self._leave(child)
        self._rows["last_advanced"][parent.row] = self.step
        self.touch(parent)

    def end(self, sequence: LiveSequence, num_dropped: int, suffix_ids: Sequence[int]) -> None:
        """Leaves out pending tokens at the end, and puts others there."""
        self._assemble(sequence, (), num_dropped, suffix_ids)
        self.touch(sequence)

    def _assemble(
        self,
        sequence: LiveSequence,
        children: Sequence[LiveSequence],
        num_dropped: int,
        suffix_ids: Sequence[int],
    ) -> None:
        """The first of the children has the sequence's own tokens; without any, it keeps them."""
        num_tokens = self.num_tokens(sequence)
        pieces = [
            SequencePiece(child.sequence_id, num_tokens if index else 0, self.num_tokens(child))
            for index, child in enumerate(children)
        ]
        own = SequencePiece(sequence.sequence_id, 0, num_tokens - num_dropped)
        self._engine.assemble_sequence(
            sequence.sequence_id, pieces or [own], suffix_ids, sequence.node.spans
        )

    def extend(
        self, sequence: LiveSequence, suffix_ids: Sequence[int], params: SequenceParams
    ) -> None:
        """Appends pending tokens: a child that begins with them is taken over at once."""
        parent_id, child_id = sequence.sequence_id, next(self._ids)
        num_computed = self._engine.num_computed_tokens(parent_id)
        self._engine.fork_sequence(parent_id, child_id, num_computed, suffix_ids, params)
        self._engine.join_sequence(parent_id, child_id, ())
        self._rows["last_advanced"][sequence.row] = self.step
        self.touch(sequence)

    def preempt(self, sequence: LiveSequence) -> None:
        """See `Engine.preempt_sequence`."""
        self._engine.preempt_sequence(sequence.sequence_id)
        self.holding -= {sequence.sequence_id}
        self.touch(sequence)

    def release(self, sequence: LiveSequence) -> None:
        """See `Engine.release_sequence`."""
        self._engine.release_sequence(sequence.sequence_id)
        self._leave(sequence)

    def touch(self, sequence: LiveSequence) -> None:
        """Something happened to the sequence or its branch."""
        self._touched.add(sequence)
        self.changed.add(sequence.family)

    def _enter(self, sequence: LiveSequence) -> LiveSequence:
        self._sequences[sequence.sequence_id] = sequence
        self._rows["last_advanced"][sequence.row] = self.step
        self.touch(sequence)
        return sequence

    def _leave(self, sequence: LiveSequence) -> None:
        del self._sequences[sequence.sequence_id]
        self._free_rows.append(sequence.row)
        self._touched.discard(sequence)
        self.changed.add(sequence.family)

    def _take_row(self) -> int:
        if not self._free_rows:
            num = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros(max(64, num), dtype=ROW)])
            self._free_rows.extend(range(len(self._rows) - 1, num - 1, -1))
        return self._free_rows.pop()

    # ----------------------------------------------------------------------------- reading

    def num_tokens(self, sequence: LiveSequence) -> int:
        """Its tokens, pending ones included."""
        return self._engine.num_tokens(sequence.sequence_id)

    def num_computed(self, sequence: LiveSequence) -> int:
        """Its tokens that have KV."""
        return self._engine.num_computed_tokens(sequence.sequence_id)

    def num_pending(self, sequence: LiveSequence) -> int:
        """Its tokens without KV."""
        return self.num_tokens(sequence) - self.num_computed(sequence)

    def lease_of(self, sequence: LiveSequence) -> int:
        """Tokens of a place that it gets in competition."""
        return min(self.lease_tokens, sequence.node.num_stage_tokens_left)

    def rows(self, rows: IntArray) -> Rows:
        """A copy of some rows, as they stand after `refresh`."""
        return self._rows.take(rows)

    def refresh(self) -> None:
        """Reads all touched rows from the engine and the branches."""
        engine = self._engine
        for sequence in self._touched:
            node, sequence_id = sequence.node, sequence.sequence_id
            num_tokens = engine.num_tokens(sequence_id)
            num_computed = engine.num_computed_tokens(sequence_id)
            is_decoding = node.status is BranchStatus.DECODING
            is_ready = is_decoding and num_tokens - num_computed == 1
            needs_blocks = is_ready and sequence_id not in self.holding
            left = node.num_stage_tokens_left if is_decoding else 0
            self._rows[sequence.row] = (
                sequence_id,
                num_tokens,
                num_computed,
                sequence.num_shared_tokens,
                node.num_generated,
                left,
                self._rows["last_advanced"][sequence.row],
                engine.num_blocks_needed(sequence_id, self.lease_of(sequence))
                if needs_blocks
                else 0,
            )
        self._touched.clear()

    # --------------------------------------------------------------------------- observing

    def observe(
        self, decode_rows: IntArray, plan: StepPlan, result: StepResult
    ) -> Mapping[int, NewTokens]:
        """Takes note of a step.

        Args:
            decode_rows: [len(plan.decode)] their rows.
            plan: What was asked for.
            result: What became of it.

        Returns:
            New tokens by family, but for sequences that failed.
        """
        self.step += 1
        self._move(decode_rows, plan, result)
        self.holding = result.holding
        sequences, failed = self._sequences, result.failed
        taken: defaultdict[int, NewTokens] = defaultdict(list)
        for sequence_id, token_ids in result.tokens.items():
            if token_ids and sequence_id not in failed:
                sequence = sequences[sequence_id]
                taken[sequence.family].append((sequence, token_ids))
        return taken

    def _move(self, decode_rows: IntArray, plan: StepPlan, result: StepResult) -> None:
        others = {chunk.sequence_id for chunk in plan.prefill} | result.vacated
        if self.holding or result.holding:
            stayed = self.holding & result.holding
            others.update((self.holding | result.holding) - stayed, result.preempted)
            others.update(result.prefilled, result.tokens)
            steady = [i for i in result.decoded if i in stayed and len(result.tokens[i]) == 1]
            others.difference_update(steady)
            rows = [self._sequences[sequence_id].row for sequence_id in steady]
            self._move_by_one(np.array(rows, dtype=np.int64), in_place=True)
        elif _went_as_planned(plan, result):
            self._move_by_one(decode_rows, in_place=False)
        else:
            others.update(plan.decode, result.decoded, result.tokens, result.preempted)
            others.update(result.prefilled)
        for sequence_id in others:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:  # it held a place and is gone
                continue
            self.touch(sequence)
            if result.tokens.get(sequence_id):
                self._rows["last_advanced"][sequence.row] = self.step

    def _move_by_one(self, rows: IntArray, *, in_place: bool) -> None:
        """Each got one token; what `in_place` ones need to go on is theirs already."""
        moved = self._rows.take(rows)
        moved["num_tokens"] += 1
        moved["num_computed"] += 1
        moved["num_generated"] += 1
        moved["num_stage_tokens_left"] -= 1
        moved["last_advanced"] = self.step
        # It has written to its last block, so that one is its own: a new one if that is full.
        is_full = moved["num_computed"] % self.tokens_per_block == 0
        moved["blocks_needed"] = 0 if in_place else is_full
        self._rows.put(rows, moved)


def _went_as_planned(plan: StepPlan, result: StepResult) -> bool:
    """Everyone in the decode batch got one token; nearly always so."""
    num_tokens = len(plan.decode) + sum(chunk.sample for chunk in plan.prefill)
    return (
        result.decoded == plan.decode
        and not result.preempted
        and list(map(len, result.tokens.values())) == [1] * num_tokens
    )
