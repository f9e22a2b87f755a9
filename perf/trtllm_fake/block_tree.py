"""The KV blocks of the fake: reference counts, the reuse tree, eviction.

Follows `WindowBlockManager` and `LRUEvictionPolicy` (batch_manager/kvCacheManager.cpp and
evictionPolicy.cpp @b35ac1b6) for one full-attention window and primary memory only:

* a block becomes findable when its request's last context chunk is launched, when a generated block
  is full, and at the end of a request (all but the last token, the partial tail too);
* a search covers all but the last prompt token; an exact full hit is shared, a partly filled or
  partly matching block is claimed if it is a leaf that nobody uses and copied otherwise;
* blocks without references keep their content until they are evicted: lowest retention priority
  first, least recently released first.

`cache_salt_id` and the LoRA id of a request make its *namespace*: part of every block's key.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

DEFAULT_PRIORITY = 35  # KvCacheRetentionConfig::kDefaultRetentionPriority
_TOKEN_BYTES = array("i").itemsize

Namespace = tuple[Hashable, Hashable]
"""(LoRA id, cache salt)."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Retention of the prompt tokens [start, end); to the end of the prompt if `end` is None."""

    start: int
    end: int | None
    priority: int
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """How long blocks of a request are worth keeping (`KvCacheRetentionConfig`).

    Attributes:
        ranges: Of prompt tokens, by ascending start, disjoint.
        decode_priority: Of blocks that are allocated while generating.
        decode_duration_s: After that time without use they fall back to the default priority.
    """

    ranges: tuple[TokenRange, ...] = ()
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration_s: float | None = None

    def per_block(
        self, num_blocks: int, tokens_per_block: int
    ) -> list[tuple[int | None, float | None]]:
        """(priority, duration) of each prompt block: that of the range its first token is in."""
        found: list[tuple[int | None, float | None]] = [(None, None)] * num_blocks
        for part in self.ranges:
            first = -(-part.start // tokens_per_block)
            last = num_blocks if part.end is None else -(-part.end // tokens_per_block)
            for index in range(first, min(last, num_blocks)):
                found[index] = (part.priority, part.duration_s)
        return found


DEFAULT_RETENTION = Retention()


class TokenBlocks:
    """The tokens of a request and the keys of its blocks.

    Args:
        token_ids: Prompt; generated tokens are appended to `tokens`.
        namespace: See the module.
        tokens_per_block: Block size.
    """

    __slots__ = ("_keys", "_size", "namespace", "tokens")

    def __init__(
        self, token_ids: Sequence[int], namespace: Namespace, tokens_per_block: int
    ) -> None:
        self.tokens = array("i", token_ids)
        self.namespace = namespace
        self._size = tokens_per_block
        self._keys: list[bytes] = []

    def full_keys(self, num_tokens: int) -> list[bytes]:
        """Keys of the full blocks among the first `num_tokens` tokens."""
        size, keys = self._size, self._keys
        num_full = num_tokens // size
        for index in range(len(keys), num_full):
            keys.append(self.tokens[index * size : (index + 1) * size].tobytes())
        return keys[:num_full]

    def all_keys(self, num_tokens: int) -> list[bytes]:
        """The same and the partial tail's, if there is one."""
        keys = self.full_keys(num_tokens)
        if num_tokens % self._size:
            keys.append(self.tokens[len(keys) * self._size : num_tokens].tobytes())
        return keys


@dataclass(slots=True, eq=False)
class Block:
    """A block; `key` is what it holds or held, `parent` is set while it can be found."""

    block_id: int
    num_refs: int = 0
    key: bytes | None = None
    parent: Block | None = None
    children: dict[bytes, Block] = field(default_factory=dict)
    priority: int = DEFAULT_PRIORITY
    duration_s: float | None = None
    expiry: int | None = None

    @property
    def is_leaf(self) -> bool:
        """Nothing that can be found depends on it."""
        return not self.children

    def detach(self) -> None:
        """Makes a leaf unfindable."""
        if self.parent is not None:
            assert self.key is not None
            self.parent.children.pop(self.key)
            self.parent = None


@dataclass(slots=True)
class BlockCounts:
    """Counters as `KvCacheStats` and the KV metrics of a request have them.

    Attributes:
        alloc_total: Blocks taken from the free ones.
        alloc_new: Those among them that never held anything.
        reused: Prompt blocks found, the partly matching ones included.
        missed: Prompt blocks not found.
    """

    alloc_total: int = 0
    alloc_new: int = 0
    reused: int = 0
    missed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt blocks that were found."""
        return self.reused / (self.reused + self.missed) if self.reused else 0.0

    def copy(self) -> BlockCounts:
        """A snapshot."""
        return BlockCounts(self.alloc_total, self.alloc_new, self.reused, self.missed)

    def since(self, before: BlockCounts) -> BlockCounts:
        """What was counted after a snapshot."""
        return BlockCounts(
            self.alloc_total - before.alloc_total,
            self.alloc_new - before.alloc_new,
            self.reused - before.reused,
            self.missed - before.missed,
        )


@dataclass(slots=True, eq=False)
class BlockSequence:
    """The blocks of one request.

    Attributes:
        text: Its tokens.
        retention: Its wishes.
        num_tokens: Tokens that there is room for.
        num_reused_tokens: Prompt tokens whose KV was there.
        counts: What adding it took.
    """

    text: TokenBlocks
    retention: Retention
    num_tokens: int
    blocks: list[Block] = field(default_factory=list)
    num_reused_tokens: int = 0
    counts: BlockCounts = field(default_factory=BlockCounts)


class FreeBlocks:
    """Blocks without references, in the order in which they are evicted.

    Args:
        blocks: All blocks; free at first.
        now_s: Clock of retention durations.
    """

    def __init__(self, blocks: Sequence[Block], now_s: Callable[[], float]) -> None:
        self._queues: dict[int, OrderedDict[int, Block]] = {
            DEFAULT_PRIORITY: OrderedDict((block.block_id, block) for block in blocks)
        }
        self._priority_of: dict[int, int] = {block.block_id: DEFAULT_PRIORITY for block in blocks}
        self._expiring: list[tuple[float, int, Block]] = []
        self._serial = itertools.count()
        self._now_s = now_s

    def __len__(self) -> int:
        return len(self._priority_of)

    def __contains__(self, block: Block) -> bool:
        return block.block_id in self._priority_of

    def first(self) -> Block:
        """The next to evict.

        Raises:
            RuntimeError: None is free.
        """
        for priority in sorted(self._queues):
            if self._queues[priority]:
                return next(iter(self._queues[priority].values()))
        raise RuntimeError("No free block found. This shouldn't happen!")

    def claim(self, block: Block, priority: int | None, duration_s: float | None) -> None:
        """Takes a block out, if it is in, and sets how it will be retained."""
        if self._remove(block):
            block.expiry = None
        if priority is not None:
            block.priority = priority
        block.duration_s = duration_s

    def release(self, block: Block) -> None:
        """Puts a block last of its priority."""
        self._append(block)
        if block.duration_s is not None and block.priority != DEFAULT_PRIORITY:
            block.expiry = next(self._serial)
            expires_s = self._now_s() + block.duration_s
            heapq.heappush(self._expiring, (expires_s, block.expiry, block))

    def refresh(self) -> None:
        """Gives the default priority to free blocks whose time is over."""
        while self._expiring and self._expiring[0][0] <= self._now_s():
            _, expiry, block = heapq.heappop(self._expiring)
            if block.expiry == expiry and self._remove(block):
                block.priority, block.expiry = DEFAULT_PRIORITY, None
                self._append(block)

    def _append(self, block: Block) -> None:
        self._queues.setdefault(block.priority, OrderedDict())[block.block_id] = block
        self._priority_of[block.block_id] = block.priority

    def _remove(self, block: Block) -> bool:
        priority = self._priority_of.pop(block.block_id, None)
        if priority is None:
            return False
        del self._queues[priority][block.block_id]
        return True


class BlockTree:
    """Allocates, finds and stores blocks.

    Args:
        num_blocks: Size of the pool.
        tokens_per_block: Block size.
        now_s: Clock of retention durations.
        enable_reuse: Store and find blocks at all.
        enable_partial_reuse: Use a block of which only the first tokens match.
        copy_on_partial_reuse: Also if it is in use or others depend on it, by copying it.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        now_s: Callable[[], float],
        *,
        enable_reuse: bool = True,
        enable_partial_reuse: bool = True,
        copy_on_partial_reuse: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_reuse = enable_reuse
        self.counts = BlockCounts()
        self._enable_partial = enable_partial_reuse
        self._copy_on_partial = copy_on_partial_reuse
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeBlocks(self._blocks, now_s)
        self._roots: dict[Namespace, Block] = {}
        self._sequences: set[BlockSequence] = set()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, whether or not they can be found."""
        return len(self._free)

    def blocks_to_completion(
        self, sequence: BlockSequence | None, prompt_len: int, max_new_tokens: int
    ) -> int:
        """Blocks that a request still takes at most (`getRemainingBlocksToCompletion`).

        For one that has none yet, all of its prompt counts: what it might reuse is not known.
        """
        total = -(-(prompt_len + max_new_tokens) // self.tokens_per_block)
        return total - (0 if sequence is None else len(sequence.blocks))

    def first_missing(self, text: TokenBlocks) -> tuple[Hashable, bytes] | None:
        """What the first full prompt block without KV would hold (`findNewContextBlock`).

        The whole prompt is looked at, and the salt is not in the answer, as in the original.
        """
        keys = text.full_keys(len(text.tokens))
        node = self._roots.get(text.namespace)
        for index, key in enumerate(keys):
            node = node.children.get(key) if node is not None else None
            if node is None:
                return text.namespace[0], b"".join(keys[: index + 1])
        return None

    # ---- the life of a sequence

    def add_sequence(self, text: TokenBlocks, retention: Retention) -> BlockSequence:
        """Finds or allocates the blocks of a prompt."""
        sequence = BlockSequence(text, retention, len(text.tokens))
        before = self.counts.copy()
        num_blocks = -(-len(text.tokens) // self.tokens_per_block)
        if self.enable_reuse:
            self._load_or_allocate(sequence, num_blocks)
        else:
            for _ in range(num_blocks):
                self._append_decode_block(sequence)
        sequence.counts = self.counts.since(before)
        self._sequences.add(sequence)
        return sequence

    def add_token(self, sequence: BlockSequence) -> None:
        """Makes room for one more token."""
        if sequence.num_tokens % self.tokens_per_block == 0:
            self._append_decode_block(sequence)
        sequence.num_tokens += 1

    def store_context(self, sequence: BlockSequence) -> None:
        """Makes the full prompt blocks findable; the last token does not count."""
        if self.enable_reuse:
            text = sequence.text
            self._store(text.namespace, text.full_keys(len(text.tokens) - 1), sequence.blocks)

    def store_new_block(self, sequence: BlockSequence) -> None:
        """Makes a generated block findable once it is full; called when a step is launched."""
        num_usable = len(sequence.text.tokens) - 1
        if not self.enable_reuse or num_usable % self.tokens_per_block:
            return
        keys, blocks = sequence.text.full_keys(num_usable), sequence.blocks
        if len(keys) >= 2 and len(blocks) >= len(keys):
            last, previous = blocks[len(keys) - 1], blocks[len(keys) - 2]
            if previous.parent is not None and last.parent is not None:
                return
        self._store(sequence.text.namespace, keys, blocks)

    def release(self, sequence: BlockSequence) -> None:
        """Ends a sequence: stores what can be found later, tail included, and frees the rest.

        Like the original, it takes all tokens but the last for computed, even if the request ends
        in the middle of its prompt.
        """
        self._sequences.remove(sequence)
        if self.enable_reuse:
            text = sequence.text
            self._store(text.namespace, text.all_keys(len(text.tokens) - 1), sequence.blocks)
        for block in reversed(sequence.blocks):
            block.num_refs -= 1
            if block.num_refs == 0:
                self._free.release(block)

    def refresh(self) -> None:
        """Ends retention whose time is over; called once per launched step."""
        self._free.refresh()

    # ---- finding and storing

    def _load_or_allocate(self, sequence: BlockSequence, num_blocks: int) -> None:
        text = sequence.text
        keys = text.all_keys(len(text.tokens) - 1)
        retention = sequence.retention.per_block(num_blocks, self.tokens_per_block)
        node = self._roots.get(text.namespace)
        for index in range(num_blocks):
            priority, duration_s = retention[index]
            key = keys[index] if index < len(keys) else None
            match, num_matched = self._match(node, key)
            if match is None:
                wanted = DEFAULT_PRIORITY if priority is None else priority
                block, node = self._allocate(wanted, duration_s), None
                block.key = key
                self.counts.missed += 1
            else:
                assert key is not None
                if num_matched < self.tokens_per_block:
                    block, node = self._take_part(match, key, priority, duration_s), None
                else:
                    self._free.claim(match, priority, duration_s)
                    block = node = match
                sequence.num_reused_tokens += num_matched
                self.counts.reused += 1
            block.num_refs += 1
            sequence.blocks.append(block)

    def _match(self, node: Block | None, key: bytes | None) -> tuple[Block | None, int]:
        """The block below `node` that has the longest part of `key`, and tokens that match."""
        if node is None or key is None:
            return None, 0
        exact = node.children.get(key)
        if exact is not None:
            return exact, len(key) // _TOKEN_BYTES
        best, best_matched = None, 0
        if self._enable_partial:
            for other, block in node.children.items():
                if self._copy_on_partial or (block.num_refs == 0 and block.is_leaf):
                    num_matched = _common_tokens(other, key)
                    if num_matched > best_matched:
                        best, best_matched = block, num_matched
        return best, best_matched

    def _take_part(
        self, match: Block, key: bytes, priority: int | None, duration_s: float | None
    ) -> Block:
        """A private block with the matching tokens: the block itself or a copy."""
        if match.num_refs == 0 and match.is_leaf:
            match.detach()
            self._free.claim(match, priority, duration_s)
            return match
        copy = self._allocate(match.priority, match.duration_s)
        copy.key = key
        return copy

    def _store(self, namespace: Namespace, keys: Sequence[bytes], blocks: Sequence[Block]) -> None:
        """Walks down the keys; from the first that is missing on, inserts the request's blocks."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Block(-1)
        found = True
        for key, block in zip(keys, blocks, strict=False):
            match = node.children.get(key) if found else None
            if match is None:
                found = False
                block.key, block.parent = key, node
                node.children[key] = block
                match = block
            node = match

    # ---- allocating

    def _append_decode_block(self, sequence: BlockSequence) -> None:
        retention = sequence.retention
        block = self._allocate(retention.decode_priority, retention.decode_duration_s)
        block.num_refs += 1
        sequence.blocks.append(block)

    def _allocate(self, priority: int, duration_s: float | None) -> Block:
        """Evicts the next free block and everything that is found through it."""
        block = self._free.first()
        self.counts.alloc_total += 1
        if block.key is None:
            self.counts.alloc_new += 1
        _detach_with_children(block)
        self._free.claim(block, priority, duration_s)
        return block

    # ---- integrity

    def check_integrity(self) -> None:
        """Recounts everything from the sequences and the tree.

        Raises:
            AssertionError: A block is lost, counted wrongly, or linked inconsistently.
        """
        refs = [0] * self.num_blocks
        for sequence in self._sequences:
            assert len({block.block_id for block in sequence.blocks}) == len(sequence.blocks)
            for block in sequence.blocks:
                refs[block.block_id] += 1
        assert refs == [block.num_refs for block in self._blocks], "reference counts differ"
        for block in self._blocks:
            assert (block in self._free) == (block.num_refs == 0), f"block {block.block_id} is lost"
            if block.parent is not None:
                assert block.key is not None and block.parent.children[block.key] is block
            assert all(child.parent is block for child in block.children.values())
        num_referenced = sum(count > 0 for count in refs)
        assert self.num_free_blocks + num_referenced == self.num_blocks, "a block is lost"

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose content can be found."""
        return sum(block.num_refs == 0 and block.parent is not None for block in self._blocks)


def _common_tokens(first: bytes, second: bytes) -> int:
    """Leading tokens that two keys have in common."""
    if first[:_TOKEN_BYTES] != second[:_TOKEN_BYTES]:
        return 0
    size = min(len(first), len(second))
    differing = int.from_bytes(first[:size], "little") ^ int.from_bytes(second[:size], "little")
    if not differing:
        return size // _TOKEN_BYTES
    return ((differing & -differing).bit_length() - 1) // (8 * _TOKEN_BYTES)


def _detach_with_children(block: Block) -> None:
    """Makes a block and all that is found through it unfindable."""
    block.detach()
    below = list(block.children.values())
    block.children = {}
    while below:
        child = below.pop()
        below.extend(child.children.values())
        child.parent, child.children = None, {}
