"""Tables that compare policies on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("token goodput (tok/s)", ("token_goodput",), ".0f"),
    ("request goodput (req/s)", ("request_goodput",), ".2f"),
    ("output throughput (tok/s)", ("output_throughput",), ".0f"),
    ("SLO attainment", ("slo_attainment",), ".1%"),
    ("  plain", ("groups", "plain", "slo_attainment"), ".1%"),
    ("  branching", ("groups", "branching", "slo_attainment"), ".1%"),
    ("  victims", ("groups", "victims", "slo_attainment"), ".1%"),
    ("TTFT p50 (ms)", ("p50_ttft_ms",), ".0f"),
    ("TTFT p99 (ms)", ("p99_ttft_ms",), ".0f"),
    ("TPOT p50, plain (ms)", ("groups", "plain", "p50_tpot_ms"), ".1f"),
    ("TPOT p99, plain (ms)", ("groups", "plain", "p99_tpot_ms"), ".1f"),
    ("TPOT p50, branching (ms)", ("groups", "branching", "p50_tpot_ms"), ".1f"),
    ("TPOT p99, branching (ms)", ("groups", "branching", "p99_tpot_ms"), ".1f"),
    ("serial TPOT p50, branching (ms)", ("groups", "branching", "p50_serial_tpot_ms"), ".1f"),
    ("serial TPOT p99, branching (ms)", ("groups", "branching", "p99_serial_tpot_ms"), ".1f"),
    ("E2EL p50, plain (ms)", ("groups", "plain", "p50_e2el_ms"), ".0f"),
    ("E2EL p99, plain (ms)", ("groups", "plain", "p99_e2el_ms"), ".0f"),
    ("E2EL p50, branching (ms)", ("groups", "branching", "p50_e2el_ms"), ".0f"),
    ("E2EL p99, branching (ms)", ("groups", "branching", "p99_e2el_ms"), ".0f"),
    ("mean width, branching", ("mean_width",), ".2f"),
    ("deferred branch steps", ("num_deferred_branch_steps",), ".0f"),
    ("externality, predicted (ms/step)", ("mean_predicted_branch_externality_ms",), ".2f"),
    ("externality, realised (ms/step)", ("mean_branch_externality_ms",), ".2f"),
    ("probes: measured - predicted T0 (ms)", ("mean_probe_residual_ms",), ".2f"),
    ("failed requests", ("failed",), ".0f"),
)


def comparison_table(results: Mapping[str, dict[str, Any]], title: str) -> Table:
    """One column per policy, one row per figure; the best token goodput is bold.

    Args:
        results: Result of each policy.
        title: Of the table.
    """
    table = Table(title=title)
    table.add_column("")
    for policy in results:
        table.add_column(policy, justify="right")
    for label, keys, form in _ROWS:
        values = [_value(result, keys) for result in results.values()]
        best = max((v for v in values if v is not None), default=None)
        cells = [_cell(v, form, keys == ("token_goodput",) and v == best) for v in values]
        table.add_row(label, *cells)
    return table


def _value(result: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = result
    for key in keys:
        value = value.get(key)
    found: float | None = value
    return found


def _cell(value: float | None, form: str, bold: bool) -> str:
    if value is None:
        return "-"
    text = format(value, form)
    return f"[bold]{text}[/bold]" if bold else text
