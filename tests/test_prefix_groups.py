"""Which sequences share a prefix: the groups save as much as any partition could."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import takewhile

from hypothesis import example, given, settings
from hypothesis import strategies as st

from taper_trtllm.engines.prefix_groups import prefix_groups


@st.composite
def forked_tables(draw: st.DrawFn) -> list[array[int]]:
    """Block tables of up to 6 leaves of several trees: each starts with a prefix of another's."""
    fresh = iter(range(1, 1000))
    tables: list[list[int]] = []
    for _ in range(draw(st.integers(1, 6))):
        base = draw(st.sampled_from(tables)) if tables and draw(st.booleans()) else []
        kept = base[: draw(st.integers(0, len(base)))]
        tables.append(kept + [next(fresh) for _ in range(draw(st.integers(0, 4)))])
    return [array("i", table) for table in tables]


def common(tables: list[array[int]]) -> int:
    columns = zip(*tables, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [items[0], *part], *rest[i + 1 :]]


@settings(max_examples=400, deadline=None)
@given(tables=forked_tables(), cost=st.integers(0, 6))
@example(tables=[array("i", t) for t in ([1, 2], [1], [1], [1, 2], [1, 2])], cost=0)
def test_groups_share_their_prefix_and_save_the_most(tables: list[array[int]], cost: int):
    def saved(members: list[int]) -> int:
        return (len(members) - 1) * common([tables[i] for i in members]) - cost

    groups = prefix_groups(tables, cost)

    members = [i for group in groups for i in group.members]
    assert len(set(members)) == len(members)
    for group in groups:
        assert common([tables[i] for i in group.members]) == group.num_blocks
    best = max(sum(max(0, saved(p)) for p in parts) for parts in partitions([*range(len(tables))]))
    assert sum(saved(list(group.members)) for group in groups) == best
    assert all(saved(list(group.members)) > 0 for group in groups)
