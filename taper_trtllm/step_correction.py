"""Online correction of the fitted step latency, learned from measured steps.

The profile's model of a decode step has two parts, a_w (what the width costs) and s_w C (reading
the contexts). Reality differs in ways that are not one factor: host overhead adds a constant, other
kernels or unequal contexts scale one part, another version begins its tiles elsewhere. So the
correction is

    T = e^(b_w + d_w) (alpha u + beta a_w + gamma s_w C)

with u = T(1), three shared coefficients by recursive least squares on relative errors, a residual
b_w per width bucket, and d_w of each width by itself. Old steps are forgotten, residuals are
clipped, and a weak pull towards the profile (0, 1, 1) keeps the coefficients in place where steps
of one kind do not determine them. One factor for all would scale the externality along with a
constant overhead.

A width is seen seldom, so d_w is a scalar Kalman filter: it believes a few steps of a quiet device,
and needs many of a noisy one. It moves as far as the last two steps of the width agree (to
the median of both and where it is), so that one slow step does not move it.
"""

from __future__ import annotations

import math

import numpy as np

from taper_trtllm.batch import FloatArray

_MEMORY_STEPS = 200  # older steps are forgotten
_PRIOR_STEPS = 60.0  # steps that the profile counts for at first ...
_PULL_STEPS = 1.0  # ... and for ever
_BUCKET_GAIN = 0.02  # share of a residual that goes to the bucket
_MOST_BELOW, _MOST_ABOVE = -0.25, 0.5  # residuals are clipped to these: slow steps are rare
_MAX_LOG = np.log(2.0)  # of the residual of a bucket or a width
_WIDTH_VARIANCE = 0.05**2  # of d_w, before anything is seen
_WIDTH_DRIFT = 0.002**2  # what each step at the width adds to it
_FIRST_NOISE_VARIANCE = 0.05**2
_NOISE_GAIN = 0.01
_MAX_FACTOR = 4.0
_PROFILE = np.array([0.0, 1.0, 1.0])
_LEAST = np.array([-_MAX_FACTOR, 0.0, 0.0])
_KEEP = 1.0 - 1.0 / _MEMORY_STEPS
_PULL = (1.0 - _KEEP) * _PULL_STEPS * np.eye(3)
_PULL_MOMENT = _PULL @ _PROFILE


class StepCorrection:
    """Learns the three coefficients and the residuals of buckets and widths.

    Args:
        num_buckets: Measured widths.
        max_width: Widest step that will be asked for.

    Attributes:
        coefficients: [3] alpha, beta, gamma, as of the last `refit`.
        bucket_log: [num_buckets] b_w at the measured widths, linear between.
        width_log: [max_width + 1] d_w.
    """

    def __init__(self, num_buckets: int, max_width: int) -> None:
        self.coefficients = _PROFILE.copy()
        self.bucket_log = np.zeros(num_buckets)
        self.width_log = np.zeros(max_width + 1)
        self._width_variance = [_WIDTH_VARIANCE] * (max_width + 1)
        self._width_seen: dict[int, float] = {}  # d_w as its last step alone would have it
        self._noise_variance = _FIRST_NOISE_VARIANCE
        self._information = _PRIOR_STEPS * np.eye(3)
        self._moment = self._information @ _PROFILE

    def observe(self, width: int, parts_ms: FloatArray, position: float, step_ms: float) -> None:
        """Learns from one decode step.

        Args:
            width: Sequences in it.
            parts_ms: [3] u, a_w and s_w C of the step, uncorrected.
            position: Its width's place among the buckets, fractional between two.
            step_ms: Measured.
        """
        predicted_ms = max(
            float(self.coefficients @ parts_ms), float(parts_ms[1] + parts_ms[2]) / _MAX_FACTOR
        )
        low = int(position)
        share = position - low
        log = float(self.bucket_log[low] + self.width_log[width])
        if share:
            log += share * float(self.bucket_log[low + 1] - self.bucket_log[low])
        expected = math.exp(log)
        residual = step_ms / (predicted_ms * expected) - 1.0
        residual = min(max(residual, _MOST_BELOW), _MOST_ABOVE)
        # The residuals take what the coefficients leave, not the other way round.
        self._accumulate(parts_ms / predicted_ms, expected * (1.0 + residual))
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if weight:
                moved = self.bucket_log[knot] + _BUCKET_GAIN * weight * residual
                self.bucket_log[knot] = min(max(moved, -_MAX_LOG), _MAX_LOG)
        self._fit_width(width, residual)

    def _fit_width(self, width: int, residual: float) -> None:
        """One step of the Kalman filter of a width; all residuals tell how noisy steps are."""
        self._noise_variance += _NOISE_GAIN * (residual**2 - self._noise_variance)
        log = float(self.width_log[width])
        before, seen = self._width_seen.get(width), log + residual
        self._width_seen[width] = seen
        if before is None:
            return
        variance = self._width_variance[width] + _WIDTH_DRIFT
        gain = variance / (variance + self._noise_variance)
        self._width_variance[width] = (1.0 - gain) * variance
        agreed = min(max(log, min(before, seen)), max(before, seen))
        self.width_log[width] = min(max(log + gain * (agreed - log), -_MAX_LOG), _MAX_LOG)

    def _accumulate(self, row: FloatArray, target: float) -> None:
        """One step of regularised least squares, in shares of the predicted step."""
        self._information *= _KEEP
        self._information += row[:, None] * row
        self._information += _PULL
        self._moment *= _KEEP
        self._moment += row * target
        self._moment += _PULL_MOMENT

    def refit(self) -> None:
        """Solves for the coefficients."""
        solved = np.linalg.solve(self._information, self._moment)
        self.coefficients = np.minimum(np.maximum(solved, _LEAST), _MAX_FACTOR)
