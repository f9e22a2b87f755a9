"""The tensors behind the KV blocks; `kv_cache` says who holds which block."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from taper_trtllm.engines.qwen3 import Qwen3Config

_BlockIds = Sequence[int] | torch.Tensor


class KvTensors:
    """Keys and values of all layers, in blocks.

    Args:
        config: Shape of the model.
        num_blocks: Blocks that sequences can use; the padding block 0 comes on top.
        tokens_per_block: Tokens in one block.
        dtype: Of the KV.
        device: Of the KV.

    Attributes:
        block_shape: (tokens_per_block, 2, kv heads, head_dim); keys first.
        layers: Of each layer, [num_blocks + 1, *block_shape].
        layer_slots: The same as [blocks x tokens_per_block, 2 x kv heads, head_dim].
    """

    def __init__(
        self,
        config: Qwen3Config,
        num_blocks: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_shape = (tokens_per_block, 2, config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, num_blocks + 1, *self.block_shape)
        self._blocks = _zeros(shape, dtype, device)
        self.layers = list(self._blocks.unbind())
        self.layer_slots = [layer.flatten(0, 1).flatten(1, 2) for layer in self.layers]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in one layer."""
        return self._blocks[0, 0, 0].nbytes

    def copy_blocks(self, sources: _BlockIds, targets: _BlockIds) -> None:
        """Copies whole blocks, all layers."""
        self._blocks[:, targets] = self._blocks[:, sources]

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the KV of tokens, all layers; every source is read before a target is written."""
        read, written = torch.tensor([sources, targets], device=self._blocks.device).unbind()
        for slots in self.layer_slots:  # one by one: the copy in between is small
            slots.index_copy_(0, written, slots[read])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because what attention masks must still be finite.

    On a CPU the memory asks for huge pages: blocks are read in no order, and with small pages every
    read begins with misses of the address translation (a tenth of the attention's time).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
