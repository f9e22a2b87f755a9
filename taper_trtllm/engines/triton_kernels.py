"""The Triton kernels of `triton_decode`, which launches them.

Shapes are compile-time constants: with head counts and sizes as run-time integers the compiler
cannot prove that rows are aligned, loads neither in vectors nor ahead, and spills registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_split(
    queries,  # [rows, HEADS, HEAD_DIM], rows `query_stride` apart
    layer_kv,  # [blocks, BLOCK_TOKENS, 2, KV_HEADS, HEAD_DIM]
    block_tables,  # [rows, blocks], rows `table_stride` apart
    context_lens,  # [rows]
    prefix_lens,  # [rows] or None: where a row's own context begins
    tiles,  # [tiles, 3] or None: see `SharedPrefixes`
    attended,  # [rows, NUM_SLOTS, HEADS, HEAD_DIM] float32, to be merged
    log_sums,  # [rows, NUM_SLOTS, HEADS] float32, base 2; -inf: nothing was attended
    query_stride,
    table_stride,
    SCALE: tl.constexpr,  # of logits, base 2
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,  # rows of the tile x query heads of a KV head, padded
    TILE_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
):
    """One split of one KV head, for the rows of a tile; without `tiles` every row is one."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tiles is not None:
        first_row = tl.load(tiles + 3 * tile)
        num_rows = tl.load(tiles + 3 * tile + 1)
        start = 0
        end = tl.load(tiles + 3 * tile + 2)
    else:
        first_row = tile
        num_rows = 1
        start = 0
        if prefix_lens is not None:
            start = tl.load(prefix_lens + tile)
        end = tl.load(context_lens + tile)
    even = tl.cdiv(end - start, NUM_SPLITS * TILE_TOKENS) * TILE_TOKENS
    split_tokens = tl.maximum(even, MIN_SPLIT_TOKENS)
    start += split * split_tokens
    end = tl.minimum(start + split_tokens, end)

    SHARED_HEADS: tl.constexpr = HEADS // KV_HEADS
    query = tl.arange(0, TILE_QUERIES)
    is_query = query < num_rows * SHARED_HEADS
    row = first_row + query // SHARED_HEADS
    head = kv_head * SHARED_HEADS + query % SHARED_HEADS
    slot = (row * NUM_SLOTS + FIRST_SLOT + split) * HEADS + head
    if start >= end:
        tl.store(log_sums + slot, float("-inf"), mask=is_query)
        return

    dim = tl.arange(0, HEAD_DIM)
    query_at = row * query_stride + head * HEAD_DIM
    q = tl.load(queries + query_at[:, None] + dim[None, :], mask=is_query[:, None], other=0.0)
    table = block_tables + first_row * table_stride
    keys = layer_kv + kv_head * HEAD_DIM
    values = keys + KV_HEADS * HEAD_DIM
    maximum = tl.full([TILE_QUERIES], float("-inf"), tl.float32)
    total = tl.full([TILE_QUERIES], 0.0, tl.float32)
    weighted = tl.full([TILE_QUERIES, HEAD_DIM], 0.0, tl.float32)
    for first in range(start, end, TILE_TOKENS):
        token = first + tl.arange(0, TILE_TOKENS)
        is_token = token < end
        block = tl.load(table + token // BLOCK_TOKENS, mask=is_token, other=0).to(tl.int64)
        token_at = (block * BLOCK_TOKENS + token % BLOCK_TOKENS) * (2 * KV_HEADS * HEAD_DIM)
        at = token_at[:, None] + dim[None, :]
        k = tl.load(keys + at, mask=is_token[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        logits = tl.where(is_token[None, :], logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        v = tl.load(values + at, mask=is_token[:, None], other=0.0)
        weighted = weighted * decay[:, None]
        weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum

    tl.store(log_sums + slot, maximum + tl.log2(total), mask=is_query)
    at = slot[:, None] * HEAD_DIM + dim[None, :]
    tl.store(attended + at, weighted / total[:, None], mask=is_query[:, None])


@triton.jit
def merge_splits(
    attended,  # [rows, NUM_SLOTS, HEADS, HEAD_DIM]
    log_sums,  # [rows, NUM_SLOTS, HEADS]
    out,  # [rows, HEADS, HEAD_DIM]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
):
    """Merges what the splits of one row and head attended to."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot, dim = tl.arange(0, PADDED_SLOTS), tl.arange(0, HEAD_DIM)
    at = (row * NUM_SLOTS + slot) * HEADS + head
    log_sum = tl.load(log_sums + at, mask=slot < NUM_SLOTS, other=float("-inf"))
    weight = tl.exp2(log_sum - tl.max(log_sum, 0))
    # What was not attended holds anything, from a step before.
    part_at = at[:, None] * HEAD_DIM + dim[None, :]
    part = tl.load(attended + part_at, mask=(weight > 0)[:, None], other=0.0)
    merged = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + dim, merged.to(out.dtype.element_ty))
