"""T(S, P): the step latency model, fitted from a profile and corrected online.

For every measured width w the profile gives a line in the total context C of the batch,
T = a_w + s_w C (a single plane over all widths has 5 % error on the step but 40 % on the
externality, which is what admission needs). Engines that pad use the line of the padded width;
others interpolate between measured widths. Prefill adds a term of its own.

The correction is a factor per width bucket on a factor common to all, learned from measured steps
by bounded moves, so that one slow step cannot throw it off.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from taper_trtllm.batch import FloatArray, IntArray, PrefillLoad
from taper_trtllm.profile import DecodePoint, LatencyProfile

PredictorMode = Literal["corrected", "uncorrected", "constant"]

_GAIN = 0.05  # share of a residual that a step moves each of the two factors by
_MAX_RESIDUAL = 0.25  # log residual beyond which a step counts as an outlier and is clipped
_MAX_CORRECTION = np.log(4.0)


class StepLatencyPredictor:
    """Predicts the latency of a step from its width, total context and prefill load.

    Args:
        profile: Measured step times.
        max_width: Widest step that will be asked for.
        mode: ``corrected``; ``uncorrected`` ignores observations; ``constant`` charges every
            sequence the same (both are ablations).
    """

    def __init__(
        self, profile: LatencyProfile, max_width: int = 1024, mode: PredictorMode = "corrected"
    ) -> None:
        self._mode = mode
        knots, intercepts, slopes = _fit_lines(profile.decode)
        widths = np.arange(max_width + 1)
        self._position = _knot_positions(widths, knots, profile.width_buckets)
        self._fitted_intercept_ms = np.maximum(_between(self._position, intercepts), 1e-6)
        self._fitted_slope_ms = np.maximum(_between(self._position, slopes), 0.0)
        if mode == "constant":
            self._make_constant(profile.decode)
        self._fitted_intercept_ms[0] = self._fitted_slope_ms[0] = 0.0  # no decode
        self._global_log = 0.0
        self._bucket_log = np.zeros(len(knots))
        self._prefill_log = 0.0
        self._correction_position = np.minimum(self._position, len(knots) - 1)
        # The corrected lines of every width; predictions read these alone.
        self._intercept_ms = self._fitted_intercept_ms
        self._slope_ms = self._fitted_slope_ms
        self._prefill_terms: list[float] = _fit_prefill(profile, self).tolist()

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
            steps_ms += self._prefill_ms(first_width, prefill)
        return steps_ms

    def predict_step_ms(
        self, width: int, context_tokens: int, prefill: PrefillLoad | None = None
    ) -> float:
        """T for one batch, in milliseconds."""
        step_ms = float(self._intercept_ms[width] + self._slope_ms[width] * context_tokens)
        if prefill is not None and prefill.num_tokens:
            step_ms += self._prefill_ms(width, prefill)
        return step_ms

    def _prefill_ms(self, width: int, load: PrefillLoad) -> float:
        base, chunk, token, pair = self._prefill_terms
        extra = chunk * load.num_chunks + token * load.num_tokens + pair * load.token_context
        return math.exp(self._prefill_log) * (extra + (base if width == 0 else 0.0))

    def prefill_token_weight(self, context_tokens: float) -> float:
        """Cost of a prefill token behind a context, in tokens without one.

        It attends to all of the context: behind a long one it takes several times as long.
        """
        _, _, token, pair = self._prefill_terms
        return 1.0 + context_tokens * pair / token if token > 0 else 1.0

    @property
    def correction_factor(self) -> float:
        """The factor common to all widths; 1 while nothing was learned."""
        return float(np.exp(self._global_log))

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
        residual = _clipped_log(step_ms / self.predict_step_ms(width, context_tokens))
        self._global_log = _bounded(self._global_log + _GAIN * residual)
        low = int(self._correction_position[width])
        share = float(self._correction_position[width]) - low
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if weight > 0:
                moved = self._bucket_log[knot] + _GAIN * weight * residual
                self._bucket_log[knot] = _bounded(moved)
        log = self._global_log + _between(self._correction_position, self._bucket_log)
        factor = np.exp(np.clip(log, -_MAX_CORRECTION, _MAX_CORRECTION))
        self._intercept_ms = factor * self._fitted_intercept_ms
        self._slope_ms = factor * self._fitted_slope_ms

    def _observe_prefill(
        self, width: int, context_tokens: int, prefill: PrefillLoad, step_ms: float
    ) -> None:
        decode = self.predict_step_ms(width, context_tokens)
        expected = self.predict_step_ms(width, context_tokens, prefill) - decode
        measured = max(step_ms - decode, 0.1 * expected)
        if expected > 0:
            residual = _clipped_log(measured / expected)
            self._prefill_log = _bounded(self._prefill_log + _GAIN * residual)

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


def _fit_prefill(profile: LatencyProfile, decode: StepLatencyPredictor) -> FloatArray:
    """Prefill-only base, per chunk, per token, per query-key pair; ms each."""
    rows, rest = [], []
    for p in profile.prefill:
        known = decode.predict_step_ms(p.width, p.width * p.context_tokens)
        rows.append([float(p.width == 0), p.num_chunks, p.num_tokens, p.token_context])
        rest.append((max(p.step_ms - known, 0.0), p.step_ms))
    target, scale = np.array(rest).T
    return _nonnegative(np.array(rows, dtype=float) / scale[:, None], target / scale)


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


def _knot_positions(
    widths: IntArray, knots: FloatArray, buckets: tuple[int, ...] | None
) -> FloatArray:
    """Each width's place among the measured widths: fractional if the engine does not pad."""
    values = widths.astype(float)
    if buckets is not None:
        padded = np.array(sorted(buckets), dtype=float)
        index = np.minimum(np.searchsorted(padded, values), len(padded) - 1)
        values = np.maximum(padded[index], values)
    position = np.interp(values, knots, np.arange(len(knots)))
    beyond = values > knots[-1]
    position[beyond] = len(knots) - 1 + (values[beyond] - knots[-1]) / (knots[-1] - knots[-2])
    return position


def _between(position: FloatArray, values: FloatArray) -> FloatArray:
    """Linear interpolation at fractional positions, extrapolated beyond the last."""
    low = np.minimum(position.astype(np.int64), len(values) - 2)
    share = position - low
    result: FloatArray = values[low] * (1 - share) + values[low + 1] * share
    return result


def _clipped_log(ratio: float) -> float:
    return float(np.clip(np.log(max(ratio, 1e-9)), -_MAX_RESIDUAL, _MAX_RESIDUAL))


def _bounded(value: npt.ArrayLike) -> float:
    return float(np.clip(value, -_MAX_CORRECTION, _MAX_CORRECTION))
