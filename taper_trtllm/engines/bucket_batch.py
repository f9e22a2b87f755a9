"""The batch of a step in fixed shapes: decode rows padded to a bucket, then the tokens of chunks.

Everything that changes from step to step is in one buffer, which is sent to the device in one copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from taper_trtllm.engines.kv_cache import PADDING_BLOCK, BlockCopy
from taper_trtllm.engines.paged_engine import ChunkWork
from taper_trtllm.engines.paged_sequences import EngineSequence
from taper_trtllm.engines.prefix_groups import prefix_groups
from taper_trtllm.engines.prefix_tiles import SharedPrefixes, tile_prefixes
from taper_trtllm.engines.sampling import Draws, plan_draws
from taper_trtllm.engines.step_buffer import StepBuffer, aligned
from taper_trtllm.token_spans import cut, last_shift

# A shared prefix costs no call of its own on a GPU; shorter ones are not worth a second part.
_MIN_SAVED_TOKENS = 256
_Int32Array = npt.NDArray[np.int32]
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def width_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Widths that decode is padded to."""
    more = range(_BUCKETS[-1] + 256, max_batch_size, 256)
    return (*(w for w in (*_BUCKETS, *more) if w < max_batch_size), max_batch_size)


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Tokens of a chunk in the batch that see the same of what stands before them.

    Attributes:
        rows: The tokens.
        block_ids: int32 [blocks] of the context.
        context: Tokens of the context, up to the last of them.
        hidden: Ranges of the context that they do not see; all before the first of them.
    """

    rows: slice
    block_ids: torch.Tensor
    context: int
    hidden: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BucketBatch:
    """A step; tensors are on the device, int32, and valid once the buffer is sent.

    Attributes:
        width: Decode rows, padding included; they come first. 0: none.
        order: The decode sequence of each row, without padding.
        token_ids: [rows].
        positions: [rows] where each token stands in its sequence.
        slots: [rows] where its KV goes: block x tokens_per_block + offset.
        block_tables: [width, blocks of the longest sequence].
        context_lens: [width], 1 for padding.
        prefixes: What the decode rows share; None where attention does not ask.
        chunks: Behind the decode rows; one chunk is several where what it sees changes.
        logit_rows: Rows whose logits are needed: decode rows in order, then the last rows of
            chunks that draw. None for all rows.
        draws: Of these, those that are not greedy, by their place among them; None for none.
        copies: [2, n] blocks to copy and where to; None for none.
    """

    width: int
    order: Sequence[int]
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    prefixes: SharedPrefixes | None
    chunks: Sequence[ChunkRows]
    logit_rows: torch.Tensor | None
    draws: Draws | None
    copies: torch.Tensor | None


class BucketBatchBuilder:
    """Builds batches for one KV layout.

    Args:
        buckets: Decode widths, ascending.
        tokens_per_block: KV block size.
        max_seq_len: Longest context.
        vocab_size: Tokens of the model.
        rows_per_tile: Rows that share a prefix in one tile; None: prefixes are not shared.
        device: Of all tensors.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        tokens_per_block: int,
        max_seq_len: int,
        vocab_size: int,
        rows_per_tile: int | None,
        device: torch.device,
    ) -> None:
        self._buckets = np.array(buckets)
        self._tokens_per_block = tokens_per_block
        self._max_blocks = -(-max_seq_len // tokens_per_block)
        self._vocab_size = vocab_size
        self._rows_per_tile = rows_per_tile
        self._device = device
        capacity = self._capacity(buckets[-1], buckets[-1], ())
        # CUDA graphs read the first: it never moves. Steps with chunks have one that grows.
        self._decode_buffer = StepBuffer(capacity, device)
        self._mixed_buffer = StepBuffer(capacity, device)

    def build(
        self,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> BucketBatch:
        """Lays out a step and sends it. Steps of decode alone have fixed addresses by width."""
        width = int(self._buckets[np.searchsorted(self._buckets, len(decode))]) if decode else 0
        return self._build(width, decode, chunks, copies)

    def padding(self, width: int) -> BucketBatch:
        """A step of padding alone."""
        return self._build(width, (), (), ())

    def _build(
        self,
        width: int,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> BucketBatch:
        num_rows = width + sum(chunk.num_tokens for chunk in chunks)
        buffer = self._buffer(width, num_rows, chunks, copies)
        flat, (token_ids, positions, slots) = buffer.take(3, num_rows)
        lens, context_lens = buffer.take(width)
        tables, block_tables = buffer.take(width, self._max_blocks)
        order, prefixes = self._share(decode, width, buffer)
        rows = [decode[i] for i in order]
        flat[:, len(rows) : width] = 0  # padding: token 0, first slot of block 0, which it sees
        lens[len(rows) :], tables[len(rows) :, 0] = 1, PADDING_BLOCK
        for row, sequence in enumerate(rows):
            ids, last = sequence.table.block_ids, len(sequence.tokens) - 1
            position = last - last_shift(sequence.spans)
            flat[:, row] = sequence.tokens[last], position, self._slot(ids, last)
            lens[row], tables[row, : len(ids)] = last + 1, ids
        chunk_rows = [*self._lay_out_chunks(width, chunks, flat, buffer)]
        ends = [*accumulate((chunk.num_tokens for chunk in chunks), initial=width)][1:]
        drawing = [(c, end) for c, end in zip(chunks, ends, strict=True) if c.sample]
        sampled = [*rows, *(chunk.sequence for chunk, _ in drawing)]
        draws = plan_draws(
            [s.params for s in sampled],
            [len(s.tokens) for s in sampled],
            self._vocab_size,
            buffer.put,
        )
        last_rows = [*range(len(rows)), *(end - 1 for _, end in drawing)]
        batch = BucketBatch(
            width=width,
            order=order,
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            block_tables=block_tables,
            context_lens=context_lens,
            prefixes=prefixes,
            chunks=chunk_rows,
            logit_rows=buffer.put(np.array(last_rows, dtype=np.int32)) if chunks else None,
            draws=draws,
            copies=buffer.put(_pairs(copies)) if copies else None,
        )
        buffer.send()
        return batch

    def _buffer(
        self, width: int, num_rows: int, chunks: Sequence[ChunkWork], copies: Sequence[BlockCopy]
    ) -> StepBuffer:
        if not chunks:
            buffer = self._decode_buffer
        else:
            needed = self._capacity(width, num_rows, chunks) + 2 * len(copies)
            if needed > self._mixed_buffer.capacity:
                self._mixed_buffer = StepBuffer(2 * needed, self._device)
            buffer = self._mixed_buffer
        buffer.clear()
        return buffer

    def _capacity(self, width: int, num_rows: int, chunks: Sequence[ChunkWork]) -> int:
        """Ints that a step takes at most."""
        num_drawing = width + len(chunks)
        arrays = (3 * num_rows, width, width * self._max_blocks, 3 * width, width)
        draws = (num_drawing, num_drawing, 5 * num_drawing, 2 * num_drawing)
        tables = [self._max_blocks] * len(chunks)
        return sum(map(aligned, (*arrays, *draws, *tables)))

    def _share(
        self, decode: Sequence[EngineSequence], width: int, buffer: StepBuffer
    ) -> tuple[Sequence[int], SharedPrefixes | None]:
        """The order of decode rows, and what they share: its groups come first."""
        if self._rows_per_tile is None or not width:
            return range(len(decode)), None
        size = self._tokens_per_block
        tables = [s.table.block_ids[: (len(s.tokens) - 1) // size] for s in decode]
        groups = prefix_groups(tables, -(-_MIN_SAVED_TOKENS // size))
        grouped = [i for group in groups for i in group.members]
        order = [*grouped, *sorted(set(range(len(decode))).difference(grouped))]
        sizes = [(len(group.members), group.num_blocks * size) for group in groups]
        tiles, prefix_lens = tile_prefixes(sizes, width, self._rows_per_tile)
        return order, SharedPrefixes(buffer.put(tiles), buffer.put(prefix_lens))

    def _lay_out_chunks(
        self, width: int, chunks: Sequence[ChunkWork], flat: _Int32Array, buffer: StepBuffer
    ) -> Iterator[ChunkRows]:
        first = width
        for chunk in chunks:
            sequence, ids = chunk.sequence, chunk.sequence.table.block_ids
            block_ids = buffer.put(np.array(ids, dtype=np.int32))
            for start, end, span in cut(
                sequence.spans, chunk.start, chunk.start + chunk.num_tokens
            ):
                stop = first + end - start
                flat[0, first:stop] = sequence.tokens[start:end]
                flat[1, first:stop] = range(start - span.shift, end - span.shift)
                flat[2, first:stop] = [self._slot(ids, index) for index in range(start, end)]
                yield ChunkRows(slice(first, stop), block_ids, end, span.hidden)
                first = stop

    def _slot(self, block_ids: array[int], index: int) -> int:
        block, offset = divmod(index, self._tokens_per_block)
        return block_ids[block] * self._tokens_per_block + offset


def _pairs(copies: Sequence[BlockCopy]) -> _Int32Array:
    return np.array([[c.src for c in copies], [c.dst for c in copies]], dtype=np.int32)
