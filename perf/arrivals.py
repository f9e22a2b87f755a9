"""Arrival times of an open-loop run: the schedule is drawn before the first request is sent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def gamma_arrivals_s(
    num_requests: int, request_rate: float, burstiness: float, rng: np.random.Generator
) -> FloatArray:
    """Draws arrivals whose gaps are gamma distributed, as vLLM does.

    Args:
        num_requests: Requests to schedule.
        request_rate: Requests per second; infinite for all at once.
        burstiness: Shape of the gaps: 1 is a Poisson process, below 1 is burstier.
        rng: Source of randomness.

    Returns:
        [num_requests] ascending seconds; the last is num_requests / request_rate, so that the
        realised rate is the asked one.
    """
    if np.isinf(request_rate):
        return np.zeros(num_requests)
    gaps = rng.gamma(shape=burstiness, scale=1 / (request_rate * burstiness), size=num_requests)
    return _rescale(np.cumsum(gaps), request_rate)


def trace_arrivals_s(recorded_s: FloatArray, request_rate: float) -> FloatArray:
    """Replays recorded arrivals.

    Args:
        recorded_s: [n] ascending arrivals of the requests.
        request_rate: Rate to stretch them to; infinite keeps the recorded times.

    Returns:
        [n] seconds since the first arrival.
    """
    since_first_s = recorded_s - recorded_s[0]
    return since_first_s if np.isinf(request_rate) else _rescale(since_first_s, request_rate)


def _rescale(arrivals_s: FloatArray, request_rate: float) -> FloatArray:
    """Stretches a schedule so that n requests take n / request_rate seconds."""
    target_s = len(arrivals_s) / request_rate
    if arrivals_s[-1] <= 0:  # every arrival at once: nothing to stretch
        return np.full(len(arrivals_s), target_s)
    stretched: FloatArray = arrivals_s * (target_s / arrivals_s[-1])
    return stretched
