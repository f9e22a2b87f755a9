"""The cells of a sweep: policies x loads x repetitions, in which order, and their files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.shipped_profiles import named_profile
from perf.sweep_summary import Cells
from taper_trtllm.admission import make_policy
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.predictor import StepLatencyPredictor

_ANY_PROFILE = "h200_fp8_tp1"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of the sweep."""

    policy: str
    load: float
    repetition: int

    @property
    def filename(self) -> str:
        """Name of its result."""
        return f"{self.policy}_{self.load:g}_{self.repetition}.json"


def schedule(policies: Sequence[str], loads: Sequence[float], repetitions: int) -> list[Cell]:
    """All cells in the order they run: by repetition and load, policies in rotated order."""
    cells = []
    for repetition in range(repetitions):
        for i, load in enumerate(loads):
            start = (repetition + i) % len(policies)
            rotated = [*policies[start:], *policies[:start]]
            cells += [Cell(policy, load, repetition) for policy in rotated]
    return cells


def load_cells(directory: Path, cells: Sequence[Cell]) -> Cells:
    """Results by policy and load, in order of repetition."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in sorted(cells, key=lambda cell: cell.repetition):
        found[cell.policy][cell.load].append(json.loads((directory / cell.filename).read_text()))
    return {policy: dict(by_load) for policy, by_load in found.items()}


def check_policies(policies: Sequence[str]) -> None:
    """Refuses an unknown policy before hours of measurement.

    Raises:
        ConfigError: Names the policy and lists those that exist.
    """
    predictor = StepLatencyPredictor(named_profile(_ANY_PROFILE))
    for policy in policies:
        make_policy(policy, SchedulerConfig(), predictor)
