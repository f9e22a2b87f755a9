"""The latency model: fit, staircase, correction, and profiles that do not match."""

from __future__ import annotations

import numpy as np
import pytest
from toy_engine import step_ms, toy_profile

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import (
    DecodePoint,
    LatencyProfile,
    PrefillPoint,
    ProfileError,
    load_profile,
)

NO_PREFILL = PrefillLoad()


def externality_error(predictor: StepLatencyPredictor, truth) -> float:
    rng = np.random.default_rng(0)
    gap = total = 0.0
    for _ in range(300):
        low, high = np.sort(rng.integers(1, 64, 2))
        contexts = rng.integers(16, 256, high)
        c0, c1 = int(contexts[:low].sum()), int(contexts.sum())
        true = truth(high, c1) - truth(low, c0)
        guess = predictor.predict_step_ms(high, c1) - predictor.predict_step_ms(low, c0)
        gap += abs(guess - true)
        total += abs(true)
    return gap / total


def test_fit_is_exact_on_a_line_and_between_its_points():
    predictor = StepLatencyPredictor(toy_profile())
    assert externality_error(predictor, lambda w, c: step_ms(w, c, 0)) < 1e-6
    load = PrefillLoad(1, 20, 20 * 10.0)
    assert predictor.predict_step_ms(5, 5 * 64, load) == pytest.approx(
        step_ms(5, 320, 20), rel=0.02
    )


def test_buckets_learn_a_staircase_that_one_plane_cannot():
    buckets = (1, 8, 16, 32, 64)

    def truth(width: int, context: int) -> float:
        padded = min(b for b in buckets if b >= width)
        return {1: 5.0, 8: 6.0, 16: 9.0, 32: 9.5, 64: 20.0}[padded] + 2e-4 * context

    points = [(w, c, truth(w, w * c)) for w in buckets for c in (16, 64, 256)]
    profile = LatencyProfile(
        fingerprint={"engine": "tiles"},
        width_buckets=buckets,
        decode=tuple(DecodePoint(width=w, context_tokens=c, step_ms=t) for w, c, t in points),
        prefill=toy_profile().prefill,
    )
    design = np.array([[1, w, w * c] for w, c, _ in points], dtype=float)
    times = np.array([t for _, _, t in points])
    a, b, s = np.linalg.lstsq(design / times[:, None], np.ones(len(times)), rcond=None)[0]

    class Plane:
        def predict_step_ms(self, width: int, context: int) -> float:
            return a + b * width + s * context

    assert externality_error(StepLatencyPredictor(profile), truth) < 0.01
    assert externality_error(Plane(), truth) > 0.2


def test_correction_learns_a_wrong_profile_and_a_local_error():
    predictor = StepLatencyPredictor(toy_profile())
    rng = np.random.default_rng(1)

    def truth(width: int, context: int) -> float:
        return step_ms(width, context, 0) * (1.5 if width > 20 else 1.2)

    for _ in range(2000):
        width = int(rng.integers(1, 60))
        context = width * int(rng.integers(16, 256))
        noise = float(np.exp(0.03 * rng.standard_normal()))
        predictor.observe(width, context, NO_PREFILL, truth(width, context) * noise)
    for width in (2, 12, 40):
        guess = predictor.predict_step_ms(width, width * 100)
        assert guess == pytest.approx(truth(width, width * 100), rel=0.06)


def test_one_slow_step_moves_a_prediction_by_little_and_many_never_beyond_the_bound():
    predictor = StepLatencyPredictor(toy_profile())
    before = predictor.predict_step_ms(16, 1600)
    predictor.observe(16, 1600, NO_PREFILL, before * 1000)
    assert predictor.predict_step_ms(16, 1600) <= before * 1.03
    for _ in range(10_000):
        predictor.observe(16, 1600, NO_PREFILL, before * 1000)
    assert predictor.predict_step_ms(16, 1600) <= before * 4.001


def test_prefill_steps_correct_the_prefill_term_alone():
    predictor = StepLatencyPredictor(toy_profile())
    load = PrefillLoad(1, 32, 512.0)
    decode = predictor.predict_step_ms(8, 512)
    extra = predictor.predict_step_ms(8, 512, load) - decode
    for _ in range(500):
        predictor.observe(8, 512, load, decode + 2 * extra)
    assert predictor.predict_step_ms(8, 512) == decode
    assert predictor.predict_step_ms(8, 512, load) - decode == pytest.approx(2 * extra, rel=0.05)


def test_a_prefill_token_weighs_what_its_context_costs():
    points = [
        PrefillPoint(
            width=0, context_tokens=0, num_chunks=1, num_tokens=n, token_context=n * (c + n / 2),
            step_ms=2.0 + 0.1 * n + 1e-4 * n * (c + n / 2),
        )
        for n in (4, 32, 128) for c in (0, 512)
    ]  # fmt: skip
    predictor = StepLatencyPredictor(toy_profile().model_copy(update={"prefill": tuple(points)}))
    assert predictor.prefill_token_weight(0) == 1
    assert predictor.prefill_token_weight(3000) == pytest.approx(4.0, rel=0.01)


def test_prefill_points_wider_than_the_engine_are_left_out():
    """Profiles of GPUs have mixed steps beside 512 sequences; a server may be narrower."""
    wide = toy_profile().prefill[0].model_copy(update={"width": 512, "context_tokens": 64})
    both = toy_profile().model_copy(update={"prefill": (*toy_profile().prefill, wide)})
    load = PrefillLoad(1, 20, 200.0)
    expected = StepLatencyPredictor(toy_profile(), 64).predict_step_ms(4, 256, load)
    assert StepLatencyPredictor(both, 64).predict_step_ms(4, 256, load) == expected
    with pytest.raises(ProfileError, match="width of at most 64"):
        StepLatencyPredictor(toy_profile().model_copy(update={"prefill": (wide,)}), 64)


def test_ablations():
    uncorrected = StepLatencyPredictor(toy_profile(), mode="uncorrected")
    before = uncorrected.predict_step_ms(8, 800)
    uncorrected.observe(8, 800, NO_PREFILL, 100.0)
    assert uncorrected.predict_step_ms(8, 800) == before
    constant = StepLatencyPredictor(toy_profile(), mode="constant")
    short = constant.predict_step_ms(9, 100) - constant.predict_step_ms(8, 90)
    long = constant.predict_step_ms(40, 9000) - constant.predict_step_ms(39, 8000)
    assert short == pytest.approx(long)


def test_a_profile_survives_the_disk_and_refuses_what_it_was_not_measured_on(tmp_path):
    path = tmp_path / "profile.json"
    toy_profile().save(path)
    assert load_profile(path) == toy_profile()
    toy_profile().check_fingerprint({"engine": "toy"})
    with pytest.raises(ProfileError, match=r"engine: profile 'toy', engine 'torch'.*calibrate"):
        toy_profile().check_fingerprint({"engine": "torch"})
    with pytest.raises(ProfileError, match="calibrate"):
        load_profile(tmp_path / "absent.json")
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":9', 1))
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9', 1))
    with pytest.raises(ProfileError, match="schema_version"):
        load_profile(path)


def test_without_a_point_of_prefill_alone_the_weights_are_still_paid_for():
    full = toy_profile()
    beside = full.model_copy(update={"prefill": tuple(p for p in full.prefill if p.width)})
    load = PrefillLoad().with_chunk(64, 0)
    alone, guessed = (
        StepLatencyPredictor(p, 64).predict_step_ms(0, 0, load) for p in (full, beside)
    )
    assert guessed == pytest.approx(alone, rel=0.25)
