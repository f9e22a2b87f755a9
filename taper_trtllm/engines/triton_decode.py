"""Decode attention over KV blocks on a GPU, in Triton: plain, and with shared prefixes (cascade).

Flash decoding: a context is cut into splits that are attended independently and merged by their
log-sum-exp. The query heads that share a KV head are the rows of one matrix product, and with a
shared prefix also those of several sequences, so that the prefix is read once for all of them.

Everything that changes between steps is read on the device and the grids depend on shapes alone, so
the functions can be captured in a CUDA graph; the first call of a shape compiles and comes before.
Import this module only where the Triton language is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from taper_trtllm.engines.prefix_tiles import SharedPrefixes
from taper_trtllm.engines.triton_kernels import attend_split, merge_splits

# Tokens that a program attends to at once. The smallest split.
_TILE_TOKENS = 64
# Queries of a tile over a shared prefix: the rows of Hopper's matrix instruction.
_PREFIX_TILE_QUERIES = 64
# The fewest rows of a matrix product in Triton.
_MIN_QUERIES = 16
# Programs that a multiprocessor runs at the same time: 4 of 4 warps with up to 128 registers.
_PROGRAMS_PER_SM = 4
# The context at which splits are to fill the device exactly. Longer ones have more splits.
_TYPICAL_CONTEXT = 2048
# With many rows no split is needed if all are alike; these are for one that is much longer.
_MIN_SPLITS = 8
_MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Splits:
    """How contexts are cut.

    Attributes:
        num_splits: The most splits of a context; those that it does not need end at once.
        min_tokens: The fewest tokens of a split, but for the last one.
    """

    num_splits: int
    min_tokens: int


def plan_splits(num_tiles: int, num_kv_heads: int, num_sms: int) -> Splits:
    """Splits that fill the device, and no more of them than that.

    Args:
        num_tiles: Contexts that are attended independently.
        num_kv_heads: KV heads.
        num_sms: Multiprocessors of the device.
    """
    wanted = max(1, _PROGRAMS_PER_SM * num_sms // (num_tiles * num_kv_heads))
    wanted = 1 << (wanted.bit_length() - 1)
    return Splits(
        num_splits=min(max(wanted, _MIN_SPLITS), _MAX_SPLITS),
        min_tokens=max(_TYPICAL_CONTEXT // wanted, _TILE_TOKENS),
    )


class DecodeWorkspace:
    """What the splits leave to be merged. One for all layers and batch sizes.

    Args:
        max_batch_size: Most rows of a batch.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Size of a head.
        num_sms: Multiprocessors of the device (132 on an H100 or H200).
        device: Where the KV is.

    Raises:
        ValueError: The kernels cannot work with this shape.
    """

    def __init__(
        self,
        max_batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_sms: int,
        device: torch.device,
    ) -> None:
        if head_dim < _MIN_QUERIES or head_dim & (head_dim - 1):
            raise ValueError(f"head_dim: {head_dim} is no power of two from {_MIN_QUERIES} on")
        if num_heads % num_kv_heads or num_heads // num_kv_heads > _PREFIX_TILE_QUERIES:
            raise ValueError(
                f"num_heads: {num_heads} is no multiple of {num_kv_heads} KV heads by at most "
                f"{_PREFIX_TILE_QUERIES}"
            )
        self._num_kv_heads, self._num_sms = num_kv_heads, num_sms
        self.rows_per_tile = _PREFIX_TILE_QUERIES * num_kv_heads // num_heads
        most = max(n * self.num_slots(n) for n in range(1, max_batch_size + 1))
        self.attended = torch.empty((most, num_heads, head_dim), device=device)
        self.log_sums = torch.empty((most, num_heads), device=device)

    def splits(self, num_rows: int) -> Splits:
        """Splits of the rows' own contexts."""
        return plan_splits(num_rows, self._num_kv_heads, self._num_sms)

    def prefix_splits(self, num_rows: int) -> Splits:
        """Splits of shared prefixes, if the rows are in as few tiles as they can be."""
        return self.splits(-(-num_rows // self.rows_per_tile))

    def num_slots(self, num_rows: int) -> int:
        """The most results to be merged of one query."""
        return self.splits(num_rows).num_splits + self.prefix_splits(num_rows).num_splits


def paged_decode_attention(
    queries: torch.Tensor,
    layer_kv: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per row to the row's whole context.

    Args:
        queries: [n, heads, head_dim]; rows may be apart (a view of a wider tensor).
        layer_kv: [blocks, tokens_per_block, 2, kv heads, head_dim], contiguous; any number of
            tokens per block, powers of two are cheapest.
        block_tables: int32 [n, at least the blocks of the context]; entries beyond the context are
            not read.
        context_lens: int32 [n], at least 1. A padding row has 1, and the padding block.
        workspace: Of this shape.
        out: Like the result.

    Returns:
        [n, heads, head_dim], contiguous.
    """
    own = workspace.splits(len(queries))
    launch = _Launch(queries, layer_kv, block_tables, context_lens, workspace, own.num_splits)
    launch.attend(own, first_slot=0)
    return launch.merge(out)


def cascade_decode_attention(
    queries: torch.Tensor,
    layer_kv: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    prefixes: SharedPrefixes,
    *,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `paged_decode_attention`, but a shared prefix is read once per tile of rows.

    Args:
        queries: See `paged_decode_attention`, as the following.
        layer_kv: See there.
        block_tables: See there; the rows of a tile begin with the same blocks.
        context_lens: See there; greater than the row's prefix.
        prefixes: Who shares what; `prefix_tiles` makes it once per step.
        workspace: See there.
        out: See there.

    Returns:
        [n, heads, head_dim], contiguous.
    """
    own, shared = workspace.splits(len(queries)), workspace.prefix_splits(len(queries))
    num_slots = own.num_splits + shared.num_splits
    launch = _Launch(queries, layer_kv, block_tables, context_lens, workspace, num_slots)
    launch.attend(shared, first_slot=0, tiles=prefixes.tiles)
    launch.attend(own, first_slot=shared.num_splits, prefix_lens=prefixes.prefix_lens)
    return launch.merge(out)


@dataclass(frozen=True, slots=True)
class _Launch:
    """The launches of one call.

    Attributes:
        num_slots: Results of each query in the workspace.
    """

    queries: torch.Tensor
    layer_kv: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    workspace: DecodeWorkspace
    num_slots: int

    def attend(
        self,
        splits: Splits,
        first_slot: int,
        *,
        tiles: torch.Tensor | None = None,
        prefix_lens: torch.Tensor | None = None,
    ) -> None:
        """Fills the slots from `first_slot` on: of shared prefixes, or of each row's own rest."""
        num_rows, num_heads, head_dim = self.queries.shape
        tokens_per_block, _, num_kv_heads = self.layer_kv.shape[1:4]
        own_queries = max(_MIN_QUERIES, triton.next_power_of_2(num_heads // num_kv_heads))
        attend_split[(num_rows, num_kv_heads, splits.num_splits)](
            self.queries,
            self.layer_kv,
            self.block_tables,
            self.context_lens,
            prefix_lens,
            tiles,
            self.workspace.attended,
            self.workspace.log_sums,
            self.queries.stride(0),
            self.block_tables.stride(0),
            SCALE=math.log2(math.e) / math.sqrt(head_dim),
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_TOKENS=tokens_per_block,
            TILE_QUERIES=own_queries if tiles is None else _PREFIX_TILE_QUERIES,
            TILE_TOKENS=_TILE_TOKENS,
            NUM_SPLITS=splits.num_splits,
            MIN_SPLIT_TOKENS=splits.min_tokens,
            FIRST_SLOT=first_slot,
            NUM_SLOTS=self.num_slots,
            num_warps=4,
            num_stages=3,
        )

    def merge(self, out: torch.Tensor | None) -> torch.Tensor:
        """Merges the slots of every query."""
        num_rows, num_heads, head_dim = self.queries.shape
        if out is None:
            out = torch.empty_like(self.queries, memory_format=torch.contiguous_format)
        merge_splits[(num_rows, num_heads)](
            self.workspace.attended,
            self.workspace.log_sums,
            out,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SLOTS=self.num_slots,
            PADDED_SLOTS=triton.next_power_of_2(self.num_slots),
            num_warps=4,
        )
        return out
