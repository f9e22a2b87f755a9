"""The flat batch of one step: which token stands in which row, and what is attended together.

Sequences are cut into segments, segments of similar length form a group, and a group's tokens are
consecutive rows. Decode is the segment of one token; chunks and decode make one batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from taper_trtllm.engines.kv_cache import PADDING_BLOCK
from taper_trtllm.token_spans import Spans, cut

# Queries of a segment. Bounds the mask, and how much of a chunk attends to its own future in vain.
_MAX_QUERIES = 64
# A group costs about as much in calls as gathering and attending an eighth of the workspace.
_PADDING_SHARE = 8


@dataclass(slots=True)  # not frozen: hundreds are made in every step
class Segment:
    """Consecutive tokens of one sequence, computed together.

    Attributes:
        sequence_id: The sequence.
        token_ids: The tokens.
        block_ids: Block table of the sequence, with room for the tokens.
        start: Position of the first token.
        end: Position after the last one: the context that it sees.
        sample: The last token's logits are needed.
        shift: Index minus position of the tokens; `start` and `end` are indices.
        hidden: Ranges of the context that the tokens do not see.
    """

    sequence_id: int
    token_ids: list[int]
    block_ids: array[int]
    start: int
    end: int
    sample: bool
    shift: int = 0
    hidden: tuple[tuple[int, int], ...] = ()


def split_chunk(
    sequence_id: int,
    token_ids: list[int],
    block_ids: array[int],
    start: int,
    sample: bool,
    spans: Spans = (),
) -> Iterator[Segment]:
    """Cuts the tokens from index `start` on into segments; `sample` is for the last token."""
    end = start + len(token_ids)
    for from_, to, span in cut(spans, start, end):
        for first in range(from_, to, _MAX_QUERIES):
            stop = min(first + _MAX_QUERIES, to)
            part = token_ids[first - start : stop - start]
            is_last = sample and stop == end
            yield Segment(
                sequence_id, part, block_ids, first, stop, is_last, span.shift, span.hidden
            )


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Segments with equally many tokens, padded to one context length.

    Attributes:
        rows: Rows of the group's tokens in the batch.
        num_segments: n.
        num_queries: Tokens of each segment.
        context: Longest context.
        block_ids: [n x blocks] block tables, padded.
        mask: Additive, [n, 1, 1 or queries x query heads per KV head, context]; None if every
            query sees all of it.
    """

    rows: slice
    num_segments: int
    num_queries: int
    context: int
    block_ids: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything the model needs for one step.

    Attributes:
        token_ids: [tokens].
        positions: [tokens] where each token stands in its sequence.
        slots: [tokens] where its KV goes: block x tokens_per_block + offset.
        groups: Cover all rows, in order.
        segments: In the order of their rows; those of one token come first.
        sampled_rows: Rows whose logits are needed.
        sampled_ids: Their sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    segments: list[Segment]
    sampled_rows: torch.Tensor
    sampled_ids: list[int]


class StepBatchBuilder:
    """Builds batches for one KV layout.

    Args:
        tokens_per_block: KV block size.
        workspace_tokens: Tokens, padding included, that a group may have; a longer sequence is a
            group of its own.
        max_seq_len: Longest context.
        queries_per_kv_head: Query heads that share a KV head.
        dtype: Of masks.
        device: Of all tensors.
    """

    def __init__(
        self,
        tokens_per_block: int,
        workspace_tokens: int,
        max_seq_len: int,
        queries_per_kv_head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tokens_per_block = tokens_per_block
        self._workspace_tokens = workspace_tokens
        self._queries_per_kv_head = queries_per_kv_head
        self._device = device
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._minus_infinity = self._zero - torch.inf
        self._columns = torch.arange(max_seq_len, device=device)

    def build(self, segments: Sequence[Segment]) -> StepBatch:
        """Orders, groups and lays out the segments of a step; at least one."""
        ordered = sorted(segments, key=lambda s: (s.end - s.start, -s.end))
        groups, first_row = [], 0
        for members in self._cut(ordered):
            groups.append(self._build_group(members, first_row))
            first_row = groups[-1].rows.stop
        last_rows = np.cumsum([s.end - s.start for s in ordered]) - 1
        sampled = [i for i, s in enumerate(ordered) if s.sample]
        size = self._tokens_per_block
        return StepBatch(
            token_ids=self._tensor([token for s in ordered for token in s.token_ids]),
            positions=self._tensor([i - s.shift for s in ordered for i in range(s.start, s.end)]),
            slots=self._tensor(
                [
                    s.block_ids[p // size] * size + p % size
                    for s in ordered
                    for p in range(s.start, s.end)
                ]
            ),
            groups=tuple(groups),
            segments=ordered,
            sampled_rows=self._tensor(last_rows[sampled]),
            sampled_ids=[ordered[i].sequence_id for i in sampled],
        )

    def _cut(self, ordered: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
        """Cuts where the workspace is full, or where padding would cost more than a group."""
        first = padding = capacity = num_queries = longest = 0
        max_padding = self._workspace_tokens // _PADDING_SHARE
        for i, segment in enumerate(ordered):
            padding += (longest - segment.end) * num_queries
            if (
                i - first >= capacity
                or padding > max_padding
                or segment.end - segment.start != num_queries
            ):
                if i:
                    yield ordered[first:i]
                first, padding = i, 0
                num_queries, longest = segment.end - segment.start, segment.end
                capacity = max(1, self._workspace_tokens // self._padded(longest))
        yield ordered[first:]

    def _build_group(self, members: Sequence[Segment], first_row: int) -> AttentionGroup:
        n, context = len(members), members[0].end
        num_queries = context - members[0].start
        num_blocks = self._padded(context) // self._tokens_per_block
        block_ids = np.full((n, num_blocks), PADDING_BLOCK, dtype=np.int32)
        for i, segment in enumerate(members):
            ids = segment.block_ids[:num_blocks]
            block_ids[i, : len(ids)] = ids
        return AttentionGroup(
            rows=slice(first_row, first_row + n * num_queries),
            num_segments=n,
            num_queries=num_queries,
            context=context,
            block_ids=self._tensor(block_ids.ravel()),
            mask=self._mask(members),
        )

    def _mask(self, members: Sequence[Segment]) -> torch.Tensor | None:
        """Hides what comes after each query, padding included, and what it is not to see."""
        num_queries, context = members[0].end - members[0].start, members[0].end
        is_hiding = any(segment.hidden for segment in members)
        if num_queries == 1 and members[-1].end == context and not is_hiding:
            return None
        limits = np.array([[segment.start] for segment in members])
        if num_queries > 1:
            limits = limits + np.arange(num_queries).repeat(self._queries_per_kv_head)
        hidden = self._columns[:context] > self._tensor(limits)[:, None, :, None]
        for row, segment in enumerate(members if is_hiding else ()):
            for first, last in segment.hidden:
                hidden[row, ..., first:last] = True
        return torch.where(hidden, self._minus_infinity, self._zero)

    def _padded(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_block) * self._tokens_per_block

    def _tensor(self, values: npt.ArrayLike) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).to(self._device)
