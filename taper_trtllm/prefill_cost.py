"""What prefill adds to a step, read from the measured points of a profile.

The matrices of a mixed step have a row for every decoding sequence and every chunk token, and on a
GPU their time is a staircase in the number of rows: the first tokens beside a narrow decode batch
are almost free, and one token more can cost as much as a hundred. So what was measured beside one
width says most about another width *at the same number of rows*. Between two measured widths a
mixed step is interpolated along equal numbers of rows; what it adds is what is left of it beyond
the decode step, which may be padded. A further chunk and a query-key pair have their own price.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from taper_trtllm.batch import FloatArray, PrefillLoad
from taper_trtllm.profile import LatencyProfile, PrefillPoint, ProfileError


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
        decode = np.array([decode_ms(width, 0) for width in range(max_width + 1)])
        without_context_ms = [
            p.step_ms - decode_ms(p.width, p.width * p.context_tokens) + decode[p.width]
            for p in points
        ]
        self._chunk_ms, self._pair_ms = _prices(points, without_context_ms)
        rows: defaultdict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for p, step_ms in zip(points, without_context_ms, strict=True):
            rows[p.width][p.width + p.num_tokens].append(step_ms - self._price_ms(p.load))
        num_rows = 1 + max(max(row) for row in rows.values())
        lines = {width: _line(row, num_rows) for width, row in rows.items()}
        self._token_ms = _slope(rows[max(rows)])
        if 0 not in lines:  # a step without decode reads the weights like one of a single sequence
            first = min(lines)
            alone = lines[first][first:] - decode[first] + decode_ms(1, 0)
            lines[0] = np.concatenate([alone, np.full(first, alone[-1])])
        self._lines = np.stack([lines[width] for width in sorted(lines)])
        self._place(np.array(sorted(lines)), decode)

    def _place(self, measured: FloatArray, decode: FloatArray) -> None:
        """Each width's place among the measured ones; outside of them it is as at the nearest."""
        widths = np.arange(len(decode))
        beside = measured[1:]  # a step without decode is a matter of its own
        nearest = np.clip(widths, beside[0], beside[-1]) if len(beside) else np.zeros_like(widths)
        nearest[0] = 0
        position = np.interp(nearest, measured, np.arange(len(measured)))
        self._low = position.astype(np.int64)
        self._high = np.minimum(self._low + 1, len(measured) - 1)
        self._share = position - self._low
        self._width_rows = nearest.astype(np.int64)
        self._decode_ms = decode[self._width_rows]

    def steps_ms(self, first_width: int, num_steps: int, load: PrefillLoad) -> FloatArray:
        """Prefill time beside batches of consecutive widths.

        Args:
            first_width: Decoding sequences of the first batch; each batch has one more.
            num_steps: Batches.
            load: Prefill load, the same in each.

        Returns:
            [num_steps] milliseconds; below zero where decode is padded far beyond its width.
        """
        widths = slice(first_width, first_width + num_steps)
        num_rows = self._width_rows[widths] + load.num_tokens
        most = self._lines.shape[1] - 1
        within = np.minimum(num_rows, most)
        share = self._share[widths]
        steps_ms: FloatArray = self._lines[self._low[widths], within] * (1 - share)
        steps_ms += self._lines[self._high[widths], within] * share
        steps_ms += self._token_ms * (num_rows - within)
        steps_ms += self._price_ms(load) - self._decode_ms[widths]
        return steps_ms

    def token_weight(self, context_tokens: float) -> float:
        """Cost of a token behind a context, in tokens without one.

        It attends to all of the context: behind a long one it takes several times as long.
        """
        if self._token_ms <= 0:
            return 1.0
        return 1.0 + context_tokens * self._pair_ms / self._token_ms

    def _price_ms(self, load: PrefillLoad) -> float:
        return self._chunk_ms * (load.num_chunks - 1) + self._pair_ms * load.token_context


def _prices(points: Sequence[PrefillPoint], steps_ms: Sequence[float]) -> tuple[float, float]:
    """Of a further chunk and of a query-key pair, from steps that differ in nothing else."""
    groups: defaultdict[tuple[int, int], list[tuple[float, ...]]] = defaultdict(list)
    for p, step_ms in zip(points, steps_ms, strict=True):
        groups[p.width, p.num_tokens].append((p.num_chunks, p.token_context, step_ms))
    rows = []
    for group in groups.values():
        columns = np.array(group)
        rows.append((columns - columns.mean(axis=0)) / columns[:, 2].mean())
    table = np.concatenate(rows)
    best, least_error = (0.0, 0.0), float((table[:, 2] ** 2).sum())
    for used in ([0], [1], [0, 1]):  # neither price is negative
        found = np.linalg.lstsq(table[:, used], table[:, 2], rcond=None)[0]
        error = float(((table[:, used] @ found - table[:, 2]) ** 2).sum())
        if (found >= 0).all() and error < least_error - 1e-12:
            prices = np.zeros(2)
            prices[used] = found
            best, least_error = (float(prices[0]), float(prices[1])), error
    return best


def _line(row: Mapping[int, list[float]], num_rows: int) -> FloatArray:
    """[num_rows] mixed steps beside a width by their number of rows, contexts and prices aside.

    Below what was measured it is as there; above, it goes on as it rose.
    """
    knots = sorted(row)
    line: FloatArray = np.interp(
        np.arange(num_rows), knots, [float(np.mean(row[knot])) for knot in knots]
    )
    beyond = np.arange(knots[-1] + 1, num_rows)
    line[beyond] += _slope(row) * (beyond - knots[-1])
    return line


def _slope(row: Mapping[int, list[float]]) -> float:
    """Time of a token, from the shortest chunk to the longest."""
    first, last = min(row), max(row)
    if first == last:
        return 0.0
    return max(0.0, float(np.mean(row[last]) - np.mean(row[first])) / (last - first))
