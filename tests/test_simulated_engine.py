"""The virtual-time engine takes as long as its profile says, and prefill where it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

import perf
from engine_build.calibrate import Calibrator, Grid
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.base import PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.simulated import (
    Device,
    Disturbance,
    SimulatedConfig,
    SimulatedEngine,
    StepTimes,
)
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.profile import load_profile
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestLimits,
    SamplingParams,
    SerialStage,
    SloTarget,
)

PROFILE = load_profile(Path(perf.__path__[0]) / "profiles" / "h200_fp8_tp1.json")
PARAMS = SequenceParams(SamplingParams(ignore_eos=True), seed=0)


def test_every_measured_decode_point_is_hit_and_widths_between_are_padded():
    times = StepTimes(PROFILE, 512)
    for point in PROFILE.decode:
        assert times.decode_ms(point.width, point.context_tokens) == pytest.approx(point.step_ms)
    assert times.decode_ms(36, 2048) == pytest.approx(times.decode_ms(40, 2048 * 36 / 40))
    assert times.decode_ms(0, 0) == 0


def test_a_disturbance_does_what_it_says():
    def step_ms(**changes: float) -> float:
        device = Device(PROFILE, Disturbance(**changes), 256, seed=0)
        return device.step_ms([1000] * 64 + [3000] * 64, PrefillLoad())

    plain = step_ms()
    assert step_ms(host_overhead_ms=2.5) == pytest.approx(plain + 2.5)
    assert step_ms(step_scale=1.3) == pytest.approx(plain * 1.3)
    assert step_ms(width_shift=1) > plain  # 128 is a bucket; 129 is padded to the next
    assert plain < step_ms(imbalance=0.5) < step_ms(imbalance=1.0)
    assert step_ms(context_scale=1.5) == pytest.approx(step_ms(imbalance=1.0))
    assert step_ms(noise=0.1) != plain


@pytest.mark.parametrize("is_remote", [False, True])
def test_chunks_cost_time_where_they_are_computed(is_remote):
    engine = SimulatedEngine(PROFILE, SimulatedConfig(num_kv_blocks=100))
    engine.add_sequence(1, 1, [0] * 256, PARAMS)
    prompt = engine.step(
        StepPlan(prefill=(PrefillChunk(1, 256, sample=True, is_remote=is_remote),))
    )
    engine.fork_sequence(1, 2, 256, [0] * 200, PARAMS)
    header = engine.step(StepPlan(prefill=(PrefillChunk(2, 201, sample=True),)))
    assert (prompt.step_ms == 0) == is_remote
    assert header.step_ms > 0
    assert engine.now_s() == pytest.approx((prompt.step_ms + header.step_ms) / 1e3)
    assert engine.num_tokens(2) == 256 + 1 + 200 + 1


@pytest.mark.parametrize("disaggregated", [False, True])
@pytest.mark.parametrize("free_joins", [False, True])
def test_the_executor_knows_what_is_computed_where(disaggregated, free_joins):
    """What is computed elsewhere comes whole, and no step is foreseen to pay for it, or pays."""
    config = SimulatedConfig(
        num_kv_blocks=2000, disaggregated_prefill=disaggregated, free_joins=free_joins
    )
    executor = TaperExecutor(
        SimulatedEngine(PROFILE, config),
        PROFILE,
        SchedulerConfig(max_prefill_tokens=256, probe_interval_steps=None),
        RequestLimits(max_prompt_tokens=4000, max_total_tokens=8000),
        SloTarget(ttft_ms=1e6, tpot_ms=1e4),
    )
    branches = tuple(Branch(header_ids=(7,) * 40, max_tokens=10) for _ in range(4))
    stages = (SerialStage(max_tokens=20), ParallelStage(branches=branches, join_ids=(8,) * 30),
              SerialStage(max_tokens=20))  # fmt: skip
    records = []
    for i in range(3):
        executor.submit(ForkJoinRequest(request_id=f"r{i}", input_ids=(1,) * 2000, stages=stages))
        records += [executor.run_once() for _ in range(15)]
    while (record := executor.run_once()) is not None:
        records.append(record)
    assert records[0].num_prefill_tokens == (2000 if disaggregated else 256)
    foreseen = [r for r in records if r.predicted_step_ms is not None]
    assert any(r.num_prefill_tokens >= 256 for r in foreseen)
    headers = [r for r in foreseen if r.num_prefill_tokens == 164]
    assert headers and all((r.step_ms < 20) == free_joins for r in headers)
    for record in foreseen:
        assert record.predicted_step_ms == pytest.approx(record.step_ms, rel=0.15)


def test_what_a_suspended_request_computes_again_costs_time_wherever_its_prompt_was_computed():
    config = SimulatedConfig(num_kv_blocks=70, disaggregated_prefill=True)
    executor = TaperExecutor(
        SimulatedEngine(PROFILE, config),
        PROFILE,
        SchedulerConfig(
            max_prefill_tokens=4096, probe_interval_steps=None, kv_reserve_fraction=0.3,
            request_admission="slots",
        ),
        RequestLimits(max_prompt_tokens=2000, max_total_tokens=4000),
        SloTarget(ttft_ms=1e6, tpot_ms=1e4),
    )  # fmt: skip
    for i in range(2):
        request = ForkJoinRequest(request_id=f"r{i}", input_ids=(1,) * 1000, max_tokens=500)
        executor.submit(request)
    records = []
    while (record := executor.run_once()) is not None:
        records.append(record)
    prompts, again = [r for r in records if r.num_prefill_tokens]
    assert prompts.num_prefill_tokens == 2000 and prompts.step_ms == 0
    assert any(r.num_preempted for r in records)
    assert 1000 < again.num_prefill_tokens <= 1500 and again.step_ms > 50


def test_free_extras_cost_nothing_and_are_not_seen():
    """Equal to the baseline alone, with prefill beside it; the predictor learns from that."""
    times = {}
    for free, num_branches in ((False, 1), (True, 1), (True, 8)):
        engine = SimulatedEngine(PROFILE, SimulatedConfig(num_kv_blocks=2000, free_extras=free))
        engine.add_sequence(0, 0, [0] * 1000, PARAMS)
        engine.step(StepPlan(prefill=(PrefillChunk(0, 1000, sample=True),)))
        for branch in range(1, num_branches):
            engine.fork_sequence(0, branch, 1000, [0], PARAMS)
            engine.step(StepPlan(prefill=(PrefillChunk(branch, 2, sample=True),)))
        engine.add_sequence(99, 9, [0] * 300, PARAMS)
        chunk = PrefillChunk(99, 300, sample=True)
        plan = StepPlan(tuple(range(num_branches)), prefill=(chunk,), num_protected=1)
        result = engine.step(plan)
        times[free, num_branches] = result.step_ms
        assert len(result.decoded) == num_branches
        if free:
            (audit,) = result.audits
            assert (audit.width, audit.num_context_tokens) == (1, 1001)
            assert audit.prefill.num_tokens == 300 and audit.step_ms == result.step_ms
        else:
            assert result.audits is None
    assert times[True, 8] == pytest.approx(times[False, 1])
    assert times[True, 1] == pytest.approx(times[False, 1])


def test_a_shared_prefix_is_read_once_where_attention_does_so():
    """Trees of branches: what a step reads is the tokens of the union of its sequences."""
    times = {}
    for shares in (False, True):
        config = SimulatedConfig(num_kv_blocks=2000, prefix_sharing_attention=shares)
        engine = SimulatedEngine(PROFILE, config)
        engine.add_sequence(0, 0, [0] * 4000, PARAMS)
        engine.step(StepPlan(prefill=(PrefillChunk(0, 3999, sample=False),)))
        for child in (1, 2, 3):
            engine.fork_sequence(0, child, 3999, (), PARAMS)
        for _ in range(20):
            engine.step(StepPlan(decode=(1, 2, 3)))
        engine.fork_sequence(1, 4, 4010, (), PARAMS)  # nested: shares 11 tokens of branch 1 too
        engine.step(StepPlan(prefill=(PrefillChunk(4, 10, sample=True),)))
        times[shares] = engine.step(StepPlan(decode=(1, 2, 3, 4))).step_ms
    step_times = StepTimes(PROFILE, 16)
    union = 3999 + 3 * 21 + 10 + 1  # prefix, three branches, and what the nested one has alone
    assert times[True] == pytest.approx(step_times.decode_ms(4, union / 4))
    assert times[False] == pytest.approx(step_times.decode_ms(4, (3 * 4020 + 4021) / 4))


def test_what_is_read_again_weighs_what_the_profile_says():
    profile = PROFILE.model_copy(update={"shared_context_weight": 0.25})
    engine = SimulatedEngine(
        profile, SimulatedConfig(num_kv_blocks=2000, prefix_sharing_attention=True)
    )
    engine.add_sequence(0, 0, [0] * 4000, PARAMS)
    engine.step(StepPlan(prefill=(PrefillChunk(0, 3999, sample=False),)))
    for child in (1, 2, 3):
        engine.fork_sequence(0, child, 3999, (), PARAMS)
    expected = StepTimes(PROFILE, 16).decode_ms(3, (3999 * 1.5 + 3) / 3)
    assert engine.step(StepPlan(decode=(1, 2, 3))).step_ms == pytest.approx(expected)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("policy", ["irp-eager", "taper"])
def test_steps_that_read_a_prefix_once_are_foreseen(policy, weight):
    """Its own cost term: an extra costs its own text, and more of them fit the same budget."""
    profile = PROFILE.model_copy(update={"shared_context_weight": weight})
    widths = []
    for shares in (False, True):
        config = SimulatedConfig(num_kv_blocks=4000, prefix_sharing_attention=shares)
        executor = TaperExecutor(
            SimulatedEngine(profile, config),
            profile,
            SchedulerConfig(policy=policy, max_prefill_tokens=4096, probe_interval_steps=None),
            RequestLimits(max_prompt_tokens=9000, max_total_tokens=30000),
            SloTarget(ttft_ms=1e6, tpot_ms=25),
        )
        stages = (
            SerialStage(max_tokens=2),
            ParallelStage(branches=(Branch(header_ids=(7,), max_tokens=60),) * 40),
            SerialStage(max_tokens=20),
        )
        for i in range(2):
            request = ForkJoinRequest(request_id=f"r{i}", input_ids=(1,) * 8000, stages=stages)
            executor.submit(request)
        records = []
        while (record := executor.run_once()) is not None:
            records.append(record)
        for record in records:
            if record.predicted_step_ms is not None and not record.num_prefill_tokens:
                assert record.predicted_step_ms == pytest.approx(record.step_ms, rel=0.05)
        widths.append(max(record.num_admitted for record in records))
    assert widths[1] > widths[0] if policy == "taper" else widths[1] == widths[0]


@pytest.mark.parametrize("shares", [False, True])
def test_calibration_learns_what_a_shared_prefix_costs(shares):
    profile = PROFILE.model_copy(update={"shared_context_weight": 0.25})
    config = SimulatedConfig(num_kv_blocks=4000, prefix_sharing_attention=shares)
    grid = Grid((1, 8, 16, 32, 64), (128, 512, 1024), repetitions=2, num_checks=2)
    measured, _ = Calibrator(SimulatedEngine(profile, config), grid).measure({})
    weight = measured.shared_context_weight
    assert weight == pytest.approx(0.25, abs=0.06) if shares else weight == 0.0
