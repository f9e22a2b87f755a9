"""Who may take how many KV blocks in a step.

Every running request has a reservation: its worst-case *serial* footprint. Over all requests,
sum(max(reserved, held)) never exceeds the pool, so a request below its reservation always finds a
free block, and one above it can come back below by dropping its own extras. Hence the protected
baseline always runs and nothing deadlocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from taper_trtllm.request import (
    ParallelStage,
    SerialStage,
    fork_depth,
    max_context_tokens,
)


def serial_footprint_blocks(
    num_prompt_tokens: int, program: Sequence[SerialStage | ParallelStage], tokens_per_block: int
) -> int:
    """Blocks that a request holds at most when its branches run one after another.

    Its distinct tokens never exceed prompt plus everything appended. At each nesting level the
    running branch and the finished branch 0, which the join takes over, end in a block of their
    own.
    """
    total = num_prompt_tokens + max_context_tokens(program)
    return -(-total // tokens_per_block) + 2 * fork_depth(program) + 1


class KvBudget:
    """Blocks that are left to hand out in one step.

    Attributes:
        num_unreserved_blocks: Blocks that no request has reserved or holds.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_unreserved_blocks = num_blocks
        self._reserved: dict[int, int] = {}
        self._held: dict[int, int] = {}

    def open(self, family: int, num_reserved: int, num_held: int) -> None:
        """Accounts for a request that runs."""
        self._reserved[family] = num_reserved
        self._held[family] = num_held
        self.num_unreserved_blocks -= max(num_reserved, num_held)

    def close(self, family: int) -> None:
        """A request holds nothing any more."""
        self.num_unreserved_blocks += max(self._reserved.pop(family), self._held.pop(family))

    def headroom(self, family: int) -> int:
        """Blocks reserved for a request that it does not hold."""
        return max(0, self._reserved[family] - self._held[family])

    def fits(self, family: int, num_blocks: int) -> bool:
        """Whether a request may take so many blocks."""
        return num_blocks <= self.headroom(family) + self.num_unreserved_blocks

    def take(self, family: int, num_blocks: int) -> None:
        """Takes blocks that fit."""
        self._move(family, num_blocks)

    def give_back(self, family: int, num_blocks: int) -> None:
        """Returns blocks that a request has freed."""
        self._move(family, -num_blocks)

    def _move(self, family: int, num_blocks: int) -> None:
        reserved, held = self._reserved[family], self._held[family]
        self._held[family] = held + num_blocks
        self.num_unreserved_blocks += max(reserved, held) - max(reserved, held + num_blocks)
