"""Who may take how many KV blocks in a step.

Every running request has a reservation: its worst-case *serial* footprint, or a share of it
(`kv_reserve_fraction`). Unless blocks are lent, sum(max(reserved, held)) over all requests does not
exceed the pool: a request below its reservation finds a free block, and one above it can come back
below by dropping its own extras, among them ended branches that wait to be merged. With whole
footprints reserved that is always so; the protected baseline always runs, and nothing deadlocks.

With a share, a baseline can outgrow its reservation. It is then lent blocks that others have
reserved and not taken yet. While some are lent, no extra gets one, no request starts, and a
baseline takes any block that is free; when none is, extras of others are dropped, then the newest
requests suspended. The oldest one always gets on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taper_trtllm.batch import IntArray
from taper_trtllm.request import (
    ParallelStage,
    SerialStage,
    fork_depth,
    max_context_tokens,
)


def serial_footprint_blocks(
    num_prompt_tokens: int,
    program: Sequence[SerialStage | ParallelStage],
    tokens_per_block: int,
    written_depth: int = 0,
) -> int:
    """Blocks that a request holds at most when its branches run one after another.

    Its distinct tokens never exceed prompt plus everything appended. At each nesting level three
    blocks come on top: the one in which the parent ends, which the children copy; and of the
    finished branch 0, which the join takes over, the copy and the one in which it ends.
    `written_depth` is how deep the model may nest forks that it writes itself.
    """
    total = num_prompt_tokens + max_context_tokens(program)
    depth = max(fork_depth(program), written_depth)
    return -(-total // tokens_per_block) + max(1, 3 * depth)


class KvBudget:
    """Blocks that are left to hand out in one step, among R requests.

    Args:
        num_blocks: Blocks in the pool.
        reserved: [R] blocks reserved for each request.
        held: [R] blocks that it holds.

    Attributes:
        num_free_blocks: Blocks that no request holds.
        num_unreserved_blocks: Blocks that no request has reserved or holds; negative by the number
            of reserved ones that are lent.
    """

    def __init__(self, num_blocks: int, reserved: IntArray, held: IntArray) -> None:
        self._reserved = reserved
        self._held = held
        self.num_free_blocks = num_blocks - int(held.sum())
        self.num_unreserved_blocks = num_blocks - int(np.maximum(reserved, held).sum())

    @property
    def headroom(self) -> IntArray:
        """[R] blocks reserved for each request that it does not hold; none while some are lent."""
        if self.num_unreserved_blocks < 0:
            return np.zeros_like(self._held)
        return np.maximum(self._reserved - self._held, 0)

    def fits(self, index: int, num_blocks: int) -> bool:
        """Whether a request may take so many blocks for anything."""
        headroom = max(0, int(self._reserved[index] - self._held[index]))
        is_lent = self.num_unreserved_blocks < 0
        return num_blocks <= (0 if is_lent else headroom + self.num_unreserved_blocks)

    def fits_baseline(self, index: int, num_blocks: int) -> bool:
        """Whether its protected branch may take them: while some are lent, any that are free."""
        if self.num_unreserved_blocks < 0:
            return num_blocks <= self.num_free_blocks
        return self.fits(index, num_blocks)

    def take(self, index: int, num_blocks: int) -> None:
        """Takes blocks that fit; returns them if the number is negative."""
        reserved, held = int(self._reserved[index]), int(self._held[index])
        self._held[index] = held + num_blocks
        self.num_free_blocks -= num_blocks
        self.num_unreserved_blocks += max(reserved, held) - max(reserved, held + num_blocks)

    def take_all(self, num_blocks: IntArray) -> bool:
        """Takes [R] blocks for baselines if they fit together; False if not: nothing is taken."""
        beyond = np.maximum(num_blocks - np.maximum(self._reserved - self._held, 0), 0)
        if self.num_unreserved_blocks < 0:
            fits = num_blocks.sum() <= self.num_free_blocks
        else:
            fits = beyond.sum() <= self.num_unreserved_blocks
        if fits:
            self._held = self._held + num_blocks
            self.num_free_blocks -= int(num_blocks.sum())
            self.num_unreserved_blocks -= int(beyond.sum())
        return bool(fits)

    def close(self, index: int) -> None:
        """A request is gone: it holds nothing, and nothing is reserved for it."""
        self.num_free_blocks += int(self._held[index])
        self.num_unreserved_blocks += int(max(self._reserved[index], self._held[index]))
        self._reserved[index] = self._held[index] = 0
