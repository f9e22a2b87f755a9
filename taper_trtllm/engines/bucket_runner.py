"""Runs steps in fixed shapes, for a GPU: decode padded to a bucket and, alone, as a CUDA graph.

The host waits once in a step, for the drawn tokens. Steps with chunks run without a graph; their
decode rows and chunks go through the layers together, so that weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from taper_trtllm.engines.bucket_batch import BucketBatch, BucketBatchBuilder, ChunkRows
from taper_trtllm.engines.kv_cache import BlockCopy
from taper_trtllm.engines.kv_tensors import KvTensors
from taper_trtllm.engines.paged_engine import ChunkWork
from taper_trtllm.engines.paged_sequences import EngineSequence
from taper_trtllm.engines.prefix_tiles import SharedPrefixes
from taper_trtllm.engines.qwen3 import Qwen3Model
from taper_trtllm.engines.sampling import draw_into, greedy_tokens

_Tensors = tuple[torch.Tensor, torch.Tensor]


class DecodeAttention(Protocol):
    """Attention of one query token per row; everything that it reads is on the device.

    Attributes:
        rows_per_tile: Rows that may share a prefix in one tile.
    """

    rows_per_tile: int

    def attend(
        self,
        queries: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        prefixes: SharedPrefixes | None,
    ) -> torch.Tensor:
        """[rows, heads, head_dim], arguments as in `triton_decode`."""


class BucketRunner:
    """Computes steps.

    Args:
        model: Weights.
        kv: Blocks.
        builder: Lays out batches.
        attention: For decode rows.
        buckets: Decode widths that get a CUDA graph, now; none: every step runs without.
    """

    def __init__(
        self,
        model: Qwen3Model,
        kv: KvTensors,
        builder: BucketBatchBuilder,
        attention: DecodeAttention,
        buckets: Sequence[int],
    ) -> None:
        self._model, self._kv, self._builder = model, kv, builder
        self._attention = attention
        device = kv.layers[0].device
        is_cuda = device.type == "cuda"
        # Threads begin on the first GPU, and kernels are launched on the thread's.
        self._on_device = torch.cuda.device(device) if is_cuda else nullcontext()
        self._graphs: dict[int, _Graph] = {}
        if buckets:
            with torch.inference_mode(), self._on_device:
                self._capture(buckets)

    def _capture(self, buckets: Sequence[int]) -> None:
        memory = torch.cuda.graph_pool_handle()
        device = self._kv.layers[0].device
        logits = torch.empty((max(buckets), self._model.config.vocab_size), device=device)
        for width in sorted(buckets, reverse=True):  # the others fit into the memory of the widest
            forward = partial(self._forward, self._builder.padding(width), logits[:width])
            self._graphs[width] = _Graph(forward, memory)

    def run(
        self,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
        on_logits: Callable[[Sequence[int], torch.Tensor], None] | None = None,
    ) -> list[int]:
        """Computes a step; arguments as in `PagedEngine._compute`.

        `on_logits` gets the place of each row in the result, and the [n, vocab] logits.

        Returns:
            The drawn tokens: of the sequences in decode, then of the chunks that draw.
        """
        with torch.inference_mode(), self._on_device:
            batch = self._builder.build(decode, chunks, copies)
            logits, tokens = self._compute(batch)
            if on_logits is not None:
                places = [*batch.order, *range(len(decode), len(tokens))]
                on_logits(places, logits[: len(tokens)])
            # The host waits here, and nowhere else.
            drawn: list[int] = tokens.tolist()
            if not drawn and tokens.is_cuda:
                torch.cuda.synchronize()  # nothing was copied
        in_order = dict(zip(batch.order, drawn, strict=False))
        return [in_order[i] for i in range(len(decode))] + drawn[len(decode) :]

    def _compute(self, batch: BucketBatch) -> _Tensors:
        """Logits, perhaps with rows of padding behind; [drawn tokens]. On the device."""
        if batch.copies is not None:
            self._kv.copy_blocks(*batch.copies.long())
        graph = None if batch.chunks else self._graphs.get(batch.width)
        logits, tokens = graph.replay() if graph else self._forward(batch)
        if batch.draws is not None:
            draw_into(tokens, logits, batch.draws)
        return logits, tokens if batch.chunks else tokens[: len(batch.order)]  # without padding

    def _forward(self, batch: BucketBatch, out: torch.Tensor | None = None) -> _Tensors:
        """Logits of the rows that need them, and the best token of each."""
        hidden = self._model.forward(
            batch.token_ids, batch.positions, _BatchAttention(batch, self._kv, self._attention)
        )
        if batch.logit_rows is not None:
            hidden = hidden.index_select(0, batch.logit_rows)
        logits = self._model.logits(hidden, out)
        return logits, greedy_tokens(logits)


class _Graph:
    """A step of decode alone at one width, captured."""

    def __init__(self, forward: Callable[[], _Tensors], memory: Any) -> None:
        forward()  # compiles and allocates what a capture must not
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._results = forward()

    def replay(self) -> _Tensors:
        """Computes again what is in the buffer; the same tensors every time."""
        self._graph.replay()
        return self._results


class _BatchAttention:
    """Implements `qwen3.Attention` for one batch."""

    def __init__(self, batch: BucketBatch, kv: KvTensors, decode: DecodeAttention) -> None:
        self._batch, self._kv, self._decode = batch, kv, decode
        self._slots = batch.slots.long()

    def attend(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """See `qwen3.Attention`."""
        self._kv.layer_slots[layer].index_copy_(0, self._slots, keys_values)
        batch, parts = self._batch, []
        if batch.width:
            attended = self._decode.attend(
                queries[: batch.width],
                self._kv.layers[layer],
                batch.block_tables,
                batch.context_lens,
                batch.prefixes,
            )
            parts.append(attended.flatten(1))
        parts += [self._attend_chunk(layer, chunk, queries) for chunk in batch.chunks]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_chunk(self, layer: int, chunk: ChunkRows, queries: torch.Tensor) -> torch.Tensor:
        """[tokens of the chunk, heads x head_dim]."""
        gathered = self._kv.layers[layer].index_select(0, chunk.block_ids).flatten(0, 1)
        seen = _without(gathered[: chunk.context], chunk.hidden)
        keys, values = seen.transpose(0, 2).unbind(1)
        rows = queries[chunk.rows].transpose(0, 1)
        mask = causal_lower_right(rows.shape[1], len(seen))
        attended = F.scaled_dot_product_attention(
            rows[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(1)


def _without(context: torch.Tensor, hidden: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The context [tokens, ...] without the ranges that are hidden."""
    if not hidden:
        return context
    starts = [0, *(end for _, end in hidden)]
    ends = [*(start for start, _ in hidden), len(context)]
    return torch.cat([context[start:end] for start, end in zip(starts, ends, strict=True)])
