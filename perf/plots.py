"""Plots of results; one colour per policy, the same in every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Result = dict[str, Any]
Select = Callable[[Result], float | None]

_COLOURS = {
    "taper": "#0b6e4f",
    "irp-off": "#6c757d",
    "irp-eager": "#c1121f",
    "fixed-cap:2": "#e09f3e",
}
_SPARE = ("#335c81", "#7b2d8b", "#5f0f40", "#1b998b", "#8d6b94")


def colours(policies: Sequence[str]) -> dict[str, str]:
    """A colour for each policy."""
    spare = iter(_SPARE * len(policies))
    return {policy: _COLOURS.get(policy) or next(spare) for policy in policies}


def group_value(group: str, key: str) -> Select:
    """Selects a figure of a group of requests."""

    def select(result: Result) -> float | None:
        value: float | None = result["groups"][group].get(key)
        return value

    return select


def plot_sweep(
    cells: Mapping[str, Mapping[float, Sequence[Result]]], tpot_slo_ms: float, path: Path
) -> None:
    """Goodput, attainment and TPOT against load: mean over repetitions, band from least to most.

    Args:
        cells: Results by policy and load.
        tpot_slo_ms: tau, drawn where a TPOT is.
        path: PNG to write.
    """
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5))
    panels: list[tuple[str, str, Select]] = [
        ("Token goodput", "tokens/s of requests that met their SLO", lambda r: r["token_goodput"]),
        ("SLO attainment", "share of all requests", lambda r: r["slo_attainment"]),
        ("Request goodput", "requests/s that met their SLO", lambda r: r["request_goodput"]),
        ("TPOT of plain requests", "P99, ms", group_value("plain", "p99_tpot_ms")),
        ("Serial TPOT of branching", "P99, ms", group_value("branching", "p99_serial_tpot_ms")),
        ("TPOT of branching requests", "P99, ms", group_value("branching", "p99_tpot_ms")),
    ]
    for axis, (title, label, select) in zip(axes.flat, panels, strict=True):
        for policy, colour in colours(list(cells)).items():
            _draw_curve(axis, cells[policy], select, policy, colour)
        if "TPOT" in title:
            axis.axhline(tpot_slo_ms, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="load (multiple of R0)", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes.flat[0].legend()
    _save(figure, path)


def _draw_curve(
    axis: Axes, by_load: Mapping[float, Sequence[Result]], select: Select, policy: str, colour: str
) -> None:
    loads, low, mean, high = [], [], [], []
    for load in sorted(by_load):
        values = [v for result in by_load[load] if (v := select(result)) is not None]
        if values:
            loads.append(load)
            low.append(min(values))
            mean.append(float(np.mean(values)))
            high.append(max(values))
    axis.plot(loads, mean, marker="o", color=colour, label=policy)
    axis.fill_between(loads, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_simulation(
    results: Sequence[Result],
    capacities: Mapping[str, float | None],
    target: float,
    tpot_slo_ms: float,
    path: Path,
) -> None:
    """Curves over the request rate: mean over seeds, band from least to most.

    Args:
        results: Of `perf.simulate`.
        capacities: SLO capacity by policy, drawn upright; None where it was not found.
        target: Attainment at capacity.
        tpot_slo_ms: tau, drawn where a TPOT is.
        path: PNG to write.
    """
    cells: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        cells.setdefault(result["policy"], {}).setdefault(result["request_rate"], []).append(result)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5))
    panels: list[tuple[str, str, Select, float | None]] = [
        ("SLO attainment", "share of requests", lambda r: r["slo_attainment"], target),
        ("Request goodput", "requests/s that met their SLO", lambda r: r["request_goodput"], None),
        ("Token goodput", "tokens/s of requests that met their SLO", lambda r: r["token_goodput"],
         None),
        ("TPOT of victims", "P99, ms", group_value("victims", "p99_tpot_ms"), tpot_slo_ms),
        ("Serial TPOT of branching", "P99, ms", group_value("branching", "p99_serial_tpot_ms"),
         tpot_slo_ms),
        ("Stretch of branching", "median", group_value("branching", "p50_stretch"), None),
    ]  # fmt: skip
    for axis, (title, label, select, bound) in zip(axes.flat, panels, strict=True):
        for policy, colour in colours(list(cells)).items():
            _draw_curve(axis, cells[policy], select, policy, colour)
            if (rate := capacities.get(policy)) is not None:
                axis.axvline(rate, color=colour, linestyle="--", linewidth=1)
        if bound is not None:
            axis.axhline(bound, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="requests/s", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes.flat[0].legend()
    _save(figure, path)


def plot_comparison(results: Mapping[str, Result], tpot_slo_ms: float, path: Path) -> None:
    """Bars of goodput, attainment and serial TPOT, one per policy.

    Args:
        results: Result of each policy.
        tpot_slo_ms: tau, drawn where a TPOT is.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    policies = list(results)
    palette = colours(policies)
    goodput = [results[policy]["token_goodput"] for policy in policies]
    axes[0].bar(policies, goodput, color=[palette[policy] for policy in policies])
    axes[0].set(title="Token goodput", ylabel="tokens/s of requests that met their SLO")
    grouped: list[tuple[str, str, str, float | None]] = [
        ("SLO attainment", "share of requests", "slo_attainment", None),
        ("P99 TPOT inside serial stages", "ms", "p99_serial_tpot_ms", tpot_slo_ms),
    ]
    places = np.arange(2)
    width = 0.8 / len(policies)
    for axis, (title, label, key, bound) in zip(axes[1:], grouped, strict=True):
        for i, policy in enumerate(policies):
            groups = results[policy]["groups"]
            heights = [groups[group].get(key) or 0.0 for group in ("plain", "branching")]
            axis.bar(places + i * width, heights, width, color=palette[policy], label=policy)
        if bound is not None:
            axis.axhline(bound, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, ylabel=label)
        axis.set_xticks(places + 0.4 - width / 2, ["plain", "branching"])
    axes[1].legend(fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
