"""Shared prefixes of a batch in fixed shapes, for decode attention on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Which rows of a batch share their first blocks, in fixed shapes; on the device.

    Attributes:
        tiles: int32 [n, 3]: first row, number of rows (0: no tile), tokens of their prefix.
        prefix_lens: int32 [n]: tokens of each row's context that are attended in its tile.
    """

    tiles: torch.Tensor
    prefix_lens: torch.Tensor


def tile_prefixes(
    groups: Sequence[tuple[int, int]], num_rows: int, rows_per_tile: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The content of `SharedPrefixes`.

    Args:
        groups: Number of rows and tokens of the prefix that they share: whole blocks that stand in
            the tables of all of them, and less than any row's context. In the order of rows, from
            row 0 on; the rows of a group stand together. Rows beyond them share nothing.
        num_rows: Of the batch, padding included.
        rows_per_tile: See `DecodeWorkspace`.

    Returns:
        `tiles` and `prefix_lens`.
    """
    tiles = np.zeros((num_rows, 3), dtype=np.int32)
    prefix_lens = np.zeros(num_rows, dtype=np.int32)
    num_tiles = first_row = 0
    alone = [(1, 0)] * (num_rows - sum(size for size, _ in groups))
    for size, prefix_len in [*groups, *alone]:
        shared = prefix_len if size > 1 else 0
        prefix_lens[first_row : first_row + size] = shared
        for row in range(first_row, first_row + size, rows_per_tile):
            tiles[num_tiles] = row, min(rows_per_tile, first_row + size - row), shared
            num_tiles += 1
        first_row += size
    return tiles, prefix_lens
