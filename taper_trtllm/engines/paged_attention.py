"""Attention over KV in blocks, for flat batches.

A group of sequences is gathered into one workspace, small enough to be still in the cache when
attention reads it: gathering is then nearly free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from taper_trtllm.engines.kv_tensors import KvTensors
from taper_trtllm.engines.qwen3 import Qwen3Config
from taper_trtllm.engines.step_batch import AttentionGroup, Segment, StepBatch, StepBatchBuilder

_GROUP_BYTES = 5 << 20  # gathered bytes of a group: what stays in a core's cache


@dataclass(frozen=True, slots=True)
class PlacedGroup:
    """A group and its views of the workspace, which are the same for all layers.

    Attributes:
        gathered: [blocks, tokens_per_block, 2, kv heads, head_dim].
        keys: [n, kv heads, context, head_dim].
        values: The same.
    """

    group: AttentionGroup
    gathered: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class PagedAttention:
    """Implements `qwen3.Attention` on KV blocks.

    `begin_step` says what the following `attend` calls are about.

    Args:
        config: Shape of the model.
        kv: The blocks.
        max_seq_len: Longest context.
    """

    def __init__(self, config: Qwen3Config, kv: KvTensors, max_seq_len: int) -> None:
        self._head_dim = config.head_dim
        self._num_kv_heads = config.num_key_value_heads
        self._layers, self._layer_slots = kv.layers, kv.layer_slots
        dtype, device = kv.layers[0].dtype, kv.layers[0].device
        tokens_per_block = kv.block_shape[0]
        group_tokens = _GROUP_BYTES // kv.token_bytes
        workspace_blocks = -(-max(group_tokens, max_seq_len) // tokens_per_block)
        shape = (workspace_blocks, *kv.block_shape)
        self._workspace = torch.empty(shape, dtype=dtype, device=device)
        self._builder = StepBatchBuilder(
            tokens_per_block,
            group_tokens,
            max_seq_len,
            config.num_attention_heads // self._num_kv_heads,
            dtype,
            device,
        )

    def begin_step(self, segments: Sequence[Segment]) -> StepBatch:
        """Lays out the step that the next `attend` calls work on."""
        batch = self._builder.build(segments)
        self._slots = batch.slots
        self._groups = [self._place(group) for group in batch.groups]
        return batch

    def _place(self, group: AttentionGroup) -> PlacedGroup:
        gathered = self._workspace[: len(group.block_ids)]
        by_segment = gathered.view(group.num_segments, -1, *gathered.shape[2:])
        keys, values = by_segment[:, : group.context].transpose(1, 3).unbind(2)
        return PlacedGroup(group, gathered, keys, values)

    def attend(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """Writes the new KV, then attends; shapes as in `qwen3.Attention`."""
        self._layer_slots[layer].index_copy_(0, self._slots, keys_values)
        # The query heads that share a KV head become rows of one query: no KV head is repeated.
        split = queries.view(len(queries), self._num_kv_heads, -1, self._head_dim)
        return torch.cat([self._attend_group(layer, placed, split) for placed in self._groups])

    def _attend_group(self, layer: int, placed: PlacedGroup, queries: torch.Tensor) -> torch.Tensor:
        """[rows of the group, heads x head_dim]."""
        group = placed.group
        torch.index_select(self._layers[layer], 0, group.block_ids, out=placed.gathered)
        rows = queries[group.rows]
        if group.num_queries > 1:
            rows = _merge_queries(rows, group.num_segments)
        attended = F.scaled_dot_product_attention(
            rows, placed.keys, placed.values, attn_mask=group.mask
        )
        if group.num_queries > 1:
            attended = _split_queries(attended, group.num_queries)
        return attended.flatten(1)


def _merge_queries(rows: torch.Tensor, num_segments: int) -> torch.Tensor:
    """[n x queries, heads, shared, d] to [n, heads, queries x shared, d]."""
    return rows.view(num_segments, -1, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)


def _split_queries(attended: torch.Tensor, num_queries: int) -> torch.Tensor:
    """The inverse of `_merge_queries`."""
    n, heads, _, head_dim = attended.shape
    by_query = attended.reshape(n, heads, num_queries, -1, head_dim)
    return by_query.transpose(1, 2).flatten(0, 1)
