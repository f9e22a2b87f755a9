"""What a sweep says: means with their spread, and paired differences to every rival. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

REFERENCE = "taper"

Result = dict[str, Any]
Cells = Mapping[str, Mapping[float, Sequence[Result]]]

_FIGURES = ("token_goodput", "request_goodput", "slo_attainment", "mean_width")


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter is None for a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread}


def summarise(cells: Cells) -> dict[str, Any]:
    """Figures of every policy and load, and the reference's paired differences.

    Args:
        cells: Results by policy and load; repetition i of one is paired with i of the others.

    Returns:
        ``figures[policy][load][name]`` and ``differences[rival][load]`` in token goodput, each with
        mean and std; the load ``all`` is the mean over loads within a repetition.
    """
    figures = {
        policy: {
            f"{load:g}": {
                name: mean_and_spread(values)
                for name in _FIGURES
                if (values := [r[name] for r in results if r[name] is not None])
            }
            for load, results in by_load.items()
        }
        for policy, by_load in cells.items()
    }
    differences = {}
    if REFERENCE in cells:
        differences = {
            rival: _differences(cells[REFERENCE], by_load)
            for rival, by_load in cells.items()
            if rival != REFERENCE
        }
    return {"reference": REFERENCE, "figures": figures, "differences": differences}


def _differences(
    reference: Mapping[float, Sequence[Result]], rival: Mapping[float, Sequence[Result]]
) -> dict[str, dict[str, float | None]]:
    paired = {
        load: [
            ours["token_goodput"] - theirs["token_goodput"]
            for ours, theirs in zip(reference[load], rival[load], strict=True)
        ]
        for load in rival
    }
    over_loads = np.mean(list(paired.values()), axis=0)  # one value per repetition
    rows = {f"{load:g}": mean_and_spread(values) for load, values in paired.items()}
    base = float(np.mean([r["token_goodput"] for results in rival.values() for r in results]))
    total = mean_and_spread(over_loads.tolist())
    ratio = float(np.mean(over_loads)) / base + 1 if base else None
    return {**rows, "all": {**total, "ratio": ratio}}


def verdict(difference: Mapping[str, float | None]) -> str:
    """``win`` or ``loss`` if the mean lies beyond the spread, else ``tie``."""
    mean, spread = difference["mean"] or 0.0, difference["std"] or 0.0
    if abs(mean) <= spread:
        return "tie"
    return "win" if mean > 0 else "loss"


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The summary as console tables: goodput, attainment, differences."""
    figures = summary["figures"]
    loads = list(next(iter(figures.values())))
    tables = [
        _figure_table(figures, loads, "token_goodput", "Token goodput (tok/s) by load", 1, ".0f"),
        _figure_table(figures, loads, "slo_attainment", "SLO attainment (%) by load", 100, ".1f"),
    ]
    differences = summary["differences"]
    if differences:
        reference = summary["reference"]
        table = _table(f"Token goodput of {reference} minus the rival's, paired", [*loads, "all"])
        for rival, rows in differences.items():
            cells = [
                f"{_mean_std(rows[load], 1, '+.0f')} {verdict(rows[load])}"
                for load in [*loads, "all"]
            ]
            table.add_row(rival, *cells)
        tables.append(table)
    return tables


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _figure_table(
    figures: Mapping[str, Any], loads: Sequence[str], name: str, title: str, scale: float, form: str
) -> Table:
    table = _table(title, loads)
    for policy, by_load in figures.items():
        table.add_row(policy, *(_mean_std(by_load[load][name], scale, form) for load in loads))
    return table


def _mean_std(value: Mapping[str, float | None], scale: float, form: str) -> str:
    mean = format(scale * (value["mean"] or 0.0), form)
    if value["std"] is None:
        return mean
    return f"{mean} ± {format(scale * value['std'], form.lstrip('+'))}"
