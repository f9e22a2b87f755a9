"""Decode attention in fixed shapes, in plain torch: what the GPU kernels are to compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taper_trtllm.engines.prefix_tiles import SharedPrefixes


class ReferenceAttention:
    """Implements `bucket_runner.DecodeAttention`.

    Args:
        rows_per_tile: See there.

    Attributes:
        widths: Rows of each call.
        num_shared: Largest number of rows that read a prefix through the table of their first.
    """

    def __init__(self, rows_per_tile: int = 3) -> None:
        self.rows_per_tile = rows_per_tile
        self.widths: set[int] = set()
        self.num_shared = 0

    def attend(
        self,
        queries: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        prefixes: SharedPrefixes | None,
    ) -> torch.Tensor:
        self.widths.add(len(queries))
        owners, prefix_lens = list(range(len(queries))), [0] * len(queries)
        if prefixes is not None:
            prefix_lens = prefixes.prefix_lens.tolist()
            tiles = prefixes.tiles.tolist()
            assert sum(num for _, num, _ in tiles) == len(queries)
            for first, num, prefix_len in tiles:
                assert num <= self.rows_per_tile
                owners[first : first + num] = [first] * num
                assert prefix_lens[first : first + num] == [prefix_len] * num
                self.num_shared = max(self.num_shared, num if prefix_len else 0)
        outputs = []
        for row, context in enumerate(context_lens.tolist()):
            before, size = prefix_lens[row], layer_kv.shape[1]
            assert before % size == 0 and before < context
            own = _read(layer_kv, block_tables[row, : -(-context // size)])[before:context]
            shared = _read(layer_kv, block_tables[owners[row], : before // size])
            keys, values = torch.cat([shared, own]).transpose(0, 2).unbind(1)
            query = queries[row][None, :, None]
            outputs.append(
                F.scaled_dot_product_attention(query, keys[None], values[None], enable_gqa=True)
            )
        return torch.cat(outputs).squeeze(2)


def _read(layer_kv: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """[tokens, 2, kv heads, head_dim] of whole blocks."""
    return layer_kv.index_select(0, block_ids).flatten(0, 1)
