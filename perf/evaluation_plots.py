"""Plots of the evaluation: curves over the rate for each cell, and ratios over all cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from perf.capacity import grid_rate
from perf.evaluation_runs import TaskRuns
from perf.evaluation_summary import (
    REFERENCE,
    Outcomes,
    Task,
    cells_of,
    over_rival,
    policies_of,
    statics_of,
)
from perf.plots import colours

_DPI = 80


def plot_cell(
    runs: Mapping[Task, TaskRuns], outcomes: Outcomes, title: str, target: float, path: Path
) -> None:
    """Attainment and token goodput over the rate: mean over seeds, band from least to most.

    TAPER and the static policies with the shipped levers; the tables have the rest.

    Args:
        runs: Of one cell.
        outcomes: Their capacities, drawn upright; of tasks that are measured wholly.
        title: Of the cell.
        target: Attainment at capacity.
        path: PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    drawn = (REFERENCE, *statics_of(runs))
    shown = {t: m for t, m in runs.items() if t.levers == "shipped" and t.policy in drawn}
    palette = colours(policies_of(shown))
    for task, measured in shown.items():
        colour = palette[task.policy]
        _draw(left, measured.attainment(), task.policy, colour)
        _draw(right, measured.token_goodput(), task.policy, colour)
        outcome = outcomes.get(task)
        if outcome and (rate := outcome.capacity.rate) is not None:
            left.axvline(rate, color=colour, linewidth=0.8, linestyle=":")
    left.axhline(target, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="requests/s", ylabel="SLO attainment", ylim=(0, 1.02))
    right.set(xlabel="requests/s", ylabel="token goodput, tokens/s")
    right.set_ylim(bottom=0)
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0))
    _save(figure, title, path)


def _draw(axis: Axes, by_step: Mapping[int, Sequence[float]], label: str, colour: str) -> None:
    steps = sorted(by_step)
    rates = [grid_rate(step) for step in steps]
    axis.plot(rates, [np.mean(by_step[s]) for s in steps], marker="o", markersize=3,
              color=colour, label=label)  # fmt: skip
    axis.fill_between(
        rates, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps],
        color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip
    axis.grid(alpha=0.25)


def plot_ratios(outcomes: Outcomes, path: Path) -> None:
    """TAPER over each rival in every cell, with standard errors; equal levers."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    palette = colours(policies_of(outcomes))
    rivals = statics_of(outcomes)
    cells = [cell for cell in cells_of(outcomes) if _is_compared(outcomes, cell, rivals)]
    for axis, figure_name in zip(axes, ("capacity", "peak"), strict=True):
        for i, rival in enumerate(rivals):
            offset = 0.7 * ((i + 0.5) / len(rivals) - 0.5)
            points = [
                (place + offset, r.value, r.error or 0.0)
                for place, cell in enumerate(cells)
                if (r := over_rival(outcomes, cell, rival, figure_name))
            ]
            if points:
                places, values, errors = zip(*points, strict=True)
                axis.errorbar(places, values, errors, fmt="o", markersize=4, capsize=2,
                              color=palette[rival], label=rival)  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(cells)), cells, rotation=30, ha="right")
        axis.grid(alpha=0.25, axis="y")
    axes[0].set(ylabel="TAPER / rival", title="SLO capacity")
    axes[1].set(title="peak token goodput")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize="small")
    _save(figure, "", path)


def _is_compared(outcomes: Outcomes, cell: str, rivals: Iterable[str]) -> bool:
    shipped = {task.policy for task in outcomes if (task.cell, task.levers) == (cell, "shipped")}
    return REFERENCE in shipped and not shipped.isdisjoint(rivals)


def _save(figure: plt.Figure, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
