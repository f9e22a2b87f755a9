"""Tables of the evaluation, for the terminal and as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from perf.capacity import grid_rate
from perf.evaluation_cells import LEVERS
from perf.evaluation_runs import Scale
from perf.evaluation_summary import (
    REFERENCE,
    Outcome,
    Outcomes,
    Ratio,
    Task,
    best_static,
    cells_of,
    free_extras_rate,
    geometric_mean,
    over_rival,
    paired,
    policies_of,
    statics_of,
    variants_of,
    with_costs,
)
from perf.random_cells import cell_named

_FIGURES = {"capacity": "SLO capacity", "peak": "peak token goodput"}


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of strings; the first column names the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, caption=self.note or None)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [f"**{self.title}.** {self.note}".strip(), ""]
        lines += [_row(self.header), _row(["---"] * len(self.header))]
        return "\n".join(lines + [_row(row) for row in self.rows]) + "\n"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no branch admission should exceed in a cell, in requests per second.

    Attributes:
        fluid: See `upper_bound`.
        free_extras: See `free_extras_rate`.
    """

    fluid: float
    free_extras: float | None

    @property
    def least(self) -> float:
        """The tighter one."""
        return self.fluid if self.free_extras is None else min(self.fluid, self.free_extras)


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def all_tables(outcomes: Outcomes, fluid_bounds: dict[str, float], scale: Scale) -> list[TextTable]:
    """Every table that the outcomes suffice for.

    Args:
        outcomes: By task, in order.
        fluid_bounds: Upper bound by cell, in requests per second.
        scale: How much was measured.
    """
    bounds = {
        cell: Bounds(rate, free_extras_rate(outcomes, cell)) for cell, rate in fluid_bounds.items()
    }
    outcomes = with_costs(outcomes)
    tables = [
        _capacities(outcomes, bounds),
        _peaks(outcomes),
        _against_rivals(outcomes, "capacity"),
        _against_rivals(outcomes, "peak"),
        _aims(outcomes, bounds),
        _score(outcomes),
        _ablations(outcomes),
        _regime_p(outcomes),
        _levers(outcomes),
        *(_variant(outcomes, suffix) for suffix in _VARIANTS),
        *(_groups(outcomes, cell) for cell in cells_of(outcomes)),
        _cells(outcomes, scale),
    ]
    return [table for table in tables if table.rows]


# ---------------------------------------------------------------------------------- figures


def _capacities(outcomes: Outcomes, bounds: dict[str, Bounds]) -> TextTable:
    policies = policies_of(outcomes)
    rows = [
        [
            cell,
            f"{bounds[cell].fluid:.3g}",
            _rate(bounds[cell].free_extras),
            *(_value(o, "capacity", ".3g") for o in shipped),
        ]
        for cell, shipped in _shipped(outcomes, policies)
    ]
    return TextTable(
        "SLO capacity, requests per second",
        ["cell", "fluid bound", "free extras", *policies], rows,
        "The highest rate at which 95 % of requests meet their objective; equal levers everywhere. "
        "After <: the lowest rate that was tried, and missed.",
    )  # fmt: skip


def _peaks(outcomes: Outcomes) -> TextTable:
    policies = policies_of(outcomes)
    rows = [
        [cell, *(_value(o, "peak", ".0f") for o in shipped)]
        for cell, shipped in _shipped(outcomes, policies)
    ]
    return TextTable(
        "Peak token goodput, tokens per second", ["cell", *policies], rows,
        "The highest over rates of the tokens per second of requests that met their objective.",
    )  # fmt: skip


def _against_rivals(outcomes: Outcomes, figure: str) -> TextTable:
    rivals = statics_of(outcomes)
    rows = [
        [cell, *(_marked(paired(reference, o, figure)) for o in others)]
        for cell, (reference, *others) in _shipped(outcomes, [REFERENCE, *rivals])
    ]
    rows = [row for row in rows if any(row[1:])]
    return TextTable(
        f"TAPER over each rival, {_FIGURES[figure]}", ["cell", *rivals], rows,
        "Paired on the same seeds, ± standard error; **loses** where the one-sided 95 % bound of "
        "the ratio lies below one. Equal levers.",
    )  # fmt: skip


def _aims(outcomes: Outcomes, bounds: dict[str, Bounds]) -> TextTable:
    """Against the static policy that is best in the cell, and against the upper bound."""
    rows, ratios, shares = [], [], []
    for cell in cells_of(outcomes):
        best = best_static(outcomes, cell)
        found = over_rival(outcomes, cell, best, "capacity") if best else None
        rate = outcomes[Task(cell, "shipped", REFERENCE)].capacity.rate if found else None
        if best is None or found is None or rate is None:
            continue
        bound = found.lower_bound
        ratios.append(found.value)
        shares.append(rate / bounds[cell].least)
        rows.append([cell, best, str(found), "" if bound is None else f"{bound:.2f}",
                     f"{shares[-1]:.2f}"])  # fmt: skip
    if rows:
        medians = [f"{np.median(values):.2f}" for values in (ratios, shares)]
        rows.append(["median", "", medians[0], "", medians[1]])
    return TextTable(
        "TAPER over the static policy that is best in each cell, SLO capacity",
        ["cell", "best static policy", "ratio", "one-sided 95 % bound", "share of bound"],
        rows, "Of the static policies measured there, with equal levers. The bound: the fluid one, "
        "or the capacity if extra branches cost nothing (free extras) where that is less.",
    )  # fmt: skip


def _score(outcomes: Outcomes) -> TextTable:
    rows = []
    for figure, name in _FIGURES.items():
        for rival in statics_of(outcomes):
            ratios = {cell: over_rival(outcomes, cell, rival, figure)
                      for cell in cells_of(outcomes)}  # fmt: skip
            known = {cell: r for cell, r in ratios.items() if r is not None}
            if not known:
                continue
            verdicts = [r.verdict for r in known.values()]
            lost = [cell for cell, r in known.items() if r.verdict < 0]
            rows.append([
                f"{name}, {rival}", f"{geometric_mean(list(known.values())):.2f}",
                str(verdicts.count(1)), str(verdicts.count(0)), str(len(lost)),
                ", ".join(lost) or "-",
            ])  # fmt: skip
    header = ["TAPER over", "geometric mean", "wins", "level", "loses", "loses in"]
    return TextTable(
        "Cells won and lost", header, rows,
        "Won or lost: by the one-sided 95 % bound of the ratio. Equal levers.",
    )  # fmt: skip


def _ablations(outcomes: Outcomes) -> TextTable:
    """TAPER with a part replaced or left out."""
    variants = variants_of(outcomes)
    rows = []
    for figure, name in _FIGURES.items():
        for cell, (reference, *others) in _shipped(outcomes, [REFERENCE, *variants]):
            ratios = [paired(o, reference, figure) for o in others]
            if any(ratios):
                rows.append([f"{cell}, {name}", *map(_text, ratios)])
    return TextTable(
        "Variants and ablations over TAPER", ["cell", *variants], rows,
        "Below one: TAPER is better. Paired on the same seeds, equal levers.",
    )  # fmt: skip


def _regime_p(outcomes: Outcomes) -> TextTable:
    """Branch admission alone, and the shipped system against bare baselines."""
    rows = []
    reference = outcomes.get(Task("P", "shipped", REFERENCE))
    for rival in statics_of(outcomes):
        shipped = outcomes.get(Task("P", "shipped", rival))
        bare = outcomes.get(Task("P", "bare", rival))
        bare_reference = outcomes.get(Task("P", "bare", REFERENCE))
        for figure, name in _FIGURES.items():
            ratios = [paired(reference, shipped, figure), paired(bare_reference, bare, figure),
                      paired(reference, bare, figure)]  # fmt: skip
            if any(ratios):
                rows.append([f"{rival}, {name}", *map(_marked, ratios)])
    header = ["TAPER over", "(i) branch admission alone: shipped levers everywhere",
              "(i) branch admission alone: bare levers everywhere",
              "(ii) shipped system over bare baseline"]  # fmt: skip
    return TextTable(
        "Regime P", header, rows,
        "Bare: first come first served, whole footprints reserved, and requests start as long as "
        "slots and memory last.",
    )  # fmt: skip


def _levers(outcomes: Outcomes) -> TextTable:
    policies = policies_of(outcomes)
    rows = []
    for cell in cells_of(outcomes):
        for levers in LEVERS:
            if levers == "shipped":
                continue
            ratios = [
                paired(
                    outcomes.get(Task(cell, levers, policy)),
                    outcomes.get(Task(cell, "shipped", policy)),
                    "capacity",
                )
                for policy in policies
            ]
            if any(ratios):
                rows.append([f"{cell}, {levers}", *map(_text, ratios)])
    return TextTable(
        "Levers: SLO capacity with other levers over that with the shipped ones",
        *_without_empty_columns(["cell, levers", *policies], rows),
        "Below one: the shipped setting is better.",
    )


_VARIANTS = {
    "free-joins": "Joins and headers that cost nothing: SLO capacity over that with their cost",
    "cascade": "Prefix-sharing (cascade) attention: SLO capacity over that without it",
    "told-0.7": "An executor told 0.7 of all step times: SLO capacity over that with the true ones",
    "told-1.3": "An executor told 1.3 of all step times: SLO capacity over that with the true ones",
}


def _variant(outcomes: Outcomes, suffix: str) -> TextTable:
    """Cells that differ from another in what their suffix says."""
    policies = policies_of(outcomes)
    rows = []
    for cell in cells_of(outcomes):
        ratios = [
            paired(
                outcomes.get(Task(f"{cell}-{suffix}", "shipped", policy)),
                outcomes.get(Task(cell, "shipped", policy)),
                "capacity",
            )
            for policy in policies
        ]
        if any(ratios):
            rows.append([cell, *map(_text, ratios)])
    return TextTable(_VARIANTS[suffix], *_without_empty_columns(["cell", *policies], rows))


_GROUP_ROWS: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("attained, plain (%)", ("groups", "plain", "slo_attainment"), 100, ".1f"),
    ("attained, branching (%)", ("groups", "branching", "slo_attainment"), 100, ".1f"),
    ("TPOT p99, plain (ms)", ("groups", "plain", "p99_tpot_ms"), 1, ".1f"),
    ("TPOT p99, victims (ms)", ("groups", "victims", "p99_tpot_ms"), 1, ".1f"),
    ("TPOT p99, branching (ms)", ("groups", "branching", "p99_tpot_ms"), 1, ".1f"),
    ("serial TPOT p99 (ms)", ("groups", "branching", "p99_serial_tpot_ms"), 1, ".1f"),
    ("stretch p50", ("groups", "branching", "p50_stretch"), 1, ".2f"),
    ("stretch p99", ("groups", "branching", "p99_stretch"), 1, ".2f"),
    ("mean width", ("groups", "branching", "mean_width"), 1, ".2f"),
    ("join wait (ms)", ("groups", "branching", "mean_join_wait_ms"), 1, ".0f"),
    ("TTFT p99 (s)", ("p99_ttft_ms",), 1e-3, ".2f"),
)


def _groups(outcomes: Outcomes, cell: str) -> TextTable:
    near = {
        task.policy: outcome
        for task, outcome in outcomes.items()
        if task.cell == cell and task.levers == "shipped" and outcome.near
    }
    rows = (
        [["requests/s", *(f"{outcome.near_rate:.3g}" for outcome in near.values())]] if near else []
    )
    for label, keys, scale, form in _GROUP_ROWS:
        if near:
            rows.append([label, *(_mean(o, keys, scale, form) for o in near.values())])
    return TextTable(
        f"{cell}: plain and branching requests, serial stages and victims", ["", *near], rows,
        "Each policy at its own rate next below capacity; means over seeds.",
    )  # fmt: skip


def _mean(outcome: Outcome, keys: Sequence[str], scale: float, form: str) -> str:
    values = []
    for run in outcome.near:
        value = run
        for key in keys:
            value = value[key]
        if value is not None:
            values.append(scale * float(value))
    return format(float(np.mean(values)), form) if values else "-"


def _cells(outcomes: Outcomes, scale: Scale) -> TextTable:
    rows = []
    for name in cells_of(outcomes):
        cell = cell_named(name)
        slo = f"{cell.tpot_ms:g}, {cell.ttft_ms / 1e3:g}"
        duration_s = scale.duration_s or cell.quick_duration_s
        rows.append([name, cell.title, slo, f"{cell.warmup_s:g} + {duration_s:g}"])
    return TextTable(
        "Cells", ["cell", "deployment and load", "tau (ms), Y (s)", "warm-up + window (s)"], rows,
        f"{scale.num_seeds} seeds; neighbouring rates differ by "
        f"{grid_rate(scale.grid.spacing) - 1:.0%}.",
    )  # fmt: skip


# ------------------------------------------------------------------------------------- texts


def _shipped(
    outcomes: Outcomes, policies: Sequence[str]
) -> Iterator[tuple[str, list[Outcome | None]]]:
    for cell in cells_of(outcomes):
        yield cell, [outcomes.get(Task(cell, "shipped", policy)) for policy in policies]


def _value(outcome: Outcome | None, figure: str, form: str) -> str:
    """The figure; nothing where it was not measured."""
    if outcome is None:
        return ""
    rate = getattr(outcome, figure).rate
    if rate is None and figure == "capacity" and outcome.below is not None:
        return f"< {outcome.below:{form}}"
    return "not found" if rate is None else format(rate, form)


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.3g}"


def _without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Policies that nothing was measured of in any row are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _text(ratio: Ratio | None) -> str:
    return "" if ratio is None else str(ratio)


def _marked(ratio: Ratio | None) -> str:
    """With a mark where it is below one by more than its error."""
    return _text(ratio) + (" **loses**" if ratio is not None and ratio.verdict < 0 else "")
