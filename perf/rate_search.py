"""Which rates to measure next: an adaptive grid around a capacity and a peak of goodput. Pure.

All policies are measured at rates of one geometric grid, so that they share rates as well as
seeds. One seed goes ahead: far-apart rates until the target is bracketed, then halves. The rates
around the crossing are measured on all seeds, and so is the rate of the highest token goodput.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perf.capacity import antitonic_fit

Measured = Mapping[int, Sequence[tuple[float, float]]]
"""By grid step, in order of seeds: attainment and token goodput."""


@dataclass(frozen=True, slots=True)
class RateGrid:
    """How finely to look.

    Attributes:
        spacing: Grid steps (`capacity.grid_rate`) between neighbouring rates.
        stride: Neighbours that the leading seed leaves out, as a factor on `spacing`.
        reach: Rates measured on all seeds on each side of the crossing.
        max_rates: The search ends with so many rates, found or not.
    """

    spacing: int
    stride: int
    reach: int
    max_rates: int

    def nearest(self, step: int) -> int:
        """The nearest step that belongs to the grid."""
        return self.spacing * round(step / self.spacing)


QUICK = RateGrid(spacing=3, stride=2, reach=1, max_rates=14)  # 9 %
FULL = RateGrid(spacing=1, stride=6, reach=4, max_rates=40)  # 2.9 %

START_SHARE = 0.8  # of the fluid upper bound, where a search begins


def wanted_seeds(
    measured: Measured, grid: RateGrid, start: int, num_seeds: int, target: float
) -> dict[int, int]:
    """Seeds needed by grid step, of those that have fewer; empty when the search is over.

    Args:
        measured: So far.
        grid: Fineness.
        start: Grid step to begin at.
        num_seeds: Of a complete rate.
        target: Attainment at capacity.
    """
    if not measured:
        return {grid.nearest(start): 1}
    if len(measured) >= grid.max_rates:
        return {}
    return _around_crossing(measured, grid, num_seeds, target) or _at_peak(
        measured, grid, num_seeds
    )


def _around_crossing(
    measured: Measured, grid: RateGrid, num_seeds: int, target: float
) -> dict[int, int]:
    complete = {s: v for s, v in measured.items() if len(v) >= num_seeds}
    low, high = _bracket(measured, target)
    stride = grid.stride * grid.spacing
    if low is None or high is None:
        return {min(measured) - stride if low is None else max(measured) + stride: 1}
    if high - low > grid.spacing:
        return {grid.nearest((low + high) // 2): 1}
    more = (grid.reach - 1) * grid.spacing
    missing = {
        step: num_seeds
        for step in range(low - more, high + more + 1, grid.spacing)
        if step not in complete
    }
    if missing:
        return missing
    # Rates that not all seeds have seen may have moved the crossing off the complete ones.
    low, high = _bracket(complete, target)
    if low is None:
        return {min(complete) - grid.spacing: num_seeds}
    return {max(complete) + grid.spacing: num_seeds} if high is None else {}


def _bracket(measured: Measured, target: float) -> tuple[int | None, int | None]:
    """The last step that reaches the target and the first that misses it."""
    steps = sorted(measured)
    fit = antitonic_fit(np.array([np.mean([a for a, _ in measured[s]]) for s in steps]))
    reached = int((fit >= target).sum())
    low = steps[reached - 1] if reached else None
    return low, (steps[reached] if reached < len(steps) else None)


def _at_peak(measured: Measured, grid: RateGrid, num_seeds: int) -> dict[int, int]:
    """Follows the leading seed's goodput upward, then completes its highest rate."""
    best = max(measured, key=lambda step: measured[step][0][1])
    if best == max(measured):
        return {best + grid.spacing * grid.stride: 1}
    return {best: num_seeds} if len(measured[best]) < num_seeds else {}
