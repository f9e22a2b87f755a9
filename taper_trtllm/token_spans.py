"""Where tokens stand, and what they see, in a sequence whose branches were merged. Pure.

Branches run at overlapping positions and do not see each other. A join that takes their KV over as
it is leaves tokens whose position is not their index, and which do not see all before them:

```
index     0 1 2 3 4 | 5 6 7 8 | 9 10 11 | 12 13 ...
          prefix    | first   | second  | behind the join
position  0 1 2 3 4 | 5 6 7 8 | 5  6  7 |  9 10 ...
```
Whoever computes such tokens anew must know both. An ordinary sequence has no spans at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens, up to the next span.

    Attributes:
        start: Index of the first one.
        shift: Index minus position.
        hidden: Ranges of indices before `start` that the tokens do not see, ascending.
    """

    start: int = 0
    shift: int = 0
    hidden: tuple[tuple[int, int], ...] = ()


Spans = tuple[Span, ...]
"""All spans of a sequence, ascending from 0; empty if its tokens stand and see as usual."""


def cut(spans: Spans, start: int, end: int) -> Iterator[tuple[int, int, Span]]:
    """The parts of the tokens [start, end), each with its span."""
    spans = spans or (Span(),)
    stops = [*(span.start for span in spans[1:]), end]
    for span, stop in zip(spans, stops, strict=True):
        first, last = max(start, span.start), min(stop, end)
        if first < last:
            yield first, last, span


def last_shift(spans: Spans) -> int:
    """Index minus position of tokens that are appended."""
    return spans[-1].shift if spans else 0


def merged(spans: Spans, num_prefix: int, branches: Sequence[tuple[Spans, int]]) -> Spans:
    """The spans of a sequence behind which its branches stand in order.

    What follows stands behind the rightmost position of any of them and sees all.

    Args:
        spans: Of the sequence.
        num_prefix: Its tokens.
        branches: Of each branch, spans and tokens, those of the sequence included.
    """
    result = [*(spans or (Span(),))]
    at, rightmost = num_prefix, num_prefix - last_shift(spans)
    for own, num_tokens in branches:
        moved = at - num_prefix
        siblings = ((num_prefix, at),) if moved else ()
        for start, _, span in cut(own, num_prefix, num_tokens):
            inside = tuple((first + moved, last + moved) for first, last in span.hidden)
            result.append(Span(start + moved, span.shift + moved, (*siblings, *inside)))
        rightmost = max(rightmost, num_tokens - last_shift(own))
        at += num_tokens - num_prefix
    result.append(Span(at, at - rightmost))
    return tuple(result)
