"""Paged attention that reads a prefix once for all sequences that share it, on a CPU.

Their queries are stacked and attend to the prefix together; what each attends to behind it is done
as ever. The two parts are merged by the log-sum-exp of their logits, so the result is the same but
for rounding.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from taper_trtllm.engines.kv_tensors import KvTensors
from taper_trtllm.engines.paged_attention import PagedAttention, PlacedGroup
from taper_trtllm.engines.prefix_groups import PrefixGroup, prefix_groups
from taper_trtllm.engines.qwen3 import Qwen3Config
from taper_trtllm.engines.step_batch import Segment, StepBatch

# Attending to a prefix apart, and merging, costs about as much as reading so many tokens again.
_MIN_SAVED_TOKENS = 1024

# What `scaled_dot_product_attention` runs on a CPU; returns the log-sum-exp too.
_attend_with_log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A shared prefix.

    Attributes:
        rows: [members] rows of the batch.
        block_ids: [blocks].
        gathered: [blocks, tokens_per_block, 2, kv heads, head_dim], of the workspace.
        keys: [1, kv heads, tokens, head_dim], a view of it.
        values: The same.
    """

    rows: torch.Tensor
    block_ids: torch.Tensor
    gathered: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class CascadeAttention(PagedAttention):
    """`PagedAttention`, with shared prefixes read once.

    Args:
        config: Shape of the model.
        kv: The blocks.
        max_seq_len: Longest context.
    """

    def __init__(self, config: Qwen3Config, kv: KvTensors, max_seq_len: int) -> None:
        super().__init__(config, kv, max_seq_len)
        self._tokens_per_block = kv.block_shape[0]

    def begin_step(self, segments: Sequence[Segment]) -> StepBatch:
        """See `PagedAttention`."""
        size = self._tokens_per_block
        ordered = sorted(segments, key=lambda s: s.end - s.start > 1)  # single tokens first
        tables = [_shareable(s, size) for s in ordered if s.end - s.start == 1]
        groups = prefix_groups(tables, -(-_MIN_SAVED_TOKENS // size))
        for group in groups:
            for i in group.members:
                ordered[i] = _behind(ordered[i], group.num_blocks, size)
        batch = super().begin_step(ordered)
        row_of = {id(segment): row for row, segment in enumerate(batch.segments[: len(tables)])}
        self._prefixes = [
            self._place_prefix(group, [row_of[id(ordered[i])] for i in group.members], tables)
            for group in groups
        ]
        return batch

    def _place_prefix(
        self, group: PrefixGroup, rows: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> _Prefix:
        block_ids = torch.tensor(tables[group.members[0]][: group.num_blocks])
        gathered = self._workspace[: group.num_blocks]
        keys, values = gathered.flatten(0, 1).transpose(0, 2).unbind(1)
        return _Prefix(torch.tensor(rows), block_ids, gathered, keys[None], values[None])

    def attend(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """See `PagedAttention`."""
        if not self._prefixes:
            return super().attend(layer, queries, keys_values)
        self._layer_slots[layer].index_copy_(0, self._slots, keys_values)
        split = queries.view(len(queries), self._num_kv_heads, -1, self._head_dim)
        single = [placed for placed in self._groups if placed.group.num_queries == 1]
        attended, log_sum = _cat(self._attend_single(layer, placed, split) for placed in single)
        shared, shared_log_sum = _cat(self._attend_prefix(layer, p, split) for p in self._prefixes)
        rows = torch.cat([prefix.rows for prefix in self._prefixes])
        own_share = (log_sum[rows] - shared_log_sum).sigmoid_().unsqueeze(-1).to(attended.dtype)
        attended[rows] = torch.lerp(shared, attended[rows], own_share)
        longer = [self._attend_group(layer, p, split) for p in self._groups[len(single) :]]
        return torch.cat([attended.flatten(1), *longer])

    def _attend_single(
        self, layer: int, placed: PlacedGroup, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, kv heads, shared heads, head_dim] and log-sum-exp of a group of single tokens."""
        group = placed.group
        torch.index_select(self._layers[layer], 0, group.block_ids, out=placed.gathered)
        attended, log_sum = _attend_with_log_sum(
            queries[group.rows], placed.keys, placed.values, attn_mask=group.mask
        )
        return attended, log_sum

    def _attend_prefix(
        self, layer: int, prefix: _Prefix, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a prefix, for its members."""
        torch.index_select(self._layers[layer], 0, prefix.block_ids, out=prefix.gathered)
        stacked = queries[prefix.rows].transpose(0, 1)  # [kv heads, members, shared heads, d]
        attended, log_sum = _attend_with_log_sum(
            stacked.flatten(1, 2)[None], prefix.keys, prefix.values
        )
        attended = attended.view(stacked.shape).transpose(0, 1)
        return attended, log_sum.view(stacked.shape[:-1]).transpose(0, 1)


def _shareable(segment: Segment, tokens_per_block: int) -> array[int]:
    """Full blocks of its context, if it sees all of them."""
    return segment.block_ids[: 0 if segment.hidden else segment.start // tokens_per_block]


def _behind(segment: Segment, num_blocks: int, tokens_per_block: int) -> Segment:
    """The segment without the first blocks of its context."""
    num_tokens = num_blocks * tokens_per_block
    return replace(
        segment,
        block_ids=segment.block_ids[num_blocks:],
        start=segment.start - num_tokens,
        end=segment.end - num_tokens,
        shift=segment.shift - num_tokens,
    )


def _cat(
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    attended, log_sums = zip(*parts, strict=True)
    return torch.cat(attended), torch.cat(log_sums)
