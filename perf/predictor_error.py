"""How far the predictor is off when the device differs from its profile.

The predictor is told a profile and then sees step durations of a device that is disturbed in a way
that the profile does not show. What counts is its error afterwards on batches that it did not see:
of the step, and of the branch externality, which is what admission decides by. Run it with
``python -m perf.predictor_error``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from perf.shipped_profiles import PROFILES, named_profile
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.engines.simulated import Device, Disturbance
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import LatencyProfile, ProfileError

NOISE = 0.02
DISTURBANCES = {
    "none": Disturbance(noise=NOISE),
    "host overhead 3 ms": Disturbance(noise=NOISE, host_overhead_ms=3.0),
    "unequal contexts": Disturbance(noise=NOISE, imbalance=0.03),
    "tiles 4 sequences earlier": Disturbance(noise=NOISE, width_shift=4),
    "10 % slower": Disturbance(noise=NOISE, step_scale=1.1),
    "contexts 20 % dearer": Disturbance(noise=NOISE, context_scale=1.2),
    "30 % slower": Disturbance(noise=NOISE, step_scale=1.3),
    "30 % faster": Disturbance(noise=NOISE, step_scale=0.7),
}
_NUM_STEPS = 3000  # about a minute and a half of serving
_NUM_HELD_OUT = 400
_MAX_WIDTH = 256
_NO_PREFILL = PrefillLoad()


@dataclass(frozen=True, slots=True)
class PredictorError:
    """Errors on batches that were not seen; fractions.

    Attributes:
        mape: Mean absolute error of T.
        externality_error: Mean absolute error of T(S) - T(S0), over its mean.
        p95_under: 95th percentile of how much a step takes longer than predicted.
    """

    mape: float
    externality_error: float
    p95_under: float


def predictor_error(
    profile: LatencyProfile, disturbance: Disturbance, seed: int = 0
) -> PredictorError:
    """Serves `_NUM_STEPS` steps, then compares on held-out batches with the device's mean.

    Batches wander over widths as they do under load; extras of a held-out batch are 4 to 63.
    """
    rng = np.random.default_rng(seed)
    predictor = StepLatencyPredictor(profile, _MAX_WIDTH)
    device = Device(profile, disturbance, _MAX_WIDTH, seed)
    for contexts in _batches(rng, _NUM_STEPS):
        step_ms = device.step_ms(contexts, _NO_PREFILL)
        predictor.observe(len(contexts), sum(contexts), _NO_PREFILL, step_ms)
    truth = Device(profile, replace(disturbance, noise=0.0), _MAX_WIDTH, seed)
    errors, gaps, externalities = [], [], []
    for contexts in _batches(rng, _NUM_HELD_OUT):
        num_baseline = max(1, len(contexts) - int(rng.integers(4, 64)))
        true_ms, true_baseline_ms = (
            truth.step_ms(part, _NO_PREFILL) for part in (contexts, contexts[:num_baseline])
        )
        step_ms, baseline_ms = (
            predictor.predict_step_ms(len(part), sum(part))
            for part in (contexts, contexts[:num_baseline])
        )
        errors.append((true_ms - step_ms) / true_ms)
        externalities.append(abs(true_ms - true_baseline_ms))
        gaps.append(abs((step_ms - baseline_ms) - (true_ms - true_baseline_ms)))
    return PredictorError(
        mape=float(np.mean(np.abs(errors))),
        externality_error=float(np.sum(gaps) / np.sum(externalities)),
        p95_under=float(max(0.0, np.percentile(errors, 95))),
    )


def _batches(rng: np.random.Generator, num: int) -> Iterator[list[int]]:
    """Contexts of batches whose width wanders log-uniformly between 8 and 192."""
    log_width = np.log(64.0)
    for _ in range(num):
        log_width += 0.15 * rng.standard_normal()
        log_width = float(np.clip(log_width, np.log(8), np.log(192)))
        contexts = rng.lognormal(np.log(2000), 0.6, round(np.exp(log_width)))
        yield np.clip(contexts, 128, 16000).astype(int).tolist()


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m perf.predictor_error", description=__doc__)
    parser.add_argument(
        "--profile", action="append", metavar="NAME", help="files or names (all that are shipped)"
    )
    arguments = parser.parse_args()
    table = Table("profile", "device", "MAPE %", "externality error %", "P95 under %")
    for profile_name in arguments.profile or PROFILES:
        try:
            profile = named_profile(profile_name)
        except ProfileError as error:
            parser.exit(1, f"error: {error}\n")
        for name, disturbance in DISTURBANCES.items():
            error = predictor_error(profile, disturbance)
            figures = (error.mape, error.externality_error, error.p95_under)
            stem = Path(profile_name).stem
            table.add_row(stem, name, *(f"{100 * figure:.1f}" for figure in figures))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
