"""Online correction of the fitted step latency, learned from measured steps.

The profile's model of a decode step has two parts, a_w (what the width costs) and s_w C (reading
the contexts). Reality differs in ways that are not one factor: host overhead adds a constant, other
kernels or unequal contexts scale one part. So the correction is

    T = e^(b_w) (alpha u + beta a_w + gamma s_w C)

with u = T(1), three shared coefficients by recursive least squares on relative errors, and a
residual b_w per width bucket. Old steps are forgotten, residuals are clipped, and a weak pull
towards the profile (0, 1, 1) keeps the coefficients in place where steps of one kind do not
determine them. One factor for all would scale the externality along with a constant overhead.
"""

from __future__ import annotations

import math

import numpy as np

from taper_trtllm.batch import FloatArray

_MEMORY_STEPS = 200  # older steps are forgotten
_PRIOR_STEPS = 60.0  # steps that the profile counts for at first ...
_PULL_STEPS = 1.0  # ... and for ever
_BUCKET_GAIN = 0.02  # share of a residual that goes to the bucket
_MOST_BELOW, _MOST_ABOVE = (
    -0.25,
    0.5,
)  # relative residuals are clipped to these: slow steps are rare
_MAX_BUCKET = np.log(2.0)
_MAX_FACTOR = 4.0
_PROFILE = np.array([0.0, 1.0, 1.0])
_LEAST = np.array([-_MAX_FACTOR, 0.0, 0.0])
_KEEP = 1.0 - 1.0 / _MEMORY_STEPS
_PULL = (1.0 - _KEEP) * _PULL_STEPS * np.eye(3)
_PULL_MOMENT = _PULL @ _PROFILE


class StepCorrection:
    """Learns the three coefficients and the residual of each bucket.

    Args:
        num_buckets: Measured widths.
    """

    def __init__(self, num_buckets: int) -> None:
        self.coefficients = _PROFILE.copy()
        self.bucket_log = np.zeros(num_buckets)
        self._information = _PRIOR_STEPS * np.eye(3)
        self._moment = self._information @ _PROFILE

    def observe(self, parts_ms: FloatArray, position: float, step_ms: float) -> None:
        """Learns from one decode step.

        Args:
            parts_ms: [3] u, a_w and s_w C of the step, uncorrected.
            position: Its width's place among the buckets, fractional between two.
            step_ms: Measured.
        """
        predicted_ms = max(
            float(self.coefficients @ parts_ms), float(parts_ms[1] + parts_ms[2]) / _MAX_FACTOR
        )
        low = int(position)
        share = position - low
        bucket = self.bucket_log[low]
        if share:
            bucket = bucket * (1 - share) + self.bucket_log[low + 1] * share
        expected = math.exp(bucket)
        residual = step_ms / (predicted_ms * expected) - 1.0
        residual = min(max(residual, _MOST_BELOW), _MOST_ABOVE)
        # The buckets take what the coefficients leave, not the other way round.
        self._fit(parts_ms / predicted_ms, expected * (1.0 + residual))
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if weight:
                moved = self.bucket_log[knot] + _BUCKET_GAIN * weight * residual
                self.bucket_log[knot] = min(max(moved, -_MAX_BUCKET), _MAX_BUCKET)

    def _fit(self, row: FloatArray, target: float) -> None:
        """One step of regularised recursive least squares, in shares of the predicted step."""
        self._information *= _KEEP
        self._information += row[:, None] * row
        self._information += _PULL
        self._moment *= _KEEP
        self._moment += row * target
        self._moment += _PULL_MOMENT
        solved = np.linalg.solve(self._information, self._moment)
        self.coefficients = np.minimum(np.maximum(solved, _LEAST), _MAX_FACTOR)
