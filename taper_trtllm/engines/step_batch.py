"""The flat batch of one step: which token stands in which row, and what is attended together.

Sequences are cut into segments, segments of similar length form a group, and a group's tokens are
consecutive rows. Decode is the segment of one token; chunks and decode make one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from taper_trtllm.engines.kv_cache import PADDING_BLOCK, BlockTable

# Queries of a segment. Bounds the mask, and how much of a chunk attends to its own future in vain.
_MAX_QUERIES = 64
# A group costs about as much in calls as gathering and attending an eighth of the workspace.
_PADDING_SHARE = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence, computed together.

    Attributes:
        sequence_id: The sequence.
        token_ids: The tokens.
        table: KV of the sequence, with room for the tokens.
        end: Position after the last token: the context that it sees.
        sample: The last token's logits are needed.
    """

    sequence_id: int
    token_ids: list[int]
    table: BlockTable
    end: int
    sample: bool

    @property
    def num_queries(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


def split_chunk(
    sequence_id: int, token_ids: list[int], table: BlockTable, start: int, sample: bool
) -> Iterator[Segment]:
    """Cuts the tokens from position `start` on into segments; `sample` is for the last token."""
    for first in range(0, len(token_ids), _MAX_QUERIES):
        part = token_ids[first : first + _MAX_QUERIES]
        is_last = first + len(part) == len(token_ids)
        yield Segment(sequence_id, part, table, start + first + len(part), sample and is_last)


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
        positions: [tokens] position of each token in its sequence.
        slots: [tokens] where its KV goes: block x tokens_per_block + offset.
        groups: Cover all rows, in order.
        sampled_rows: Rows whose logits are needed.
        sampled_ids: Their sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[AttentionGroup, ...]
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
        self._dtype = dtype
        self._device = device
        self._columns = torch.arange(max_seq_len, device=device)

    def build(self, segments: Sequence[Segment]) -> StepBatch:
        """Orders, groups and lays out the segments of a step; at least one."""
        ordered = sorted(segments, key=lambda s: (s.num_queries, -s.end))
        groups, positions, slots = [], [], []
        row = 0
        for members in self._cut(ordered):
            group, group_positions, group_slots = self._build_group(members, row)
            groups.append(group)
            positions.append(group_positions)
            slots.append(group_slots)
            row = group.rows.stop
        last_rows = np.cumsum([s.num_queries for s in ordered]) - 1
        sampled = [i for i, s in enumerate(ordered) if s.sample]
        return StepBatch(
            token_ids=self._tensor(np.array([t for s in ordered for t in s.token_ids])),
            positions=self._tensor(np.concatenate(positions)),
            slots=self._tensor(np.concatenate(slots)),
            groups=tuple(groups),
            sampled_rows=self._tensor(last_rows[sampled]),
            sampled_ids=[ordered[i].sequence_id for i in sampled],
        )

    def _cut(self, ordered: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
        """Cuts where the workspace is full, or where padding would cost more than a group."""
        first = padding = 0
        for i, segment in enumerate(ordered):
            longest = ordered[first]
            padding += (longest.end - segment.end) * segment.num_queries
            if i > first and (
                segment.num_queries != longest.num_queries
                or (i + 1 - first) * self._padded(longest.end) > self._workspace_tokens
                or padding * _PADDING_SHARE > self._workspace_tokens
            ):
                yield ordered[first:i]
                first, padding = i, 0
        yield ordered[first:]

    def _build_group(
        self, members: Sequence[Segment], first_row: int
    ) -> tuple[AttentionGroup, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The group, and positions and slots of its tokens."""
        n, num_queries, context = len(members), members[0].num_queries, members[0].end
        num_blocks = self._padded(context) // self._tokens_per_block
        block_ids = np.full((n, num_blocks), PADDING_BLOCK, dtype=np.int32)
        for i, segment in enumerate(members):
            ids = segment.table.block_ids[:num_blocks]
            block_ids[i, : len(ids)] = ids
        ends = np.array([segment.end for segment in members])[:, None]
        positions = ends + np.arange(-num_queries, 0)
        blocks, offsets = np.divmod(positions, self._tokens_per_block)
        slots = np.take_along_axis(block_ids, blocks, axis=1) * self._tokens_per_block + offsets
        group = AttentionGroup(
            rows=slice(first_row, first_row + n * num_queries),
            num_segments=n,
            num_queries=num_queries,
            context=context,
            block_ids=self._tensor(block_ids.ravel()),
            mask=self._mask(positions, context),
        )
        return group, positions.ravel(), slots.ravel()

    def _mask(self, positions: npt.NDArray[np.int64], context: int) -> torch.Tensor | None:
        """Hides what comes after each query, padding included."""
        num_queries = positions.shape[1]
        if num_queries == 1 and positions.min() == context - 1:
            return None
        limits = positions
        if num_queries > 1:
            limits = positions.repeat(self._queries_per_kv_head, axis=1)
        hidden = self._columns[:context] > self._tensor(limits)[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, -torch.inf)

    def _padded(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_block) * self._tokens_per_block

    def _tensor(self, values: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
