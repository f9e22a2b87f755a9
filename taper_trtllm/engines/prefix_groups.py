"""Which sequences of a step begin with the same KV blocks. Pure bookkeeping.

Branches fork from branches, so the tables form trees. A sequence is in one group at most: of a
family, either all of it shares its common prefix, or its subtrees share their longer ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences with a common prefix.

    Attributes:
        members: Indices of at least two sequences.
        num_blocks: Blocks that all their tables begin with.
    """

    members: tuple[int, ...]
    num_blocks: int


def prefix_groups(tables: Sequence[array[int]], min_saved_blocks: int) -> list[PrefixGroup]:
    """The groups that save the most reads.

    Args:
        tables: Block tables, of computed blocks alone: what they have in common may be shared.
        min_saved_blocks: Blocks that a group must save to be worth its own calls.
    """
    order = sorted(range(len(tables)), key=tables.__getitem__)
    common = [_common_blocks(tables[a], tables[b]) for a, b in pairwise(order)]
    _, groups = _best(0, len(order), common, min_saved_blocks)
    return [PrefixGroup(tuple(order[first:end]), num_blocks) for first, end, num_blocks in groups]


def _common_blocks(a: array[int], b: array[int]) -> int:
    num = min(len(a), len(b))
    if not num or a[0] != b[0]:  # of other families, nearly always
        return 0
    differ = np.frombuffer(a, np.int32, num) != np.frombuffer(b, np.int32, num)
    first = int(differ.argmax())
    return first if differ[first] else num


_Groups = list[tuple[int, int, int]]


def _best(first: int, end: int, common: Sequence[int], cost: int) -> tuple[int, _Groups]:
    """Blocks saved and (first, end, blocks) of the best groups of sorted tables [first, end)."""
    if end - first < 2:
        return 0, []
    depth = min(common[first : end - 1])
    saved, groups, start = 0, [], first
    for at in range(first + 1, end + 1):
        if at == end or common[at - 1] == depth:
            more, inside = _best(start, at, common, cost)
            saved, start = saved + more, at
            groups += inside
    as_one = (end - first - 1) * depth - cost
    if as_one > saved:
        return as_one, [(first, end, depth)]
    return saved, groups
