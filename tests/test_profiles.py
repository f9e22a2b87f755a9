"""The shipped latency profiles of data-centre GPUs."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.engines.simulated import StepTimes
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import LatencyProfile, load_profile

PATHS = sorted((Path(__file__).parent.parent / "perf" / "profiles").glob("*.json"))
HELD_OUT = Path(__file__).parent / "held_out_steps.json"
NAMES = {
    *("h200_fp8_tp1", "h200_bf16_tp1", "h200_bf16_tp2", "h200_fp8_tp2"),
    *("h100_fp8_tp1", "h100_bf16_tp2", "b200_fp8_tp1"),
}
HOPPER_FP8 = {"h200_fp8_tp1", "h200_fp8_tp2", "h100_fp8_tp1"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def profile(path: Path) -> LatencyProfile:
    return load_profile(path)


def steps_by_width(profile: LatencyProfile) -> dict[int, list[float]]:
    """Decode times of each width, by rising context."""
    steps = defaultdict(list)
    for point in sorted(profile.decode, key=lambda p: p.context_tokens):
        steps[point.width].append(point.step_ms)
    return steps


def test_all_are_there():
    assert {path.stem for path in PATHS} == NAMES


def test_names_what_it_is_and_where_it_comes_from(path: Path, profile: LatencyProfile):
    gpu, dtype, parallel = path.stem.split("_")
    assert gpu.upper() in profile.fingerprint["device"]
    assert profile.fingerprint["dtype"] == dtype
    assert "tp" + profile.fingerprint["tensor_parallel_size"] == parallel
    assert "FP8" in profile.fingerprint["variant"] or dtype == "bf16"
    assert "aiconfigurator-core" in profile.provenance["package"]
    assert "Apache-2.0" in profile.provenance["licence"]
    assert "NVIDIA" in profile.provenance["licence"]


def test_every_padded_width_is_measured_within_reach_of_the_kv_cache(profile: LatencyProfile):
    assert {p.width for p in profile.decode} == set(profile.width_buckets)
    kv_cache_tokens = int(profile.provenance["kv_cache_tokens"])
    tokens = max(p.width * p.context_tokens for p in profile.decode)
    assert kv_cache_tokens < tokens <= 4 * kv_cache_tokens


def test_decode_grows_with_context(profile: LatencyProfile):
    for width, steps in steps_by_width(profile).items():
        # Up to 4 sequences attention is a few per cent of the step, and its measurements are noisy.
        noise = 0.02 if width <= 4 else 0.0
        for shorter, longer in pairwise(steps):
            assert longer > (1 - noise) * shorter, width
        assert steps[-1] > steps[0], width


def test_fp8_on_hopper_is_a_staircase_that_padding_leaves(path: Path, profile: LatencyProfile):
    at_512 = {p.width: p.step_ms for p in profile.decode if p.context_tokens == 512}
    if path.stem in HOPPER_FP8:
        assert at_512[256] < 0.9 * at_512[192]
    else:
        assert at_512[256] > at_512[192]


def test_prefill_costs_more_with_more_tokens_and_behind_a_longer_context(profile: LatencyProfile):
    alone = {(p.num_tokens, p.token_context): p.step_ms for p in profile.prefill if p.width == 0}
    unprefixed = [alone[n, n * n / 2] for n in (256, 512, 1024, 2048, 4096)]
    assert unprefixed == sorted(unprefixed)
    behind_a_context = [alone[1024, 1024 * (prior + 512)] for prior in (0, 2048, 8192)]
    assert behind_a_context == sorted(behind_a_context)


def test_mixed_steps_that_the_profile_does_not_contain(path: Path, profile: LatencyProfile):
    """Composed like its points, at other widths and chunks (`make_profiles --held-out`)."""
    times = StepTimes(profile, 512)
    errors: dict[bool, list[float]] = {False: [], True: []}
    for width, num_tokens, step_ms in json.loads(HELD_OUT.read_text())[path.stem]:
        found_ms = times.decode_ms(width, 2048)
        found_ms += times.prefill_ms(width, PrefillLoad().with_chunk(num_tokens, 0))
        errors[num_tokens < 16].append(abs(found_ms / step_ms - 1))
    # Before chunks were interpolated along equal numbers of rows: 0.19 and 0.78 on Hopper with FP8.
    assert np.mean(errors[False]) < 0.01 and np.quantile(errors[False], 0.95) < 0.05
    assert np.mean(errors[True]) < 0.03  # a branch header


def test_the_predictor_fits_decode(profile: LatencyProfile):
    predictor = StepLatencyPredictor(profile, max_width=512)
    errors = [
        abs(predictor.predict_step_ms(p.width, p.width * p.context_tokens) / p.step_ms - 1)
        for p in profile.decode
    ]
    assert sum(errors) / len(errors) < 0.025  # measured: 0.005 to 0.019
    assert max(errors) < 0.1  # measured: 0.024 to 0.076
