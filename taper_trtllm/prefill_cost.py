"""What prefill adds to a step, read from the measured points of a profile.

The addition depends on both the decode width and the number of tokens: on a GPU the first chunk
tokens beside a narrow decode batch are almost free, since the weights are read anyway. So it is a
table over (width, tokens), linear between measured values, with a price per further chunk and per
query-key pair on top.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from taper_trtllm.batch import FloatArray, PrefillLoad
from taper_trtllm.profile import LatencyProfile, ProfileError

# Keep the least squares determined where a profile has few points; the table comes first.
_TABLE_RIDGE, _PRICE_RIDGE = 1e-4, 3e-2


class PrefillCost:
    """Prefill time on top of decode, for every decode width.

    Args:
        profile: Measured step times.
        decode_ms: T of (width, total context) without prefill, 0 at width 0.
        max_width: Widest step that will be asked for.

    Raises:
        ProfileError: All prefill points are wider.
    """

    def __init__(
        self, profile: LatencyProfile, decode_ms: Callable[[int, int], float], max_width: int
    ) -> None:
        points = [p for p in profile.prefill if p.width <= max_width]
        if not points:
            raise ProfileError(f"prefill: no point at a width of at most {max_width}")
        self._knots = np.unique([float(p.num_tokens) for p in points])
        measured = np.unique([p.width for p in points])
        at_knot = _hats(np.array([float(p.num_tokens) for p in points]), self._knots)
        at_width = np.array([p.width for p in points])[:, None] == measured[None, :]
        table_columns = (at_width[:, :, None] * at_knot[:, None, :]).reshape(len(points), -1)
        others = np.array([[p.num_chunks - 1.0, p.token_context] for p in points])
        scale = np.array([p.step_ms for p in points])
        target = [p.step_ms - decode_ms(p.width, p.width * p.context_tokens) for p in points]
        solution = _solve(np.hstack([table_columns, others]) / scale[:, None], target / scale)
        table = solution[:-2].reshape(len(measured), len(self._knots))
        self._chunk_ms, self._pair_ms = solution[-2:]
        self._rows = _rows_of_widths(measured, table, max_width)
        if measured[0] > 0:  # a step without decode reads the weights like one of a single sequence
            self._rows[0] = self._rows[1] + decode_ms(1, 0)

    def steps_ms(self, first_width: int, num_steps: int, load: PrefillLoad) -> FloatArray:
        """Prefill time beside batches of consecutive widths.

        Args:
            first_width: Decoding sequences of the first batch; each batch has one more.
            num_steps: Batches.
            load: Prefill load, the same in each.

        Returns:
            [num_steps] milliseconds.
        """
        rows = self._rows[first_width : first_width + num_steps]
        low, share = self._position(load.num_tokens)
        extra_ms: FloatArray = rows[:, low] * (1 - share)
        if share:
            extra_ms += rows[:, low + 1] * share
        extra_ms += self._chunk_ms * (load.num_chunks - 1) + self._pair_ms * load.token_context
        return extra_ms

    def token_weight(self, context_tokens: float) -> float:
        """Cost of a token behind a context, in tokens without one.

        It attends to all of the context: behind a long one it takes several times as long.
        """
        row = self._rows[-1]
        token_ms = (row[-1] - row[0]) / (self._knots[-1] - self._knots[0] or 1.0)
        return 1.0 + context_tokens * float(self._pair_ms / token_ms) if token_ms > 0 else 1.0

    def _position(self, num_tokens: int) -> tuple[int, float]:
        """The knot below and the share of the next; constant before the first knot."""
        knots = self._knots
        if num_tokens <= knots[0] or len(knots) == 1:
            return 0, 0.0
        low = min(int(np.searchsorted(knots, num_tokens, side="right")) - 1, len(knots) - 2)
        return low, float((num_tokens - knots[low]) / (knots[low + 1] - knots[low]))


def _hats(values: FloatArray, knots: FloatArray) -> FloatArray:
    """[N, K] weights of linear interpolation; each value is a knot or lies between two."""
    return np.stack([np.interp(values, knots, unit) for unit in np.eye(len(knots))], axis=1)


def _solve(design: FloatArray, target: FloatArray) -> FloatArray:
    """Least squares; the prices per chunk and per pair, the last two, are not negative."""
    size = np.abs(design).max(axis=0)
    size[size == 0] = 1.0
    columns = np.arange(design.shape[1])
    solution: FloatArray = np.zeros(design.shape[1])
    while True:
        scaled = design[:, columns] / size[columns]
        is_price = columns >= design.shape[1] - 2
        ridge = np.diag(np.where(is_price, _PRICE_RIDGE, _TABLE_RIDGE))
        solution[:] = 0.0
        solution[columns] = (
            np.linalg.lstsq(
                np.vstack([scaled, ridge]), np.append(target, np.zeros(len(columns))), rcond=None
            )[0]
            / size[columns]
        )
        negative = is_price & (solution[columns] < 0)
        if not negative.any():
            return solution
        columns = columns[~negative]


def _rows_of_widths(measured: FloatArray, table: FloatArray, max_width: int) -> FloatArray:
    """[max_width + 1, K]: measured rows, and between two positive widths the line."""
    widths = np.arange(max_width + 1)
    beside = measured > 0
    if not beside.any():
        return np.repeat(table[:1], len(widths), axis=0)
    rows = np.stack([np.interp(widths, measured[beside], c) for c in table[beside].T], axis=1)
    if measured[0] == 0:
        rows[0] = table[0]  # a step without decode pays for the weights alone
    return rows
