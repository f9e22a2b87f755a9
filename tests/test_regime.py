from __future__ import annotations

from pathlib import Path

import pytest

from perf.program import ProgramCost
from perf.regime import (
    KV_POOL_FOOTPRINTS,
    LENGTH_SCALE,
    MAX_NUM_REQUESTS,
    PROMPT_SCALE,
    TPOT_SLO_STEPS,
    TTFT_SLO_TPOTS,
    fix_regime,
    regime_of,
    trace_costs,
    write_config,
)
from perf.trace import read_trace
from perf.workload import DEFAULT_TRACE
from taper_trtllm.config import ServingConfig, TorchEngineConfig, load_config
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint
from taper_trtllm.request import RequestLimits

BASE = ServingConfig()


def linear_profile(a=3.0, per_sequence=0.25, per_context=4e-4, per_token=0.2) -> LatencyProfile:
    """T = a + per_sequence w + per_context C + per_token tokens."""
    return LatencyProfile(
        fingerprint={"engine": "linear"},
        decode=tuple(
            DecodePoint(
                width=w, context_tokens=c, step_ms=a + per_sequence * w + per_context * w * c
            )
            for w in (1, 8, 64, 256)
            for c in (64, 1024)
        ),
        prefill=tuple(
            PrefillPoint(
                width=0, context_tokens=0, num_chunks=1, num_tokens=n, token_context=0.0,
                step_ms=per_token * n,
            )
            for n in (16, 128)
        ),
    )  # fmt: skip


def cost(output=100, prefill=200, context=400, blocks=21) -> ProgramCost:
    return ProgramCost(
        num_output_tokens=output, critical_tokens=output, footprint_blocks=blocks,
        num_drawn_by_prefill=1,
        decode_context_tokens=output * context, num_prefill_tokens=prefill,
        num_prefill_chunks=1, prefill_token_context=prefill * 100,
    )  # fmt: skip


def test_a_hand_computed_regime():
    predictor = StepLatencyPredictor(linear_profile(), mode="uncorrected")
    regime = fix_regime(predictor, [cost(), cost(output=300, blocks=40)], BASE)
    assert regime.mean_output_tokens == 200 and regime.mean_context_tokens == 400
    single = 3 + 0.25 + 4e-4 * 400
    tau = TPOT_SLO_STEPS * single
    assert regime.tpot_slo_ms == pytest.approx(tau)
    assert regime.ttft_slo_ms == pytest.approx(TTFT_SLO_TPOTS * tau)
    assert regime.prefill_ms == pytest.approx(200 * 0.2, rel=0.01)
    per_sequence = 0.25 + 4e-4 * 400 + 40 / 200  # its token, its context, its share of prefill
    widest = int((tau - 3) / per_sequence)
    assert regime.widest_step == widest
    assert regime.reference_rate == pytest.approx(1e3 * widest / (tau * 200))
    mean_blocks = (21 + 40) / 2
    assert regime.num_kv_blocks == KV_POOL_FOOTPRINTS * MAX_NUM_REQUESTS * mean_blocks
    room_ms = 2 * tau - (3 + 16 * (0.25 + 4e-4 * 400))
    assert regime.max_prefill_tokens == int(room_ms / 0.2 / 16) * 16


def test_the_largest_request_fits():
    predictor = StepLatencyPredictor(linear_profile(), mode="uncorrected")
    costs = [cost(blocks=3)] * 2000 + [cost(blocks=500)]
    assert fix_regime(predictor, costs, BASE).num_kv_blocks >= 500


def test_a_slower_engine_gets_looser_objectives_and_a_lower_rate():
    fast, slow = (
        fix_regime(StepLatencyPredictor(profile, mode="uncorrected"), [cost()], BASE)
        for profile in (linear_profile(), linear_profile(6.0, 0.5, 8e-4, 0.4))
    )
    assert slow.tpot_slo_ms == pytest.approx(2 * fast.tpot_slo_ms)
    assert slow.reference_rate == pytest.approx(fast.reference_rate / 2)
    assert slow.widest_step == fast.widest_step
    assert slow.max_prefill_tokens == fast.max_prefill_tokens


def test_the_configuration_is_what_a_server_reads(tmp_path: Path):
    profile = tmp_path / "profile.json"
    linear_profile().save(profile)
    regime = regime_of(profile, BASE)
    assert regime.length_scale == LENGTH_SCALE
    written = regime.serving_config(BASE, "fixed-cap:2", profile)
    write_config(written, tmp_path / "serving.yaml")
    assert load_config(tmp_path / "serving.yaml") == written
    assert written.scheduler.policy == "fixed-cap:2" and written.profile == profile
    assert written.slo.tpot_ms == regime.tpot_slo_ms
    assert len(regime.lines()) == 4


def test_every_row_of_the_shipped_trace_is_admitted():
    costs = trace_costs(
        DEFAULT_TRACE, LENGTH_SCALE, PROMPT_SCALE, RequestLimits(), TorchEngineConfig()
    )
    assert len(costs) == len(read_trace(DEFAULT_TRACE))
