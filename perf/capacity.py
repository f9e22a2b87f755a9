"""SLO capacity: the highest request rate at which enough requests meet their objective. Pure.

Attainment falls with the rate, but a few seeds make it wiggle, and bisection then ends anywhere.
So it is measured on a grid of rates around the capacity, made antitonic by least squares, and read
where it crosses the target. Its error is that over resampled seeds; two policies are compared on
the same resampled seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

STEPS_PER_DECADE = 80  # neighbouring rates of the grid differ by 2.9 %

_NUM_RESAMPLES = 2000
_LEAST_SHARE = 0.1  # of the first rate; a resampled capacity is positive


def grid_rate(step: int) -> float:
    """Rate of a grid step, in requests per second."""
    return float(10 ** (step / STEPS_PER_DECADE))


def grid_step(rate: float) -> int:
    """The grid step nearest to a rate."""
    return round(STEPS_PER_DECADE * math.log10(rate))


def antitonic_fit(values: FloatArray) -> FloatArray:
    """The non-increasing sequence nearest to `values` in least squares.

    Args:
        values: [..., N], along the last axis.

    Returns:
        [..., N]; element i is min over j <= i of max over k >= i of the mean of j..k.
    """
    n = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    first, last = np.arange(n)[:, None], np.arange(n)[None, :]
    length = np.maximum(last - first + 1, 1)
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / length
    means = np.where(last >= first, means, -np.inf)
    largest = np.flip(np.maximum.accumulate(np.flip(means, axis=-1), axis=-1), axis=-1)
    fit: FloatArray = np.where(last >= first, largest, np.inf).min(axis=-2)
    return fit


def crossing(rates: FloatArray, fit: FloatArray, target: float, slope: float) -> FloatArray:
    """The highest rate at which an antitonic fit reaches the target.

    Args:
        rates: [N] ascending.
        fit: [..., N] non-increasing.
        target: Of the fit.
        slope: By which a fit falls per unit of the rate below the first and above the last.

    Returns:
        [...], linear between rates; beyond them where the target is missed or reached everywhere,
        but positive. Cut off at the ends, resamples would say too little about the error.
    """
    reached = (fit >= target).sum(axis=-1)
    low = np.clip(reached - 1, 0, len(rates) - 2)
    above = np.take_along_axis(fit, low[..., None], axis=-1)[..., 0]
    below = np.take_along_axis(fit, low[..., None] + 1, axis=-1)[..., 0]
    share = np.clip((above - target) / np.maximum(above - below, 1e-12), 0.0, 1.0)
    share = np.where(reached == len(rates), 1.0, share)
    found: FloatArray = rates[low] + share * (rates[low + 1] - rates[low])
    found += np.where(reached == 0, np.minimum(fit[..., 0] - target, 0.0) / slope, 0.0)
    found += np.where(reached == len(rates), np.maximum(fit[..., -1] - target, 0.0) / slope, 0.0)
    return np.maximum(found, _LEAST_SHARE * rates[0])


@dataclass(frozen=True, slots=True)
class Capacity:
    """SLO capacity of one policy.

    Attributes:
        rate: In requests per second; None if the target was not crossed at any rate tried.
        resampled: [B] capacity on each resampling; the same seeds in the same place for every
            policy.
        num_seeds: n.
    """

    rate: float | None
    resampled: FloatArray
    num_seeds: int

    @property
    def std(self) -> float | None:
        """Standard error of the rate; None on a single seed."""
        return None if self.rate is None else _standard_error(self.resampled, self.num_seeds)


def capacity(attainment: Mapping[int, Sequence[float]], num_seeds: int, target: float) -> Capacity:
    """Reads the capacity from a grid.

    Args:
        attainment: By grid step, one value per seed in order; steps that are not measured on every
            seed are left out, and so are further seeds.
        num_seeds: Seeds of a complete step.
        target: Share of requests that have to meet their objective.
    """
    steps = sorted(step for step, values in attainment.items() if len(values) >= num_seeds)
    nothing = Capacity(None, np.empty(0), num_seeds)
    if len(steps) < 2:
        return nothing
    rates = np.array([grid_rate(step) for step in steps])
    table = np.array([attainment[step][:num_seeds] for step in steps], dtype=np.float64)
    fit = antitonic_fit(table.mean(axis=1))
    if fit[0] < target or fit[-1] >= target:
        return nothing
    slope = float((fit[0] - fit[-1]) / (rates[-1] - rates[0]))
    draws = np.random.default_rng(0).integers(num_seeds, size=(_NUM_RESAMPLES, num_seeds))
    resampled = crossing(rates, antitonic_fit(table[:, draws].mean(axis=-1).T), target, slope)
    return Capacity(float(crossing(rates, fit, target, slope)), resampled, num_seeds)


def ratio(one: Capacity, other: Capacity) -> tuple[float, float | None] | None:
    """How many times the capacity of another, and the paired standard error of that."""
    if one.rate is None or other.rate is None or not other.resampled.all():
        return None
    error = _standard_error(one.resampled / other.resampled, one.num_seeds)
    return one.rate / other.rate, error


def _standard_error(resampled: FloatArray, num_seeds: int) -> float | None:
    """Resampling n seeds falls short by sqrt((n - 1) / n); one seed says nothing."""
    if num_seeds < 2:
        return None
    return float(resampled.std()) * math.sqrt(num_seeds / (num_seeds - 1))
