"""T(S, P): the step latency model, fitted from a profile and corrected online.

For every measured width w the profile gives a line in the total context C of the batch,
T = a_w + s_w C (a single plane over all widths has 5 % error on the step but 40 % on the
externality, which is what admission needs). Engines that pad use the line of the padded width;
others interpolate between measured widths. Prefill adds a term of its own.

Measured steps correct it: decode by `StepCorrection`, prefill by a factor on what `PrefillCost`
says it adds. Moves are bounded, so that one slow step cannot throw the prediction off.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np

from taper_trtllm.batch import FloatArray, IntArray, PrefillLoad
from taper_trtllm.prefill_cost import PrefillCost
from taper_trtllm.profile import DecodePoint, LatencyProfile
from taper_trtllm.step_correction import StepCorrection

PredictorMode = Literal["corrected", "uncorrected", "constant"]

_PREFILL_GAIN = 0.05  # share of a relative residual that one step moves the prefill factor by
_MAX_RESIDUAL = 0.5  # relative residual beyond which a prefill step counts as an outlier
_LEAST_PREFILL_SHARE = 0.1  # of a step, for its prefill time to be read from it
_REFIT_STEPS = 4  # decode steps that share a fit: it costs more than all else that is learned
_LEAST_FACTOR = 0.25  # corrections stay within this and its inverse


class StepLatencyPredictor:
    """Predicts the latency of a step from its width, total context and prefill load.

    Args:
        profile: Measured step times.
        max_width: Widest step that will be asked for.
        mode: ``corrected``; ``uncorrected`` ignores observations; ``constant`` charges every
            sequence the same (both are ablations).

    Attributes:
        shared_context_weight: See `LatencyProfile`.
        correction_factor: Corrected over profiled latency of the last decode step observed.
    """

    def __init__(
        self, profile: LatencyProfile, max_width: int = 1024, mode: PredictorMode = "corrected"
    ) -> None:
        self._mode = mode
        self.shared_context_weight = profile.shared_context_weight
        knots, intercepts, slopes = _fit_lines(profile.decode)
        position = _knot_positions(profile.padded_widths(max_width), knots)
        between = _weights(position, len(knots))
        self._fitted_intercept_ms = np.maximum(_between(between, intercepts), 1e-6)
        self._fitted_slope_ms = np.maximum(_between(between, slopes), 0.0)
        if mode == "constant":
            self._make_constant(profile.decode)
        self._fitted_intercept_ms[0] = self._fitted_slope_ms[0] = 0.0  # no decode
        self._correction = StepCorrection(len(knots), max_width)
        self._least_intercept_ms = _LEAST_FACTOR * self._fitted_intercept_ms
        self._most_intercept_ms = self._fitted_intercept_ms / _LEAST_FACTOR
        self._unit_ms = float(self._fitted_intercept_ms[1])
        self._prefill_factor = 1.0
        self._num_unfitted = 0  # decode steps observed since the last fit
        self.correction_factor = 1.0
        self._correction_position = np.minimum(position, len(knots) - 1)
        self._correction_weights = _weights(self._correction_position, len(knots))
        # The corrected lines of every width; predictions read these alone.
        self._intercept_ms = self._fitted_intercept_ms
        self._slope_ms = self._fitted_slope_ms
        self._prefill = PrefillCost(profile, self.predict_step_ms, max_width)

    # ------------------------------------------------------------------------------ predict

    def predict_steps_ms(
        self, first_width: int, context_tokens: IntArray, prefill: PrefillLoad
    ) -> FloatArray:
        """T for batches of consecutive widths that share a prefill load.

        Args:
            first_width: Decoding sequences of the first batch, at least 1; each batch has one more.
            context_tokens: [N] sum of the contexts of each batch.
            prefill: Prefill load of the step.

        Returns:
            [N] milliseconds.
        """
        widths = slice(first_width, first_width + len(context_tokens))
        steps_ms: FloatArray = self._intercept_ms[widths] + self._slope_ms[widths] * context_tokens
        if prefill.num_tokens:
            steps_ms += self._prefill_ms(first_width, len(context_tokens), prefill)
        return steps_ms

    def predict_step_ms(
        self, width: int, context_tokens: int, prefill: PrefillLoad | None = None
    ) -> float:
        """T for one batch, in milliseconds."""
        step_ms = float(self._intercept_ms[width] + self._slope_ms[width] * context_tokens)
        if prefill is not None and prefill.num_tokens:
            step_ms += float(self._prefill_ms(width, 1, prefill)[0])
        return step_ms

    def _prefill_ms(self, first_width: int, num_steps: int, load: PrefillLoad) -> FloatArray:
        return self._prefill_factor * self._prefill.steps_ms(first_width, num_steps, load)

    def prefill_token_weight(self, context_tokens: float) -> float:
        """Cost of a prefill token behind a context, in tokens without one.

        It attends to all of the context: behind a long one it takes several times as long.
        """
        return self._prefill.token_weight(context_tokens)

    # ------------------------------------------------------------------------------ observe

    def observe(
        self, width: int, context_tokens: int, prefill: PrefillLoad, step_ms: float
    ) -> None:
        """Learns from one measured step; moves are bounded, see the module's docstring."""
        if self._mode != "corrected" or step_ms <= 0:
            return
        if prefill.num_tokens:
            self._observe_prefill(width, context_tokens, prefill, step_ms)
        elif width:
            self._observe_decode(width, context_tokens, step_ms)

    def _observe_decode(self, width: int, context_tokens: int, step_ms: float) -> None:
        correction = self._correction
        parts_ms = np.array(
            [
                self._unit_ms,
                self._fitted_intercept_ms[width],
                self._fitted_slope_ms[width] * context_tokens,
            ]
        )
        position = float(self._correction_position[width])
        correction.observe(width, parts_ms, position, step_ms)
        self._num_unfitted += 1
        if self._num_unfitted == _REFIT_STEPS:
            self._refit()
        self.correction_factor = self.predict_step_ms(width, context_tokens) / float(
            parts_ms[1] + parts_ms[2]
        )

    def _refit(self) -> None:
        """Draws the lines of every width anew."""
        self._num_unfitted = 0
        correction = self._correction
        correction.refit()
        constant, per_width, per_context = correction.coefficients
        bucket = _between(self._correction_weights, correction.bucket_log)
        bucket += correction.width_log
        np.exp(bucket, out=bucket)
        intercept_ms = bucket * (per_width * self._fitted_intercept_ms + constant * self._unit_ms)
        np.maximum(intercept_ms, self._least_intercept_ms, out=intercept_ms)
        self._intercept_ms = np.minimum(intercept_ms, self._most_intercept_ms, out=intercept_ms)
        slope = np.minimum(per_context * bucket, 1 / _LEAST_FACTOR)
        self._slope_ms = slope * self._fitted_slope_ms

    def _observe_prefill(
        self, width: int, context_tokens: int, prefill: PrefillLoad, step_ms: float
    ) -> None:
        decode_ms = self.predict_step_ms(width, context_tokens)
        expected_ms = self.predict_step_ms(width, context_tokens, prefill) - decode_ms
        if expected_ms > _LEAST_PREFILL_SHARE * decode_ms:  # otherwise the ratio says nothing
            residual = (step_ms - decode_ms) / expected_ms - 1.0
            residual = min(max(residual, -_MAX_RESIDUAL), _MAX_RESIDUAL)
            factor = self._prefill_factor * (1.0 + _PREFILL_GAIN * residual)
            self._prefill_factor = min(max(factor, _LEAST_FACTOR), 1 / _LEAST_FACTOR)

    # ------------------------------------------------------------------------------ ablation

    def _make_constant(self, decode: tuple[DecodePoint, ...]) -> None:
        """One price per sequence, whatever its context and the width."""
        context = float(np.median([p.context_tokens for p in decode]))
        widths = np.arange(len(self._fitted_intercept_ms))
        top = min(len(widths) - 1, max(p.width for p in decode))
        full = self._fitted_intercept_ms + self._fitted_slope_ms * context * widths
        price = (full[top] - full[1]) / max(1, top - 1)
        self._fitted_intercept_ms = full[1] + price * (widths - 1)
        self._fitted_slope_ms = np.zeros(len(widths))


# ------------------------------------------------------------------------------------ fitting


def _fit_lines(points: tuple[DecodePoint, ...]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Relative least squares of T = a + s C for each width; widths, intercepts, slopes."""
    widths = sorted({p.width for p in points})
    lines = []
    for width in widths:
        rows = [p for p in points if p.width == width]
        step_ms = np.array([p.step_ms for p in rows])
        total = np.array([float(width * p.context_tokens) for p in rows])
        design = np.stack([np.ones(len(rows)), total], axis=1)
        intercept, slope = _nonnegative(design / step_ms[:, None], np.ones(len(rows)))
        lines.append((intercept, slope))
    columns = np.array(lines)
    return np.array(widths, dtype=float), columns[:, 0], columns[:, 1]


def _nonnegative(design: FloatArray, target: FloatArray) -> FloatArray:
    """Least squares with coefficients >= 0, exact for the few columns that are used here."""
    num = design.shape[1]
    best, best_error = np.zeros(num), float(np.sum(target**2))
    for size in range(1, num + 1):
        for columns in combinations(range(num), size):
            part = design[:, columns]
            solution = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.sum((part @ solution - target) ** 2))
            if (solution >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(num), error
                best[list(columns)] = solution
    return best


def _knot_positions(widths: FloatArray, knots: FloatArray) -> FloatArray:
    """Each width's place among the measured widths, fractional between two."""
    position = np.interp(widths, knots, np.arange(len(knots)))
    beyond = widths > knots[-1]
    position[beyond] = len(knots) - 1 + (widths[beyond] - knots[-1]) / (knots[-1] - knots[-2])
    return position


def _weights(position: FloatArray, num_knots: int) -> tuple[IntArray, FloatArray]:
    """The knot below each fractional position, and the share of the next."""
    low = np.minimum(position.astype(np.int64), num_knots - 2)
    return low, position - low


def _between(weights: tuple[IntArray, FloatArray], values: FloatArray) -> FloatArray:
    """Linear interpolation, extrapolated beyond the last knot."""
    low, share = weights
    result: FloatArray = values[low]
    result += share * (values[low + 1] - result)
    return result
