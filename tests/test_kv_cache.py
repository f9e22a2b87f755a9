"""The block pool against a model that keeps the content of every block."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from taper_trtllm.engines.base import OutOfBlocksError
from taper_trtllm.engines.kv_cache import BlockPool, BlockTable

NUM_BLOCKS = 12
_INDEX = st.integers(min_value=0, max_value=10**6)


@dataclass(eq=False)
class Held:
    """A table and the values that must be read back through it."""

    table: BlockTable
    values: list[int]


class PoolMachine(RuleBasedStateMachine):
    """Writes unique values through random tables; no table may see what another one writes."""

    @initialize(tokens_per_block=st.sampled_from([1, 3, 4]))
    def start(self, tokens_per_block: int) -> None:
        self.size = tokens_per_block
        self.pool = BlockPool(NUM_BLOCKS, tokens_per_block)
        self.content = [[-1] * tokens_per_block for _ in range(NUM_BLOCKS + 1)]
        self.held: list[Held] = []
        self.next_value = itertools.count()

    def pick(self, index: int) -> Held:
        return self.held[index % len(self.held)]

    @rule(family=st.integers(0, 2))
    def create(self, family: int) -> None:
        self.held.append(Held(self.pool.create(family), []))

    @rule(index=_INDEX, share=st.floats(0, 1))
    def fork(self, index: int, share: float) -> None:
        if not self.held:
            return
        parent = self.pick(index)
        num_shared = round(share * len(parent.values))
        free = self.pool.num_free_blocks
        child = self.pool.fork(parent.table, num_shared)
        assert self.pool.num_free_blocks == free
        self.held.append(Held(child, parent.values[:num_shared]))

    @rule(index=_INDEX)
    def release(self, index: int) -> None:
        if self.held:
            held = self.held.pop(index % len(self.held))
            self.pool.release(held.table)

    @rule(index=_INDEX)
    def preempt(self, index: int) -> None:
        if not self.held:
            return
        held = self.pick(index)
        others = {b for h in self.held if h is not held for b in h.table.block_ids}
        own = len(set(held.table.block_ids) - others)
        free = self.pool.num_free_blocks
        self.pool.drop_unshared(held.table)
        assert self.pool.num_free_blocks == free + own
        assert others.issuperset(held.table.block_ids)
        del held.values[held.table.num_tokens :]

    @rule(picks=st.lists(st.tuples(_INDEX, st.integers(1, 9)), min_size=1, max_size=5))
    def write(self, picks: list[tuple[int, int]]) -> None:
        chosen = {i % len(self.held): n for i, n in picks} if self.held else {}
        writes = [(self.held[i], n) for i, n in chosen.items()]
        free = self.pool.num_free_blocks
        before = [(bytes(h.table.block_ids), h.table.num_tokens) for h in self.held]
        try:
            copies = self.pool.reserve([(h.table, n) for h, n in writes])
        except OutOfBlocksError:
            # It was right to refuse: one table after the other does not fit either.
            assert before == [(bytes(h.table.block_ids), h.table.num_tokens) for h in self.held]
            assert self.pool.num_free_blocks == free
            assert self.blocks_for_one_by_one(writes) > free
            return
        assert free - self.pool.num_free_blocks == len(copies) + sum(
            self.pool._blocks_for(len(h.values) + n) - self.pool._blocks_for(len(h.values))
            for h, n in writes
        )
        for copy in copies:
            self.content[copy.dst] = list(self.content[copy.src])
        for held, n in writes:
            self.append(held, n)

    def blocks_for_one_by_one(self, writes: list[tuple[Held, int]]) -> int:
        """Blocks that the writes take, counted by sets of holders instead of reference counts."""
        holders = {
            block: {id(h) for h in self.held if block in h.table.block_ids}
            for h in self.held
            for block in h.table.block_ids
        }
        total = 0
        for held, n in writes:
            filled = len(held.values)
            total += -(-(filled + n) // self.size) - -(-filled // self.size)
            if filled % self.size:
                tail = held.table.block_ids[-1]
                total += len(holders[tail]) > 1
                holders[tail].discard(id(held))
        return total

    @rule(
        index=_INDEX,
        keep=st.floats(0, 1),
        picks=st.lists(st.tuples(_INDEX, st.floats(0, 1), st.floats(0, 1)), max_size=3),
    )
    def merge(self, index: int, keep: float, picks: list[tuple[int, float, float]]) -> None:
        """Puts parts of others behind a part of a table; the others are gone."""
        if not self.held:
            return
        held = self.pick(index)
        num_kept = round(keep * len(held.values))
        chosen = {id(self.pick(i)): (self.pick(i), a, b) for i, a, b in picks}
        chosen.pop(id(held), None)
        parts = []
        for other, a, b in chosen.values():
            start, stop = sorted((round(a * len(other.values)), round(b * len(other.values))))
            parts.append((other, start, stop))
        values = [v for other, start, stop in parts for v in other.values[start:stop]]
        before = [(bytes(h.table.block_ids), h.table.num_tokens) for h in self.held]
        free = self.pool.num_free_blocks
        try:
            sources, targets = self.pool.append(
                held.table,
                num_kept,
                [(other.table, start, stop) for other, start, stop in parts],
                [other.table for other, _, _ in parts],
            )
        except (ValueError, OutOfBlocksError) as error:
            assert before == [(bytes(h.table.block_ids), h.table.num_tokens) for h in self.held]
            assert self.pool.num_free_blocks == free and values
            if isinstance(error, ValueError):
                tail = held.table.block_ids[num_kept // self.size]
                assert sum(tail in h.table.block_ids for h in self.held) > 1
            return
        read = [self.content[slot // self.size][slot % self.size] for slot in sources]
        assert read == values
        for target, value in zip(targets, read, strict=True):
            self.content[target // self.size][target % self.size] = value
        gone = [other for other, _, _ in parts]
        self.held = [h for h in self.held if h not in gone]
        held.values[num_kept:] = values

    def append(self, held: Held, n: int) -> None:
        for _ in range(n):
            position, value = len(held.values), next(self.next_value)
            block = held.table.block_ids[position // self.size]
            self.content[block][position % self.size] = value
            held.values.append(value)

    @invariant()
    def reads_back(self) -> None:
        for held in getattr(self, "held", ()):
            read = [
                self.content[held.table.block_ids[i // self.size]][i % self.size]
                for i in range(held.table.num_tokens)
            ]
            assert read == held.values

    @invariant()
    def is_consistent(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        for family in range(3):
            distinct = {b for h in self.held if h.table.family == family for b in h.table.block_ids}
            assert self.pool.num_blocks_held(family) == len(distinct)
        free = self.pool.num_free_blocks
        assert free == NUM_BLOCKS - sum(self.pool.num_blocks_held(f) for f in range(3))

    def teardown(self) -> None:
        for held in getattr(self, "held", ()):
            self.pool.release(held.table)
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.num_free_blocks == NUM_BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)


def test_tail_is_copied_lazily_and_its_last_holder_writes_in_place() -> None:
    pool = BlockPool(num_blocks=8, tokens_per_block=4)
    parent = pool.create(family=7)
    pool.reserve([(parent, 6)])
    tail = parent.block_ids[1]
    children = [pool.fork(parent, 6) for _ in range(2)]
    assert pool.num_blocks_held(7) == 2

    assert [pool.num_blocks_needed(t, 1) for t in (parent, *children)] == [1, 1, 1]
    copies = pool.reserve([(parent, 1), (children[0], 1), (children[1], 1)])

    assert [copy.src for copy in copies] == [tail, tail]
    assert children[1].block_ids[1] == tail
    assert pool.num_blocks_held(7) == 4


def test_a_fork_can_share_no_more_than_what_is_computed() -> None:
    pool = BlockPool(num_blocks=2, tokens_per_block=4)
    parent = pool.create(family=0)
    pool.reserve([(parent, 3)])
    with pytest.raises(ValueError, match="cannot share 4 of 3 computed tokens"):
        pool.fork(parent, 4)


def test_integrity_check_finds_a_leak() -> None:
    pool = BlockPool(num_blocks=2, tokens_per_block=4)
    table = pool.create(family=0)
    pool.reserve([(table, 3)])
    table.block_ids.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity()
