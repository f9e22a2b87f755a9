"""KV tensors in blocks, and attention over them.

A group of sequences is gathered into one workspace, small enough to be still in the cache when
attention reads it: gathering is then nearly free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from taper_trtllm.engines.kv_cache import BlockCopy
from taper_trtllm.engines.qwen3 import Qwen3Config
from taper_trtllm.engines.step_batch import AttentionGroup, Segment, StepBatch, StepBatchBuilder

# Gathered bytes of a group: what stays in a CPU core's cache; elsewhere, what keeps a GPU busy.
_GROUP_BYTES = {"cpu": 2 << 20}
_DEFAULT_GROUP_BYTES = 256 << 20


class PagedAttention:
    """Implements `qwen3.Attention` on a pool of KV blocks.

    `begin_step` says what the following `attend` calls are about.

    Args:
        config: Shape of the model.
        num_blocks: Blocks of the pool; the padding block 0 comes on top.
        tokens_per_block: Tokens in one block.
        max_seq_len: Longest context.
        dtype: Of the KV.
        device: Of the KV.
    """

    def __init__(
        self,
        config: Qwen3Config,
        num_blocks: int,
        tokens_per_block: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_heads, self._head_dim = config.num_attention_heads, config.head_dim
        self._num_kv_heads = config.num_key_value_heads
        block = (tokens_per_block, 2, self._num_kv_heads, self._head_dim)
        # Zeroed: what attention masks must still be finite.
        self._pool = torch.zeros(
            (config.num_hidden_layers, num_blocks + 1, *block), dtype=dtype, device=device
        )
        self._layers = list(self._pool.unbind())
        self._layer_slots = [layer.flatten(0, 1).flatten(1, 2) for layer in self._layers]
        token_bytes = self._pool[0, 0, 0].nbytes
        group_tokens = _GROUP_BYTES.get(device.type, _DEFAULT_GROUP_BYTES) // token_bytes
        workspace_blocks = -(-max(group_tokens, max_seq_len) // tokens_per_block)
        self._workspace = torch.empty((workspace_blocks, *block), dtype=dtype, device=device)
        self._builder = StepBatchBuilder(
            tokens_per_block,
            group_tokens,
            max_seq_len,
            self._num_heads // self._num_kv_heads,
            dtype,
            device,
        )

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole blocks, all layers, before anything of the step is written."""
        if copies:
            self._pool[:, [c.dst for c in copies]] = self._pool[:, [c.src for c in copies]]

    def begin_step(self, segments: Sequence[Segment]) -> StepBatch:
        """Lays out the step that the next `attend` calls work on."""
        self._batch = self._builder.build(segments)
        return self._batch

    def attend(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """Writes the new KV, then attends; shapes as in `qwen3.Attention`."""
        self._layer_slots[layer].index_copy_(0, self._batch.slots, keys_values)
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for group in self._batch.groups:
            self._attend_group(layer, group, queries[group.rows], output[group.rows])
        return output.flatten(1)

    def _attend_group(
        self, layer: int, group: AttentionGroup, queries: torch.Tensor, output: torch.Tensor
    ) -> None:
        n, heads, head_dim = group.num_segments, self._num_kv_heads, self._head_dim
        gathered = self._workspace[: len(group.block_ids)]
        torch.index_select(self._layers[layer], 0, group.block_ids, out=gathered)
        keys_values = gathered.view(n, -1, 2, heads, head_dim)[:, : group.context]
        keys, values = keys_values.transpose(1, 3).unbind(2)  # [n, heads, context, head_dim]
        # The query heads that share a KV head become rows of one query: no KV head is repeated.
        split = (n, group.num_queries, heads, -1, head_dim)
        merged = (n, heads, -1, head_dim)
        attended = F.scaled_dot_product_attention(
            queries.view(split).transpose(1, 2).reshape(merged), keys, values, attn_mask=group.mask
        )
        by_query = (n, heads, group.num_queries, -1, head_dim)
        output.view(split).copy_(attended.reshape(by_query).transpose(1, 2))
