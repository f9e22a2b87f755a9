"""Which sequences of a step begin with the same KV blocks. Pure bookkeeping.

Branches fork from branches, so the tables form trees. A sequence is in one group at most: with its
nearest relatives it shares the longest prefix, with more of them a shorter one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
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
    # Families share nothing: each is cut by itself.
    ends = [i for i, num_blocks in enumerate(common, 1) if num_blocks == 0]
    best = [
        max(_cuts(first, end, common, min_saved_blocks).values(), key=lambda cut: cut.saved)
        for first, end in pairwise([0, *ends, len(order)])
    ]
    return [
        PrefixGroup(tuple(order[i] for i in members), num_blocks)
        for cut in best
        for members, num_blocks in cut.groups
    ]


def _common_blocks(a: array[int], b: array[int]) -> int:
    num = min(len(a), len(b))
    if not num or a[0] != b[0]:  # of other families, nearly always
        return 0
    differ = np.frombuffer(a, np.int32, num) != np.frombuffer(b, np.int32, num)
    first = int(differ.argmax())
    return first if differ[first] else num


@dataclass(frozen=True, slots=True)
class _Cut:
    """Sorted tables, divided: blocks saved, members and blocks of groups, and who is in none."""

    saved: int
    groups: tuple[tuple[tuple[int, ...], int], ...]
    alone: tuple[int, ...]

    def beside(self, other: _Cut) -> _Cut:
        """Both."""
        return _Cut(self.saved + other.saved, self.groups + other.groups, self.alone + other.alone)

    def grouped(self, num_blocks: int, cost: int) -> _Cut:
        """Those that are in no group are one."""
        saved = self.saved + (len(self.alone) - 1) * num_blocks - cost
        return _Cut(saved, (*self.groups, (self.alone, num_blocks)), ())


def _cuts(first: int, end: int, common: Sequence[int], cost: int) -> dict[int, _Cut]:
    """Of sorted tables [first, end), the best cut that leaves so many of them in no group.

    Which ones they are does not matter to the groups above, where all share the same prefix.
    """
    nobody = _Cut(0, (), tuple(range(first, end)))
    if end - first < 2:
        return {len(nobody.alone): nobody}
    depth = min(common[first : end - 1])
    cuts = {0: _Cut(0, (), ())}
    start = first
    for at in range(first + 1, end + 1):
        if at == end or common[at - 1] == depth:
            below = _cuts(start, at, common, cost)
            cuts = _best_of(a.beside(b) for a in cuts.values() for b in below.values())
            start = at
    grouped = [cut.grouped(depth, cost) for cut in cuts.values() if len(cut.alone) > 1]
    return _best_of([nobody, *cuts.values(), *grouped])


def _best_of(cuts: Iterable[_Cut]) -> dict[int, _Cut]:
    best: dict[int, _Cut] = {}
    for cut in cuts:
        num_alone = len(cut.alone)
        if num_alone not in best or best[num_alone].saved < cut.saved:
            best[num_alone] = cut
    return best
