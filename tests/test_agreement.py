from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import perf.agreement
from perf.agreement import read_sweep, simulate_cell
from perf.workload import DEFAULT_TRACE

SWEEP = Path(perf.agreement.__file__).parent / "results" / "cpu-2026-11-21" / "sweep-agreement"


def test_a_shipped_sweep_is_simulated_with_its_own_settings():
    sweep = read_sweep(SWEEP, DEFAULT_TRACE)
    cell = next(c for c in sweep.cells if (c["policy"], c["load"]) == ("irp-off", 0.6))
    figures, slower = (
        simulate_cell(replace(sweep, profile=profile), SWEEP / "profile.json", cell)
        for profile in (sweep.profile, sweep.profile.with_host_time(3.0))
    )
    assert 0.5 < figures.mean_step_ms / cell["mean_step_ms"] < 1.2
    assert 0.5 < figures.token_goodput / cell["token_goodput"] < 2.0
    assert slower.mean_step_ms > figures.mean_step_ms + 2


def test_a_sweep_of_another_trace_is_not_compared():
    with pytest.raises(ValueError, match="branch_public"):
        read_sweep(SWEEP, Path("mine.csv"))
