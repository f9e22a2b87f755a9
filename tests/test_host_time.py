from __future__ import annotations

import pytest
from toy_engine import ToyEngine, toy_profile

from engine_build.calibrate import Calibrator, Grid
from perf.host_time import HostTimeError, add_host_time, host_ms
from taper_trtllm.config import ServingConfig
from taper_trtllm.engines import create_engine
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import ProfileError, load_profile


def step(step_ms, predicted_step_ms=5.0, num_prefill_tokens=0):
    return {
        "step_ms": step_ms,
        "predicted_step_ms": predicted_step_ms,
        "num_prefill_tokens": num_prefill_tokens,
    }


def test_host_time_is_what_decode_steps_take_beyond_the_profile():
    steps = [step(6.0), step(7.0)] * 200
    chunks = [step(50.0, num_prefill_tokens=64), step(50.0, predicted_step_ms=None)] * 100
    hiccups = [step(900.0)] * 4
    assert host_ms(steps + chunks + hiccups) == pytest.approx(1.5, abs=0.02)
    assert host_ms([step(4.0)] * 200) == 0.0


def test_too_few_steps_are_refused():
    with pytest.raises(HostTimeError, match="99 steps"):
        host_ms([step(6.0)] * 99)


def test_every_predicted_step_grows_by_the_host_time():
    profile = toy_profile()
    before, after = (StepLatencyPredictor(p, 64) for p in (profile, profile.with_host_time(2.0)))
    for width in (1, 7, 64):
        alone_ms, served_ms = (p.predict_step_ms(width, 100 * width) for p in (before, after))
        assert served_ms - alone_ms == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("num_kv_blocks", [560, 700, 1500])
def test_every_pool_that_can_be_calibrated_gives_a_profile(num_kv_blocks):
    """A width that fits at one context alone cannot be fitted, and is left out."""
    grid = Grid((1, 8, 24, 48, 96), (32, 128), prefill_tokens=(32,), repetitions=2, num_checks=2)
    profile, _ = Calibrator(ToyEngine(num_kv_blocks=num_kv_blocks), grid).measure({})
    assert {p.width for p in profile.decode} >= {1, 8}


@pytest.mark.triton
def test_a_real_server_tells_its_host_time_once(tmp_path):
    config = ServingConfig()
    engine = create_engine(config.engine)
    grid = Grid((1, 8, 16), (64, 256), prefill_tokens=(64,), repetitions=5, num_checks=2)
    alone, _ = Calibrator(engine, grid).measure({})
    engine.shutdown()
    path = tmp_path / "profile.json"
    alone.save(path)
    completed = add_host_time(path, config)
    assert completed == load_profile(path)
    added = [b.step_ms - a.step_ms for a, b in zip(alone.decode, completed.decode, strict=True)]
    assert added == pytest.approx([float(completed.provenance["host_ms"])] * len(added), abs=1e-3)
    with pytest.raises(ProfileError, match="already"):
        add_host_time(path, config)
