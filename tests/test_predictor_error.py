"""The predictor recovers from what its profile does not show; the truth is withheld from it."""

from __future__ import annotations

import pytest

from perf.predictor_error import DISTURBANCES, predictor_error
from perf.shipped_profiles import named_profile


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("profile", ["h200_fp8_tp1", "h200_bf16_tp2"])
def test_errors_on_unseen_batches_stay_small_whatever_the_device_does(profile, name):
    error = predictor_error(named_profile(profile), DISTURBANCES[name])
    assert error.mape <= 0.015
    assert error.externality_error <= 0.08
    assert error.p95_under <= 0.03
