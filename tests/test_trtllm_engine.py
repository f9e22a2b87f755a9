"""Compiled engines: the adapter on the fake executor, under the executor and its policies."""

from __future__ import annotations

import bisect
import functools
import json
import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import expected_outputs, requests
from test_executor import SPECS, Collector, alone, fan_out, named, plain, run_to_end
from test_sequence_table import check_rows
from toy_engine import next_token, step_ms, toy_profile

from engine_build.calibrate import Calibrator, Grid
from perf.shipped_profiles import named_profile
from perf.trtllm_fake.active_request import Submission
from perf.trtllm_fake.decoders import Step, StepOutput
from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    PluginConfig,
    TorchDecoderConfig,
    pretrained_config,
    write_engine_dir,
)
from perf.virtual_trtllm import Leases, VirtualTrtllmEngine
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.config import (
    ConfigError,
    RandomModelConfig,
    SchedulerConfig,
    TorchEngineConfig,
    TrtllmEngineConfig,
    parse_config,
)
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.base import (
    EngineError,
    IterationAudit,
    PrefillChunk,
    SequenceParams,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.simulated import SimulatedConfig, StepTimes
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.engines.trtllm import Place, TrtllmEngine
from taper_trtllm.engines.trtllm_session import News, PlaceRequest, TrtllmSession
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.executor_thread import ExecutorThread
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.live_request import LiveRequest
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestLimits,
    SamplingParams,
    SerialStage,
    SloTarget,
)
from taper_trtllm.request_gate import ExecutorClosedError

BLOCK = 4
TINY = RandomModelConfig(
    hidden_size=64, num_hidden_layers=2, head_dim=16, intermediate_size=96, vocab_size=97, seed=3
)
MODES = ("lease", "slice", "lockstep")
SLO = SloTarget(ttft_ms=200, tpot_ms=8)


class ToyDecoder:
    """The toy model of the executor's tests as the compute of the fake; remembers every step."""

    def __init__(self) -> None:
        self.computed: dict[int, IterationAudit] = {}

    def step(self, step: Step) -> StepOutput:
        contexts = [request.num_tokens for request in step.generation]
        took_ms = step_ms(len(contexts), sum(contexts), step.num_context_tokens)
        load = PrefillLoad()
        for chunk in step.context:
            load = load.with_chunk(chunk.num_tokens, chunk.start)
        self.computed[step.iter] = IterationAudit(
            step.iter, took_ms, len(contexts), sum(contexts), load
        )
        return StepOutput([next_token(r.text.tokens) for r in step.drawing], took_ms / 1e3)

    def release(self, request: Any) -> None:
        pass


@dataclass(frozen=True)
class Planned:
    """A plan as it met the engine.

    Attributes:
        plan: The plan; what it says can act from step `num_launched` on.
        num_launched: Steps that were launched before, the one in flight included.
        placed: Sequences that had a place then.
    """

    plan: StepPlan
    num_launched: int
    placed: frozenset[int]

    @property
    def sequences(self) -> set[int]:
        return {*self.plan.decode, *(chunk.sequence_id for chunk in self.plan.prefill)}


class WatchedEngine(TrtllmEngine):
    """Remembers plans and places, and recounts all blocks after every step.

    Args:
        config: Of the engine.
        num_missing_blocks: Blocks that the runtime has less than the ledger thinks.
    """

    def __init__(self, config: TrtllmEngineConfig, num_missing_blocks: int = 0) -> None:
        self.num_missing_blocks = num_missing_blocks
        self.num_in_vain = 0
        self.plans: list[Planned] = []
        self.owner: dict[int, int] = {}  # sequences by request id
        self.audits: list[IterationAudit] = []
        super().__init__(config, clock=lambda: float(self.runtime.now_s()))

    @property
    def runtime(self) -> Any:
        return self.session.executor.runtime

    def _num_pool_blocks(self) -> int:
        return super()._num_pool_blocks() + self.num_missing_blocks

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(Planned(plan, len(self.runtime.history), frozenset(self._place_of)))
        result = super().step(plan)
        self.audits.extend(result.audits or ())
        self.check_integrity()
        self.runtime.check_integrity()
        self.num_in_vain = 0 if result.decoded or result.prefilled else self.num_in_vain + 1
        assert self.num_in_vain < 100, "the runtime schedules nothing"
        return result

    def _give(self, place: Place) -> None:
        super()._give(place)
        self.owner[self._place_of[place.sequence_id]] = place.sequence_id

    def launched(self) -> list[set[int]]:
        """Sequences in each of the launched steps."""
        return [
            {self.owner[i] for i in step.request_ids if i in self.owner}
            for step in self.runtime.history
        ]

    def assert_idle(self) -> None:
        """Nothing is left, here or in the runtime, once the last cancels have acted."""
        for _ in range(4):
            self.session.poll(0.001)
        assert self.num_free_blocks == self.capabilities.num_kv_blocks
        assert not self._places and not self._place_of and not self._sequences
        assert not self._num_given and not self._num_shared
        assert self.runtime.num_active == self.runtime.num_queued == 0
        self.runtime.check_integrity()


def make_engine(
    path: Path,
    *,
    decoder: Any = None,
    drive: str = "virtual",
    num_kv_blocks: int = 2048,
    num_missing_blocks: int = 0,
    max_num_tokens: int = 512,
    **config: Any,
) -> WatchedEngine:
    """An engine of the toy model, or of `decoder`, with a random tiny model for `torch`."""
    build = BuildConfig(
        max_input_len=4095,
        max_seq_len=4096,
        max_batch_size=64,
        max_num_tokens=max_num_tokens,
        plugin_config=PluginConfig(tokens_per_block=BLOCK),
    )
    fake = FakeEngine(
        drive=drive,
        num_kv_blocks=num_kv_blocks,
        decoder=TorchDecoderConfig(random_model=TINY, step_ms=10),
    )
    write_engine_dir(path, build, fake, pretrained_config(TINY, build.max_seq_len))
    options = {"bindings": "perf.trtllm_fake.bindings", "hysteresis_steps": 2, **config}
    made = TrtllmEngineConfig(kind="trtllm", engine_dir=path, **options)
    if decoder == "torch":
        return WatchedEngine(made, num_missing_blocks)
    decoder = decoder or ToyDecoder()
    with mock.patch("perf.trtllm_fake.bindings.create_decoder", lambda *_: decoder):
        return WatchedEngine(made, num_missing_blocks)


def make_executor(engine: WatchedEngine, policy: str = "taper", **scheduler: Any) -> TaperExecutor:
    shipped = {"kv_reserve_fraction": 1.0}  # `triton_repo/taper/config.trtllm.yaml`
    options = {"max_batch_size": 64, "prefill_chunking": "slack", **shipped, **scheduler}
    config = SchedulerConfig(policy=policy, **options)
    return TaperExecutor(engine, toy_profile(), config, RequestLimits(), SLO)


def run(engine: WatchedEngine, executor: TaperExecutor, batch: Sequence[ForkJoinRequest]) -> None:
    """Runs requests that come one after the other; their text must be that of each one alone."""
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
        executor.run_once()
    run_to_end(executor, engine)
    for request in batch:
        assert collector.last(request.request_id).finish_reason == "completed"
        assert collector.tokens(request.request_id) == alone(request)
    engine.assert_idle()


def greedy(drawn: Sequence[ForkJoinRequest]) -> list[ForkJoinRequest]:
    """Each place has a sampler of its own: only greedy text is the same however it is cut."""
    return [
        r.model_copy(update={"sampling": r.sampling.model_copy(update={"temperature": 0.0})})
        for r in named(list(drawn))
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def model() -> TorchEngine:
    return TorchEngine(
        TorchEngineConfig(
            random_model=TINY, tokens_per_block=BLOCK, num_kv_blocks=1024, max_seq_len=4096
        )
    )


property_test = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


# ------------------------------------------------------------------ token for token


@property_test
@given(
    drawn=st.lists(requests(), min_size=1, max_size=4),
    policy=st.sampled_from(SPECS),
    mode=st.sampled_from(MODES),
    lease_tokens=st.integers(1, 8),
    spare=st.integers(0, 60),
    fraction=st.sampled_from([1.0, 1.0, 0.5, 0.2]),
    max_num_tokens=st.sampled_from([16, 64, 512]),
    slots=st.integers(1, 4),
)
def test_outputs_equal_independent_generation_under_every_schedule(
    path, drawn, policy, mode, lease_tokens, spare, fraction, max_num_tokens, slots
):
    """Rules 4, 5, 7 and 8, with as little memory as the largest request needs alone."""
    batch = greedy(drawn)
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, BLOCK) for r in batch)
    engine = make_engine(
        path,
        num_kv_blocks=footprint + spare,
        max_num_tokens=max_num_tokens,
        mode=mode,
        lease_tokens=lease_tokens,
    )
    executor = make_executor(engine, policy, max_num_requests=slots, kv_reserve_fraction=fraction)
    run(engine, executor, batch)


def check_rows_in_every_plan(executor: TaperExecutor) -> None:
    """What plans read of memory must be what the engine would say."""
    refresh = executor._sequences.refresh

    def checked() -> None:
        refresh()
        executor._sequences.refresh = refresh  # `check_rows` calls it, too
        check_rows(executor._sequences, executor._running, executor._engine)
        executor._sequences.refresh = checked

    executor._sequences.refresh = checked


@property_test
@given(
    drawn=st.lists(requests(), min_size=2, max_size=4),
    policy=st.sampled_from(SPECS),
    lease_tokens=st.integers(1, 4),
    spare=st.integers(0, 20),
    fraction=st.sampled_from([1.0, 0.5, 0.2]),
)
def test_plans_know_what_places_need(path, drawn, policy, lease_tokens, spare, fraction):
    """Nothing that is held, and the whole next lease of what is not."""
    batch = greedy(drawn)
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, BLOCK) for r in batch)
    engine = make_engine(path, num_kv_blocks=footprint + spare, lease_tokens=lease_tokens)
    executor = make_executor(engine, policy, kv_reserve_fraction=fraction)
    check_rows_in_every_plan(executor)
    run(engine, executor, batch)


@pytest.mark.parametrize("policy", ["irp-eager", "taper"])
def test_wide_requests_whose_leases_end_together_get_on_with_little_memory(path, policy):
    batch = [fan_out(f"wide{i}", 12, max_tokens=90) for i in range(2)]
    engine = make_engine(path, num_kv_blocks=309, lease_tokens=16)
    executor = make_executor(engine, policy, kv_reserve_fraction=0.2)
    check_rows_in_every_plan(executor)
    run(engine, executor, batch)
    assert sum(record.num_preempted for record in executor.records) > 0


def test_plans_know_what_is_needed_where_a_cancel_acts_late(path):
    """TensorRT-LLM may let one more step run; the place keeps its blocks for that long."""
    engine = make_engine(path, num_kv_blocks=159, lease_tokens=16, hysteresis_steps=1)
    executor = make_executor(engine, "taper", kv_reserve_fraction=0.2)
    cancel, step = engine.session.cancel, engine.step
    late: list[int] = []
    num_vacated = 0

    def step_after_late_cancels(plan: StepPlan) -> StepResult:
        nonlocal num_vacated
        for request_id in late:
            cancel(request_id)
        late.clear()
        result = step(plan)
        num_vacated += len(result.vacated)
        return result

    engine.session.cancel, engine.step = late.append, step_after_late_cancels
    check_rows_in_every_plan(executor)
    run(engine, executor, [fan_out(f"r{i}", 8 + i, 45, header=6 * i + 1) for i in range(3)])
    assert num_vacated > 10


def generate(model: TorchEngine, context: Sequence[int], n: int) -> list[int]:
    """Independent, unbatched, greedy."""
    model.add_sequence(0, 0, context, SequenceParams(SamplingParams(), seed=0))
    plan = StepPlan(prefill=(PrefillChunk(0, len(context), sample=True),))
    tokens = [*model.step(plan).tokens[0]]
    while len(tokens) < n:
        tokens += model.step(StepPlan(decode=(0,), max_new_tokens=(1,))).tokens[0]
    model.release_sequence(0)
    return tokens


def text_alone(model: TorchEngine, request: ForkJoinRequest) -> dict[tuple[str, int], list[int]]:
    """Every branch generated by itself."""

    def run_branch(path: str, context: Sequence[int], n: int) -> list[int]:
        new = generate(model, context, n)
        ends = [i for i, token in enumerate(new) if token in request.sampling.stop_ids]
        return new[: ends[0] + 1] if ends else new

    return expected_outputs(request, run_branch)


@pytest.mark.parametrize(
    ("mode", "policy"), [(MODES[i % 3], policy) for i, policy in enumerate(SPECS)]
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn=st.lists(requests(2), min_size=2, max_size=3), lease_tokens=st.integers(1, 8))
def test_a_real_model_says_what_it_says_alone(path, model, mode, policy, drawn, lease_tokens):
    """The same with Qwen3 as the compute, and stops that it runs into."""
    batch = []
    for request in greedy(drawn):
        said = [t for tokens in text_alone(model, request).values() for t in tokens]
        sampling = SamplingParams(stop_token_ids=(said[-1], said[len(said) // 2]))
        batch.append(request.model_copy(update={"sampling": sampling}))
    engine = make_engine(path, decoder="torch", mode=mode, lease_tokens=lease_tokens)
    executor = make_executor(engine, policy)
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
        executor.run_once()
    run_to_end(executor, engine)
    for request in batch:
        assert collector.tokens(request.request_id) == text_alone(model, request)
    engine.assert_idle()


# ------------------------------------------------------------------ who really ran


def busy_requests() -> list[ForkJoinRequest]:
    """Wide and plain ones that are short of time, with texts of their own."""
    wide = [
        ForkJoinRequest(
            request_id=f"wide{i}",
            input_ids=tuple((13 * i + j) % 97 for j in range(9 + 5 * i)),
            stages=(
                SerialStage(max_tokens=5),
                ParallelStage(
                    branches=tuple(
                        Branch(header_ids=(10 * i + j, j), max_tokens=25 + 3 * j) for j in range(7)
                    )
                ),
                SerialStage(max_tokens=9),
            ),
        )
        for i in range(3)
    ]
    return [wide[0], plain("p0", 60), wide[1], plain("p1", 40), plain("p2", 50), wide[2]]


@pytest.mark.parametrize("policy", ["taper", "step-ceiling:0.9", "fixed-cap:2", "irp-eager"])
@pytest.mark.parametrize(("lease_tokens", "hysteresis_steps"), [(3, 1), (32, 1), (32, 4)])
def test_membership_follows_the_plans_one_step_later(path, policy, lease_tokens, hysteresis_steps):
    """Rule 1 on lease engines: entry at once after the step in flight, exit after hysteresis."""
    engine = make_engine(
        path,
        lease_tokens=lease_tokens,
        hysteresis_steps=hysteresis_steps,
        start_interval_steps=1,
    )
    run(engine, make_executor(engine, policy), busy_requests())
    launched, plans = engine.launched(), engine.plans
    num_launched = [planned.num_launched for planned in plans]
    first_token: dict[int, int] = {}  # by request id: the step that drew it
    for index, step in enumerate(engine.runtime.history):
        for request_id in step.drawing:
            first_token.setdefault(request_id, index)
    for index, step in enumerate(engine.runtime.history):
        last = bisect.bisect_right(num_launched, index)  # plans before it could act on the step
        recent = plans[max(0, last - hysteresis_steps) : last]
        wanted = set().union(*(planned.sequences for planned in recent))
        for request_id in step.request_ids & engine.owner.keys():
            was_seen_to_draw = first_token[request_id] + 2 <= num_launched[last - 1]
            assert engine.owner[request_id] in wanted or not was_seen_to_draw, "runs unplanned"
    for planned in plans:
        entering = {*planned.plan.decode} - planned.placed
        assert not entering or entering <= launched[planned.num_launched], "entered late"
    assert engine.losses.num_places > 20
    if policy in ("taper", "step-ceiling:0.9") and lease_tokens == 32:
        assert engine.losses.num_revoked > 0


@pytest.mark.parametrize("policy", ["taper", "irp-eager"])
def test_lockstep_runs_exactly_the_plan(path, policy):
    engine = make_engine(path, mode="lockstep")
    run(engine, make_executor(engine, policy), busy_requests())
    launched = engine.launched()
    ends = [*(planned.num_launched for planned in engine.plans[1:]), len(launched)]
    for planned, end in zip(engine.plans, ends, strict=True):
        ran = launched[planned.num_launched : end]
        assert set().union(*ran) == planned.sequences
        assert sum(map(len, ran)) == len(planned.sequences), "someone ran twice"


@pytest.mark.parametrize("max_num_tokens", [16, 512])
@pytest.mark.parametrize("polls_are_late", [False, True])
def test_audits_tell_what_the_runtime_did(path, monkeypatch, max_num_tokens, polls_are_late):
    """Even if statistics were dropped unread: then of fewer iterations."""
    decoder = ToyDecoder()
    if polls_are_late:
        monkeypatch.setattr("taper_trtllm.engines.trtllm_session._STATS_DEPTH", 3)
    engine = make_engine(path, decoder=decoder, max_num_tokens=max_num_tokens, lease_tokens=8)
    if polls_are_late:
        poll, rng = engine.session.poll, random.Random(0)

        def late(timeout_s: float) -> News:
            if rng.random() < 0.3:
                engine.runtime._drive.wait_for(lambda: False, rng.uniform(0.0, 0.1))
            return poll(timeout_s)

        engine.session.poll = late
    run(engine, make_executor(engine, "taper"), busy_requests())
    assert len({audit.iteration for audit in engine.audits}) == len(engine.audits)
    assert len(engine.audits) > (0.1 if polls_are_late else 0.9) * len(decoder.computed)
    for audit in engine.audits:
        did = decoder.computed[audit.iteration]
        assert (audit.width, audit.num_context_tokens) == (did.width, did.num_context_tokens)
        assert audit.step_ms == pytest.approx(did.step_ms)
        assert audit.prefill.num_chunks == did.prefill.num_chunks
        assert audit.prefill.num_tokens == did.prefill.num_tokens
        if did.prefill.num_chunks == 1:
            assert audit.prefill.token_context == did.prefill.token_context


# ------------------------------------------------------------------ what can go wrong


def run_with_faults(
    engine: WatchedEngine,
    executor: TaperExecutor,
    batch: Sequence[ForkJoinRequest],
    events: Sequence[tuple[int, int, str]],
) -> tuple[Collector, set[str], set[str]]:
    """Cancels requests and lets steps fail; returns what came, who was cancelled, who must fail."""
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
    cancelled: set[str] = set()
    doomed: set[str] = set()
    for number in range(5000):
        if not executor.num_open_requests:
            return collector, cancelled, doomed
        for at, index, kind in events:
            if at != number or index >= len(batch):
                continue
            if kind == "cancel":
                cancelled.add(f"r{index}")
                executor.cancel(f"r{index}")
            elif engine.runtime.num_active:
                engine.runtime.fail_next_step("NaN logits")
                active = {r.request_id for r in engine.runtime._loop._active}
                hit = {i for i, r in engine._place_of.items() if r in active}
                doomed |= {
                    live.request.request_id
                    for live in executor._running
                    if any(s.sequence_id in hit for s in live.sequences())
                }
        executor.run_once()
    raise AssertionError("the executor does not come to an end")


@property_test
@given(
    drawn=st.lists(requests(), min_size=2, max_size=4),
    policy=st.sampled_from(SPECS),
    mode=st.sampled_from(MODES),
    spare=st.integers(0, 40),
    events=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3), st.sampled_from(["cancel", "fail"])),
        min_size=1,
        max_size=5,
    ),
)
def test_cancels_and_failed_steps_end_whole_families_and_leave_nothing(
    path, drawn, policy, mode, spare, events
):
    """Rules 7 and 8; a step that fails ends everyone who has a place."""
    batch = greedy(drawn)
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, BLOCK) for r in batch)
    engine = make_engine(path, num_kv_blocks=footprint + spare, mode=mode, lease_tokens=4)
    executor = make_executor(engine, policy, max_num_requests=3)
    collector, cancelled, doomed = run_with_faults(engine, executor, batch, events)
    for request in batch:
        last = collector.last(request.request_id)
        if last.finish_reason == "completed":
            assert collector.tokens(request.request_id) == alone(request)
        elif last.finish_reason == "error":
            assert request.request_id in doomed
            assert "NaN logits" in last.error and "branch" in last.error
        else:
            assert last.finish_reason == "cancelled" and request.request_id in cancelled
        if request.request_id in doomed - cancelled:
            assert last.finish_reason == "error"
    run(engine, executor, [plain("later", 1, prompt=1)])


@property_test
@given(
    drawn=st.lists(requests(), min_size=2, max_size=4),
    policy=st.sampled_from(SPECS),
    mode=st.sampled_from(MODES),
    num_missing=st.integers(1, 60),
)
def test_a_pool_smaller_than_the_ledger_thinks_costs_time_and_no_token(
    path, drawn, policy, mode, num_missing
):
    """Parked branches are evicted; what is gone is computed again."""
    batch = greedy(drawn)
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, BLOCK) for r in batch)
    engine = make_engine(
        path, num_kv_blocks=footprint, num_missing_blocks=num_missing, mode=mode, lease_tokens=4
    )
    run(engine, make_executor(engine, policy), batch)


def test_what_was_evicted_and_computed_again_is_counted(path):
    recomputed = []
    for num_kv_blocks in (2048, 90):
        engine = make_engine(
            path,
            num_kv_blocks=num_kv_blocks,
            num_missing_blocks=2048 - num_kv_blocks,
            lease_tokens=3,
        )
        run(engine, make_executor(engine, "irp-eager"), busy_requests())
        recomputed.append(engine.losses.num_recomputed_tokens)
    assert recomputed[0] == 0 and recomputed[1] > 100


def test_a_protected_place_does_not_block_one_amid_its_prompt(path):
    """The runtime reserves the whole prompt of a request that starts, shared or not."""
    engine = make_engine(path, num_kv_blocks=35, max_num_tokens=9, start_interval_steps=1)
    params = SequenceParams(SamplingParams(), seed=0)
    engine.add_sequence(0, 0, range(40), params)
    prefix = StepPlan(prefill=(PrefillChunk(0, 40, sample=False),))
    while engine.num_computed_tokens(0) < 40:
        engine.step(prefix)
    engine.add_sequence(3, 3, [3], params)  # with its tokens, every iteration ends a step
    engine.fork_sequence(0, 1, 40, [1] * 50, params)
    engine.fork_sequence(0, 2, 40, [2], params)
    engine.step(StepPlan(decode=(3,), max_new_tokens=(20,), num_protected=1))
    header = (PrefillChunk(1, 50, sample=True),)
    engine.step(StepPlan(decode=(3,), max_new_tokens=(20,), prefill=header, num_protected=1))
    plan = StepPlan(decode=(2, 3), max_new_tokens=(8, 20), prefill=header, num_protected=2)
    result = engine.step(plan)
    assert result.holding == {1, 2, 3} and engine.num_tokens(1) == 90, "1 is amid its prompt"
    while result.holding:
        result = engine.step(StepPlan(tuple(result.holding), (1,) * len(result.holding)))
    assert [engine.num_tokens(i) for i in (1, 2, 3)] == [91, 49, 21]


def test_a_preempted_branch_has_lost_its_place(path):
    """Its tokens are to be computed anew, within what the plan has memory for."""
    engine = make_engine(path)
    executor = make_executor(engine, "irp-eager")
    executor.submit(plain("a", 20), Collector())
    for _ in range(4):
        executor.run_once()
    (sequence,) = executor._running[0].sequences()
    assert executor._sequences.holding == {sequence.sequence_id}
    executor._sequences.preempt(sequence)
    assert not executor._sequences.holding and not engine._places
    planned = executor._planner.plan(executor._running, engine.now_s())
    (chunk,) = planned.plan.prefill
    assert chunk.num_tokens == engine.num_tokens(sequence.sequence_id)
    assert chunk.max_new_tokens == sequence.node.num_stage_tokens_left
    run_to_end(executor, engine)
    engine.assert_idle()


def test_an_extra_that_is_still_in_prefill_is_dropped_for_its_room(path):
    engine = make_engine(path, max_num_tokens=16)
    executor = make_executor(engine, "irp-eager", max_prefill_tokens=512)
    collector, request = Collector(), fan_out("a", 4, header=40)
    executor.submit(request, collector)
    executor.run_once()
    (live,), table = executor._running, executor._sequences
    while len(table.holding) < 4:
        executor.run_once()
    chain = {live.protected.node, live.state.root}
    extras = {s.node: s for s in live.sequences() if s.node not in chain}
    assert len(extras) == 3
    for sequence in extras.values():
        assert table.num_computed(sequence) == sequence.num_shared_tokens, "it has begun to draw"
    before = engine.num_free_blocks
    assert set(live.drop_extras(table)) == set(extras)
    assert len(table.holding) == 1
    assert engine.num_free_blocks - before >= 3 * (40 + 8) // BLOCK
    run_to_end(executor, engine)
    assert collector.tokens("a") == alone(request)
    engine.assert_idle()


def test_prompts_begin_within_the_prefill_tokens_of_a_step(path):
    """A place takes its whole prompt; those that are under way count."""
    engine = make_engine(path, max_num_tokens=16, start_interval_steps=1)
    executor = make_executor(
        engine, max_prefill_tokens=64, prefill_chunking="full", request_admission="slots"
    )
    prompts = [plain(f"p{i}", prompt=40) for i in range(6)]
    batch = [r.model_copy(update={"input_ids": (i, *r.input_ids)}) for i, r in enumerate(prompts)]
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
    run_to_end(executor, engine)
    for request in batch:
        assert collector.tokens(request.request_id) == alone(request)
    num_begun, num_under_way = 0, 0
    for planned in engine.plans:
        num_before = 0
        for chunk in planned.plan.prefill:
            if chunk.sequence_id in planned.placed:
                num_under_way += 1
            else:
                num_begun += 1
                assert num_before < 64, "more prompts than a step has tokens for"
            num_before += chunk.num_tokens
    assert num_begun >= 6 and num_under_way > 6


def test_a_place_in_prefill_is_not_left_out(path):
    """Hysteresis begins at its first token: before, there was nothing to take back."""
    engine = make_engine(path, max_num_tokens=9, hysteresis_steps=2)
    params = SequenceParams(SamplingParams(), seed=0)
    engine.add_sequence(0, 0, range(40), params)
    engine.add_sequence(1, 1, [3], params)
    without = StepPlan(decode=(1,), max_new_tokens=(50,), num_protected=1)
    engine.step(without)
    engine.step(replace(without, prefill=(PrefillChunk(0, 40, True, max_new_tokens=50),)))
    num_left_out = 0
    while engine.num_tokens(0) == 40:
        assert engine.step(without).holding == {0, 1}
        num_left_out += 1
    assert num_left_out > 2
    assert engine.step(without).holding == {0, 1}
    assert engine.step(without).holding == {1}


def test_places_have_seeds_by_position_through_suspensions(path):
    """The sampler starts anew with every place: with one seed it would repeat its stream."""
    engine = make_engine(path, num_kv_blocks=100, lease_tokens=4)
    executor = make_executor(engine, "irp-eager", kv_reserve_fraction=0.2)
    asked: list[PlaceRequest] = []
    ask, suspend = engine.session.ask, executor._planner._suspend
    suspended: list[LiveRequest] = []
    engine.session.ask = lambda place: (asked.append(place), ask(place))[1]
    executor._planner._suspend = lambda live: (suspended.append(live), suspend(live))
    run(engine, executor, [fan_out("wide", 4, 60), *(plain(f"p{i}", 200) for i in range(3))])
    prompts_by_seed: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for place in asked:
        prompts_by_seed[place.seed].add(tuple(place.token_ids))
    assert len(prompts_by_seed) > 50 and any(live.has_started_decoding for live in suspended)
    assert max(map(len, prompts_by_seed.values())) == 1, "a seed serves two texts"


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_tensorrt_llm_refuses_fails_alone(path, mode):
    """Whether it refuses when it is asked, or answers with an error."""
    engine = make_engine(path, mode=mode)
    executor = make_executor(engine)
    loop, enqueue = engine.runtime._loop, engine.runtime.enqueue

    def picky(requests: Sequence[Submission]) -> list[int]:
        if requests[0].token_ids[0] == 96:
            raise RuntimeError("not to my liking")
        return enqueue(requests)

    engine.runtime.enqueue = picky
    loop.limits = replace(loop.limits, max_seq_len=201)
    collector = Collector()
    disliked = ForkJoinRequest(request_id="disliked", input_ids=(96, 1, 2), max_tokens=8)
    good = fan_out("good", 4)
    for request in [disliked, good, plain("long", prompt=250), plain("fine", 20)]:
        executor.submit(request, collector)
    run_to_end(executor, engine)
    assert collector.tokens("good") == alone(good)
    assert "branch '' failed" in collector.last("long").error
    assert "exceeds maximum input length (200)" in collector.last("long").error
    assert "not to my liking" in collector.last("disliked").error
    assert collector.last("fine").finish_reason == "completed"


def test_a_lost_executor_answers_every_open_request(path):
    engine = make_engine(path)
    executor = make_executor(engine, max_num_requests=2)
    collector = Collector()

    def lose_it(output: RequestOutput) -> None:
        collector(output)
        engine.session.executor.shutdown()

    executor.submit(fan_out("a", 4), lose_it)
    for i in range(4):
        executor.submit(plain(f"p{i}"), collector)
    thread = ExecutorThread(executor)
    thread.start()
    thread._thread.join(timeout=30)
    for request_id in ("a", "p0", "p1", "p2", "p3"):
        assert "the engine failed: TensorRT-LLM" in collector.last(request_id).error
    with pytest.raises(ExecutorClosedError):
        executor.submit(plain("late"))


def test_an_iteration_that_does_not_end_is_an_engine_error(path):
    is_over = threading.Event()

    class HungDecoder(ToyDecoder):
        def step(self, step: Step) -> StepOutput:
            if step.generation:
                is_over.wait(30)
            return super().step(step)

    engine = make_engine(path, decoder=HungDecoder(), drive="threaded", iteration_timeout_s=0.3)
    executor = make_executor(engine)
    executor.submit(plain("a"), Collector())
    with pytest.raises(EngineError, match=r"no iteration of the engine has ended for 0.3 s"):
        while True:
            executor.run_once()
    is_over.set()
    executor.shutdown()


def test_a_runtime_that_can_schedule_nobody_is_an_engine_error(path):
    engine = make_engine(path, num_kv_blocks=8, num_missing_blocks=30, iteration_timeout_s=0.2)
    executor = make_executor(engine)
    executor.submit(plain("a", 60), Collector())
    with pytest.raises(EngineError, match=r"no iteration of the engine has ended for 0.2 s"):
        executor.run_once()


def test_a_shutdown_does_not_wait_for_long_leases(path):
    engine = make_engine(path)
    executor = make_executor(engine)
    collector = Collector()
    executor.submit(plain("long", 2000), collector)
    for _ in range(5):
        executor.run_once()
    executor.shutdown()
    assert "shutting down" in collector.last("long").error
    assert engine.runtime.num_active == 0 and engine.runtime.num_iterations < 12


def cancelled_in_prefill(engine: WatchedEngine) -> TaperExecutor:
    """Its only request was cancelled amid its prompt, which the runtime still computes."""
    executor = make_executor(engine)
    collector = Collector()
    executor.submit(plain("long", 2000, prompt=90), collector)
    executor.run_once()
    executor.cancel("long")
    assert executor.run_once() is None
    assert collector.last("long").finish_reason == "cancelled"
    assert engine._unwanted and engine.runtime.num_active == 1
    return executor


def test_an_idle_engine_ends_what_was_cancelled_in_prefill(path):
    engine = make_engine(path, max_num_tokens=16)
    executor = cancelled_in_prefill(engine)
    for _ in range(10):
        assert executor.run_once() is None
    engine.assert_idle()
    assert engine.runtime.num_iterations < 12


def test_a_shutdown_does_not_wait_for_what_was_cancelled_in_prefill(path):
    engine = make_engine(path, max_num_tokens=16)
    cancelled_in_prefill(engine).shutdown()
    assert engine.runtime.num_active == 0 and engine.runtime.num_iterations < 12


def test_in_real_time_with_a_loop_of_its_own(path):
    engine = make_engine(path, drive="threaded", lease_tokens=4, iteration_timeout_s=30)
    executor = make_executor(engine)
    thread = ExecutorThread(executor)
    thread.start()
    batch = [fan_out(f"f{i}", 5) for i in range(3)] + [plain(f"p{i}", 12) for i in range(3)]
    handles = [executor.submit(request) for request in batch]
    for request, handle in zip(batch, handles, strict=True):
        collector = Collector()
        for output in handle:
            collector(output)
        assert collector.last(request.request_id).finish_reason == "completed"
        assert collector.tokens(request.request_id) == alone(request)
    thread.stop()
    assert len(engine.audits) > 10


@pytest.mark.parametrize("tau", [5.0, 7.0, 20.0])
@pytest.mark.parametrize("lease_tokens", [2, 8])
def test_no_ready_leaf_starves_under_taper(path, tau, lease_tokens):
    """Rule 6 on lease engines: a place for each in turn, and what it takes to change it."""
    engine = make_engine(path, lease_tokens=lease_tokens, hysteresis_steps=2)
    executor = make_executor(engine, "taper")
    delay = engine.capabilities.actuation_delay_steps
    waited: dict[tuple[str, str], tuple[int, int]] = {}  # tokens of a leaf, steps since the last
    most_ready: dict[str, int] = {}
    longest = 0
    for request in busy_requests():
        slo = SloTarget(ttft_ms=500, tpot_ms=tau)
        executor.submit(request.model_copy(update={"slo": slo}), Collector())
    while executor.num_open_requests:
        executor.run_once()
        ready: dict[tuple[str, str], tuple[int, int]] = {}
        for live in executor._running:
            name = live.request.request_id
            most_ready[name] = max(most_ready.get(name, 0), len(live.ready_rows))
            rows = executor._sequences.rows(live.ready_rows)
            for leaf, num in zip(live.ready_paths, rows["num_generated"].tolist(), strict=True):
                before, steps = waited.get((name, leaf), (num, 0))
                ready[name, leaf] = (num, steps + 1 if num == before else 0)
                assert steps <= most_ready[name] * (lease_tokens + delay + 2), "a leaf starves"
                longest = max(longest, steps)
        waited = ready
    assert longest > 2 * lease_tokens or tau == 20.0, "nobody had to wait"


def test_branches_that_are_alike_draw_with_seeds_of_their_own(path):
    """The sampler starts anew with every place, and must not repeat itself."""
    request = ForkJoinRequest(
        request_id="warm",
        input_ids=(1, 2, 3),
        stages=(ParallelStage(branches=(Branch(max_tokens=12),) * 3),),
        sampling=SamplingParams(temperature=10.0, seed=5),
    )
    texts = []
    for _ in range(2):
        engine = make_engine(path, decoder="torch", lease_tokens=4)
        executor = make_executor(engine, "irp-eager")
        collector = Collector()
        executor.submit(request, collector)
        run_to_end(executor, engine)
        texts.append(collector.tokens("warm"))
    assert texts[0] == texts[1]
    first, second, third = texts[0].values()
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert first[:4] != first[4:8], "a place has repeated the one before"


@pytest.mark.parametrize("salts", [(None, None), (5, 5), (5, 6), (5, None), (None, 0)])
def test_kv_is_shared_among_requests_with_the_same_salt_only(path, salts):
    """The branches of one request share it in any case."""
    decoder = ToyDecoder()
    engine = make_engine(path, decoder=decoder)
    executor = make_executor(engine, "irp-eager")
    num_computed = [2]  # by the warm-up
    for i, salt in enumerate(salts):
        like = {"request_id": f"r{i}", "input_ids": tuple(range(30, 90)), "cache_salt_id": salt}
        run(engine, executor, [fan_out("like", 4).model_copy(update=like)])
        num_computed.append(sum(step.prefill.num_tokens for step in decoder.computed.values()))
    first, second = np.diff(num_computed).tolist()
    assert 60 < first < 2 * 60
    assert second < first - 50 if salts[0] == salts[1] else second == first


# ------------------------------------------------------------------ construction


def broken(path: Path, **changes: Any) -> Path:
    """An engine directory with changes to `config.json`: dotted names."""
    make_engine(path)
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        functools.reduce(dict.__getitem__, parents, config)[last] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.3.0"}, "engine.engine_dir: .* was built with TensorRT-LLM 1.3.0"),
        (
            {"build_config__plugin_config__use_paged_context_fmha": False},
            "engine.engine_dir: .*--use_paged_context_fmha enable",
        ),
        (
            {"pretrained_config__mapping__world_size": 2},
            r"engine.engine_dir: .*rank1.engine is missing \(2 ranks\)",
        ),
        ({"build_config__max_beam_width": 4}, "engine.engine_dir: .*max_beam_width must be 1"),
        ({"build_config__max_seq_len": "?"}, "engine.engine_dir: .*config.json is not an engine's"),
    ],
)
def test_an_engine_that_cannot_be_served_is_refused(tmp_path, changes, message):
    config = TrtllmEngineConfig(kind="trtllm", engine_dir=broken(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        TrtllmEngine(config)


def test_missing_pieces_and_wrong_settings_are_named(path, tmp_path):
    make_engine(path)
    engine = {"kind": "trtllm", "engine_dir": str(path)}
    with pytest.raises(ConfigError, match=r"engine.bindings: cannot import no_such_module"):
        create_engine(parse_config({"engine": {**engine, "bindings": "no_such_module"}}).engine)
    with pytest.raises(ConfigError, match=r"engine.engine_dir: cannot read .*config.json"):
        create_engine(parse_config({"engine": {**engine, "engine_dir": str(tmp_path)}}).engine)
    with pytest.raises(ConfigError, match=r"engine.*mode: Input should be 'lease', 'slice' or"):
        parse_config({"engine": {**engine, "mode": "fast"}})
    with pytest.raises(ConfigError, match=r"engine.*worker_executable is required"):
        parse_config({"engine": {**engine, "communication_mode": "orchestrator"}})
    (path / "rank0.engine").write_text("{}{")
    config = {**engine, "bindings": "perf.trtllm_fake.bindings"}
    with pytest.raises(ConfigError, match=r"engine.engine_dir: TensorRT-LLM cannot run"):
        create_engine(parse_config({"engine": config}).engine)


def test_an_engine_that_fails_in_its_warm_up_is_shut_down(path):
    class BrokenDecoder(ToyDecoder):
        def step(self, step: Step) -> StepOutput:
            raise RuntimeError("NaN logits")

    end = TrtllmSession.shutdown
    with mock.patch.object(TrtllmSession, "shutdown", autospec=True, side_effect=end) as shutdown:
        with pytest.raises(EngineError, match=r"the engine cannot run: .*NaN logits"):
            make_engine(path, decoder=BrokenDecoder())
        (session,) = shutdown.call_args.args
    assert not session.takes_requests


# ------------------------------------------------------------------ calibration


def test_calibration_finds_the_truth():
    truth = named_profile("h200_fp8_tp1")
    engine = VirtualTrtllmEngine(truth, SimulatedConfig(num_kv_blocks=4096), Leases())
    grid = Grid((1, 4, 16, 64), (64, 512), (16, 128), (0, 512), repetitions=2, num_checks=4)
    calibrator = Calibrator(engine, grid)
    profile, report = calibrator.measure({})
    engine.check_integrity()
    assert engine.num_free_blocks == 4096
    assert {(p.width, p.num_chunks, p.num_tokens) for p in profile.prefill} == {
        (width, chunks, tokens)
        for width in (1, 8)
        for chunks, tokens in ((1, 16), (4, 64), (1, 128))
    }
    assert {p.width for p in profile.decode} == {1, 4, 16, 64}
    times = StepTimes(truth, 64)
    for point in profile.decode:
        assert point.step_ms == pytest.approx(
            times.decode_ms(point.width, point.context_tokens), rel=0.02
        )
    for point in profile.prefill:
        decode_ms = times.decode_ms(point.width, point.context_tokens)
        prefill_ms = times.prefill_ms(point.width, point.load)
        assert point.step_ms == pytest.approx(decode_ms + prefill_ms, rel=0.02)
    assert report.mape < 0.05


def test_lockstep_tells_no_step_times(path):
    with pytest.raises(ConfigError, match="does not tell how long single steps take"):
        Calibrator(make_engine(path, mode="lockstep"), Grid((1, 4), (16, 64))).measure({})
