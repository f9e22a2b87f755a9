"""What the evaluation says: capacities, peaks, and paired ratios with their error. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perf.capacity import Capacity, capacity, grid_rate, ratio
from perf.evaluation_cells import FREE_EXTRAS
from perf.evaluation_runs import Result, Task, TaskRuns

REFERENCE = "taper"

_NUM_RESAMPLES = 2000
# Student's t, one-sided 95 %, by degrees of freedom; normal beyond.
_T_95 = {
    1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83, 10: 1.81,
    11: 1.80, 12: 1.78, 13: 1.77, 14: 1.76, 15: 1.75, 16: 1.75, 17: 1.74, 18: 1.73, 19: 1.73,
}  # fmt: skip
_NORMAL_95 = 1.645


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found of one task.

    Attributes:
        capacity: SLO capacity (cap95), in requests per second.
        peak: Highest mean token goodput of the rates measured on all seeds, in tokens per second.
        near: Runs of all seeds at the rate next below capacity.
        near_rate: That rate.
        below: The lowest rate tried, if even that misses the target.
    """

    capacity: Capacity
    peak: Capacity
    near: tuple[Result, ...]
    near_rate: float | None
    below: float | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure over another on the same seeds.

    Attributes:
        value: The ratio.
        error: Its standard error; None on a single seed.
        num_seeds: n.
    """

    value: float
    error: float | None
    num_seeds: int

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")

    @property
    def lower_bound(self) -> float | None:
        """One-sided 95 % bound, by Student's t; None on a single seed."""
        return None if self.error is None else self.value - self._t_95 * self.error

    @property
    def verdict(self) -> int:
        """1 above one, -1 below, by the one-sided 95 % bounds; 0 neither or unknown."""
        if self.error is None:
            return 0
        reach = self._t_95 * self.error
        return int(self.value - reach > 1) - int(self.value + reach < 1)

    @property
    def _t_95(self) -> float:
        return _T_95.get(self.num_seeds - 1, _NORMAL_95)


def outcome_of(measured: TaskRuns, num_seeds: int, target: float) -> Outcome:
    """Reads capacity and peak from a task's runs; neither where they do not suffice."""
    found = capacity(measured.attainment(), num_seeds, target)
    attainment = measured.attainment()
    steps = [s for s, v in attainment.items() if len(v) >= num_seeds]
    lowest = min(attainment, default=None)
    misses = found.rate is None and lowest is not None and np.mean(attainment[lowest]) < target
    below = [s for s in steps if found.rate is not None and grid_rate(s) <= found.rate]
    near = tuple(measured.runs[max(below), seed] for seed in range(num_seeds)) if below else ()
    return Outcome(
        found, peak(measured.token_goodput(), num_seeds), near,
        grid_rate(max(below)) if below else None,
        grid_rate(lowest) if misses and lowest is not None else None,
    )  # fmt: skip


def peak(goodput: Mapping[int, Sequence[float]], num_seeds: int) -> Capacity:
    """The highest mean over all seeds among rates, and its spread; see `Capacity`."""
    table = np.array([v[:num_seeds] for v in goodput.values() if len(v) >= num_seeds])
    if not len(table):
        return Capacity(None, np.empty(0), num_seeds)
    draws = np.random.default_rng(0).integers(num_seeds, size=(_NUM_RESAMPLES, num_seeds))
    resampled = table[:, draws].mean(axis=-1).max(axis=0)
    return Capacity(float(table.mean(axis=1).max()), resampled, num_seeds)


def paired(one: Outcome | None, other: Outcome | None, figure: str) -> Ratio | None:
    """`one` over `other` in ``capacity`` or ``peak``; None where either was not found."""
    if one is None or other is None:
        return None
    found = ratio(getattr(one, figure), getattr(other, figure))
    return None if found is None else Ratio(*found, one.capacity.num_seeds)


Outcomes = Mapping[Task, Outcome]


def over_rival(outcomes: Outcomes, cell: str, rival: str, figure: str) -> Ratio | None:
    """TAPER over a policy in a cell, under shipped levers."""
    reference = outcomes.get(Task(cell, "shipped", REFERENCE))
    return paired(reference, outcomes.get(Task(cell, "shipped", rival)), figure)


def best_static(outcomes: Outcomes, cell: str) -> str | None:
    """The static policy of highest capacity under shipped levers: re-tuned for the cell."""
    rates = {
        task.policy: outcome.capacity.rate
        for task, outcome in outcomes.items()
        if (task.cell, task.levers) == (cell, "shipped")
        and _is_static(task.policy)
        and outcome.capacity.rate is not None
    }
    return max(rates, key=lambda policy: rates[policy] or 0.0, default=None)


def cells_of(tasks: Iterable[Task]) -> list[str]:
    """Cells in order."""
    return list(dict.fromkeys(task.cell for task in tasks))


def with_costs(outcomes: Outcomes) -> dict[Task, Outcome]:
    """Those of cells whose extras cost time."""
    return {t: found for t, found in outcomes.items() if not t.cell.endswith(FREE_EXTRAS)}


def free_extras_rate(outcomes: Outcomes, cell: str) -> float | None:
    """SLO capacity of a cell with every branch abreast at no cost; None where it was not found."""
    found = outcomes.get(Task(f"{cell}{FREE_EXTRAS}", "shipped", "irp-eager"))
    return found.capacity.rate if found else None


def policies_of(tasks: Iterable[Task]) -> list[str]:
    """Policies in order, the reference first."""
    names = dict.fromkeys(task.policy for task in tasks)
    return sorted(names, key=lambda name: name != REFERENCE)


def statics_of(tasks: Iterable[Task]) -> list[str]:
    """Static policies in order."""
    return [name for name in policies_of(tasks) if _is_static(name)]


def variants_of(tasks: Iterable[Task]) -> list[str]:
    """Variants and ablations of the reference, in order."""
    return [n for n in policies_of(tasks) if n != REFERENCE and not _is_static(n)]


def _is_static(policy: str) -> bool:
    return policy.partition(":")[0] != REFERENCE


def geometric_mean(ratios: Sequence[Ratio]) -> float:
    """Of at least one ratio."""
    return float(np.exp(np.mean(np.log([r.value for r in ratios]))))
