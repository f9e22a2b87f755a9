"""Who holds which KV block: paging, reference counts, sharing, copy-on-write.

Pure bookkeeping. The pool hands out block numbers and says which blocks must be copied before a
write; the tensors live elsewhere. Blocks are shared inside a family only.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from taper_trtllm.engines.base import OutOfBlocksError

PADDING_BLOCK = 0
"""Never handed out: pads block tables, and batches, whose padding rows write to it."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """The KV of one sequence.

    Only a `BlockPool` changes a table.

    Attributes:
        family: The request that the blocks are counted for.
        block_ids: One id for every `tokens_per_block` tokens, the last one maybe partly filled.
        num_tokens: Tokens that have KV.
        num_tokens_with_room: Tokens up to which `make_room` has taken blocks; 0 without room.
        num_tokens_writable: Tokens up to which a write takes no block and copies none, if its last
            write found that out; 0 if it is not known.
    """

    family: int
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    num_tokens: int = 0
    num_tokens_with_room: int = 0
    num_tokens_writable: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block whose content must be copied before the step writes."""

    src: int
    dst: int


class BlockPool:
    """Blocks 1..num_blocks with reference counts.

    Args:
        num_blocks: Blocks that tables can hold; `PADDING_BLOCK` comes on top.
        tokens_per_block: Tokens in one block.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._free = list(range(num_blocks, 0, -1))  # a stack: low ids first
        self._ref_counts = [0] * (num_blocks + 1)
        self._held: Counter[int] = Counter()  # distinct blocks by family
        self._tables: set[BlockTable] = set()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no table holds."""
        return len(self._free)

    @property
    def num_tables(self) -> int:
        """Tables that were not released."""
        return len(self._tables)

    def num_blocks_held(self, family: int) -> int:
        """Distinct blocks in the tables of a family."""
        return self._held[family]

    # ------------------------------------------------------------------ tables

    def create(self, family: int) -> BlockTable:
        """An empty table."""
        table = BlockTable(family)
        self._tables.add(table)
        return table

    def fork(self, parent: BlockTable, num_tokens: int) -> BlockTable:
        """A table that shares the first `num_tokens` tokens of `parent`; takes no block.

        Raises:
            ValueError: The parent has no KV for so many tokens.
        """
        if not 0 <= num_tokens <= parent.num_tokens:
            raise ValueError(f"cannot share {num_tokens} of {parent.num_tokens} computed tokens")
        if parent.num_tokens_with_room:
            raise ValueError("a table with room cannot be forked")
        block_ids = parent.block_ids[: self._blocks_for(num_tokens)]
        for block in block_ids:
            self._ref_counts[block] += 1
        parent.num_tokens_writable = 0  # its tail may be shared now
        table = BlockTable(parent.family, block_ids, num_tokens)
        self._tables.add(table)
        return table

    def release(self, table: BlockTable) -> None:
        """Drops a table and its references."""
        self._tables.remove(table)
        self._drop_from(table, 0)

    def drop_unshared(self, table: BlockTable) -> None:
        """Frees what only this table holds.

        Sharing starts at the front, so what remains is a prefix of the table that others hold too.
        """
        keep = 0
        while keep < len(table.block_ids) and self._ref_counts[table.block_ids[keep]] > 1:
            keep += 1
        self._drop_from(table, keep)
        table.num_tokens = min(table.num_tokens, keep * self.tokens_per_block)
        table.num_tokens_with_room = 0

    def append(
        self,
        table: BlockTable,
        num_tokens: int,
        parts: Sequence[tuple[BlockTable, int, int]],
        released: Sequence[BlockTable],
    ) -> tuple[list[int], list[int]]:
        """Cuts a table to `num_tokens` and puts parts of other tables behind; all or nothing.

        Args:
            table: Grows.
            num_tokens: Of its tokens, those that stay.
            parts: Other tables, with the range of tokens that is appended.
            released: Tables that are dropped with it; those of `parts` at least.

        Returns:
            Slots (block x tokens_per_block + offset) to copy from and to. All must be read before
            any is written.

        Raises:
            ValueError: The tokens that stay end in a block that others hold too.
            OutOfBlocksError: Too few free blocks; not if `released` alone hold their parts.
        """
        sources = [slot for part in parts for slot in self._slots(*part)]
        end = num_tokens + len(sources)
        if sources:
            full, rest = divmod(num_tokens, self.tokens_per_block)
            if rest and self._ref_counts[table.block_ids[full]] > 1:
                raise ValueError("a table that others follow ends in a block that is shared")
            holders = Counter(block for other in released for block in other.block_ids)
            num_freed = sum(self._ref_counts[block] == n for block, n in holders.items())
            needed = self._blocks_for(end) - self._blocks_for(num_tokens)
            if needed > len(self._free) + num_freed:
                raise OutOfBlocksError(f"{needed} KV blocks are needed to append")
        self._drop_from(table, self._blocks_for(num_tokens))
        for other in released:
            self.release(other)
        while len(table.block_ids) < self._blocks_for(end):
            table.block_ids.append(self._allocate(table.family))
        table.num_tokens = end
        return sources, self._slots(table, num_tokens, end)

    def _slots(self, table: BlockTable, start: int, stop: int) -> list[int]:
        size = self.tokens_per_block
        return [table.block_ids[i // size] * size + i % size for i in range(start, stop)]

    # ------------------------------------------------------------------ writing

    def num_blocks_needed(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that writing the next `num_tokens` tokens takes, a copy of the tail included."""
        if num_tokens == 0:
            return 0
        new = self._blocks_for(table.num_tokens + num_tokens) - len(table.block_ids)
        return max(0, new) + (self._shared_tail(table) is not None)

    def reserve(self, writes: Sequence[tuple[BlockTable, int]]) -> list[BlockCopy]:
        """Makes room for the next tokens of several tables, all or nothing.

        A tail block that others hold too is replaced by a copy; its last holder keeps it.

        Args:
            writes: Tables, each at most once, with the number of tokens to add; at least one.

        Returns:
            Copies to make before anything is written.

        Raises:
            OutOfBlocksError: Too few free blocks; nothing was changed.
        """
        # Nearly every decode writes to a tail block of its own.
        tables = [(t, n) for t, n in writes if t.num_tokens + n > t.num_tokens_writable]
        tails = [self._shared_tail(table) for table, _ in tables]
        needed = self._total_needed(tables, tails)
        if needed > len(self._free):
            raise OutOfBlocksError(f"the step needs {needed} KV blocks, {len(self._free)} are free")
        copies = []
        for (table, num_tokens), tail in zip(tables, tails, strict=True):
            if tail is not None and self._ref_counts[tail] > 1:
                table.block_ids[-1] = self._allocate(table.family)
                self._unreference(tail, table.family)
                copies.append(BlockCopy(tail, table.block_ids[-1]))
            while len(table.block_ids) * self.tokens_per_block < table.num_tokens + num_tokens:
                table.block_ids.append(self._allocate(table.family))
            table.num_tokens_writable = len(table.block_ids) * self.tokens_per_block
        for table, num_tokens in writes:
            table.num_tokens += num_tokens
        return copies

    def make_room(self, table: BlockTable, num_tokens: int) -> None:
        """Takes the blocks of the next tokens now; `reserve` then takes none for them.

        A table with room must not be forked.

        Raises:
            OutOfBlocksError: Too few free blocks; nothing was changed.
        """
        num_computed = table.num_tokens
        self.reserve([(table, num_tokens)])
        table.num_tokens_with_room = table.num_tokens
        table.num_tokens = num_computed

    def give_back_room(self, table: BlockTable) -> None:
        """Frees the blocks beyond the tokens that have KV."""
        self._drop_from(table, self._blocks_for(table.num_tokens))
        table.num_tokens_with_room = 0

    def _total_needed(
        self, writes: Sequence[tuple[BlockTable, int]], tails: Sequence[int | None]
    ) -> int:
        """Exact over the step: if all holders of a tail write, one of them needs no copy."""
        new = sum(max(0, self._blocks_for(t.num_tokens + n) - len(t.block_ids)) for t, n in writes)
        writers = Counter(tail for tail in tails if tail is not None)
        return new + sum(min(n, self._ref_counts[tail] - 1) for tail, n in writers.items())

    def _shared_tail(self, table: BlockTable) -> int | None:
        """The partly filled last block, if other tables hold it too."""
        full, rest = divmod(table.num_tokens, self.tokens_per_block)
        if rest == 0:
            return None
        tail = table.block_ids[full]
        return tail if self._ref_counts[tail] > 1 else None

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    # ------------------------------------------------------------------ references

    def _allocate(self, family: int) -> int:
        block = self._free.pop()
        self._ref_counts[block] = 1
        self._held[family] += 1
        return block

    def _unreference(self, block: int, family: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)
            self._held[family] -= 1
            if self._held[family] == 0:
                del self._held[family]

    def _drop_from(self, table: BlockTable, first: int) -> None:
        table.num_tokens_writable = 0
        for block in reversed(table.block_ids[first:]):
            self._unreference(block, table.family)
        del table.block_ids[first:]

    # ------------------------------------------------------------------ integrity

    def check_integrity(self) -> None:
        """Recounts everything from the tables.

        Raises:
            AssertionError: A count, the free list or a table is inconsistent.
        """
        references: Counter[int] = Counter()
        families: dict[int, int] = {}
        for table in self._tables:
            ids = table.block_ids
            num_tokens = max(table.num_tokens, table.num_tokens_with_room)
            assert len(ids) == self._blocks_for(num_tokens), "table and tokens differ"
            assert len(set(ids)) == len(ids), "a table holds a block twice"
            if table.num_tokens_writable:
                assert table.num_tokens_writable == len(ids) * self.tokens_per_block
                assert self._ref_counts[ids[-1]] == 1, "a writable tail is shared"
            references.update(ids)
            for block in ids:
                owner = families.setdefault(block, table.family)
                assert owner == table.family, f"block {block} is shared between families"
        assert PADDING_BLOCK not in references, "the padding block is in a table"
        counted = [references[block] for block in range(self.num_blocks + 1)]
        assert counted == self._ref_counts, "reference counts differ from the tables"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(references), "a held block is free"
        assert len(free) + len(references) == self.num_blocks, "a block is lost"
        assert Counter(families.values()) == self._held, "blocks held by family are miscounted"
