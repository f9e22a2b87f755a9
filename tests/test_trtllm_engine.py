"""Compiled engines: the adapter on the fake executor, under the executor and its policies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import expected_outputs, requests
from test_executor import SPECS, Collector, alone, fan_out, named, plain, run_to_end
from toy_engine import next_token, step_ms, toy_profile

from perf.trtllm_fake.decoders import Step, StepOutput
from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    PluginConfig,
    TorchDecoderConfig,
    pretrained_config,
    write_engine_dir,
)
from taper_trtllm.config import (
    RandomModelConfig,
    SchedulerConfig,
    TorchEngineConfig,
    TrtllmEngineConfig,
)
from taper_trtllm.engines.base import IterationAudit, PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.engines.trtllm import Place, TrtllmEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import ForkJoinRequest, RequestLimits, SamplingParams, SloTarget

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
        return StepOutput([next_token(r.text.tokens) for r in step.drawing], took_ms / 1e3)

    def release(self, request: Any) -> None:
        pass


class WatchedEngine(TrtllmEngine):
    """In virtual time; remembers plans and places, and recounts all blocks after every step."""

    def __init__(self, config: TrtllmEngineConfig) -> None:
        self.plans: list[tuple[int, StepPlan]] = []  # with the number of steps launched before
        self.owner: dict[int, int] = {}  # sequences by request id
        self.asked_by: dict[int, int] = {}  # numbers of plans by request id
        self.first_drawn_by: dict[int, int] = {}
        self.audits: list[IterationAudit] = []
        super().__init__(config, clock=lambda: float(self.runtime.now_s()))

    @property
    def runtime(self) -> Any:
        return self.session.executor.runtime

    def step(self, plan: StepPlan) -> Any:
        self.plans.append((len(self.runtime.history), plan))
        result = super().step(plan)
        self.audits.extend(result.audits or ())
        self.check_integrity()
        self.runtime.check_integrity()
        return result

    def _give(self, place: Place, plan: StepPlan) -> None:
        super()._give(place, plan)
        request_id = self._place_of[place.sequence_id]
        self.owner[request_id] = place.sequence_id
        self.asked_by[request_id] = len(self.plans) - 1

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
    num_kv_blocks: int = 2048,
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
        drive="virtual",
        num_kv_blocks=num_kv_blocks,
        decoder=TorchDecoderConfig(random_model=TINY, step_ms=10),
    )
    write_engine_dir(path, build, fake, pretrained_config(TINY, build.max_seq_len))
    options = {"bindings": "perf.trtllm_fake.bindings", "min_lease_steps": 2, **config}
    made = TrtllmEngineConfig(kind="trtllm", engine_dir=path, **options)
    if decoder == "torch":
        return WatchedEngine(made)
    decoder = decoder or ToyDecoder()
    with mock.patch("perf.trtllm_fake.bindings.create_decoder", lambda *_: decoder):
        return WatchedEngine(made)


def make_executor(engine: WatchedEngine, policy: str = "taper", **scheduler: Any) -> TaperExecutor:
    options = {"max_batch_size": 64, "prefill_chunking": "slack", **scheduler}
    config = SchedulerConfig(policy=policy, **options)
    return TaperExecutor(engine, toy_profile(), config, RequestLimits(), SLO)


def greedy(drawn: Sequence[ForkJoinRequest]) -> list[ForkJoinRequest]:
    """Each place has a sampler of its own: only greedy text is the same however it is cut."""
    return [
        r.model_copy(update={"sampling": r.sampling.model_copy(update={"temperature": 0.0})})
        for r in named(list(drawn))
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


property_test = settings(
    max_examples=100,
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
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
        executor.run_once()
    run_to_end(executor, engine)
    for request in batch:
        assert collector.last(request.request_id).finish_reason == "completed"
        assert collector.tokens(request.request_id) == alone(request)
    engine.assert_idle()
