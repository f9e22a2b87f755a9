"""What the loop around an engine adds to a step, read off its step records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_TRIMMED = 0.02  # share of steps left out at either end
_LEAST_STEPS = 100


class HostTimeError(RuntimeError):
    """The host time cannot be measured, with the reason."""


def host_ms(steps: Iterable[dict[str, Any]]) -> float:
    """Mean of what decode steps take beyond their prediction, without the extremes.

    Args:
        steps: Step records (`step_trace.record_json`) predicted by the profile alone.

    Raises:
        HostTimeError: Too few of them decoded without prefill.
    """
    gaps = sorted(
        step["step_ms"] - step["predicted_step_ms"]
        for step in steps
        if step["predicted_step_ms"] is not None and not step["num_prefill_tokens"]
    )
    if len(gaps) < _LEAST_STEPS:
        raise HostTimeError(f"only {len(gaps)} steps without prefill; {_LEAST_STEPS} are needed")
    cut = int(_TRIMMED * len(gaps))
    return max(0.0, float(np.mean(gaps[cut : len(gaps) - cut])))
