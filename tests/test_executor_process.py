"""The executor in a process of its own: the same results, the same refusals, and its death."""

from __future__ import annotations

import queue

import pytest

from engine_build.calibrate import Calibrator, Grid
from taper_trtllm.config import (
    ConfigError,
    RandomModelConfig,
    SchedulerConfig,
    ServingConfig,
    TorchEngineConfig,
)
from taper_trtllm.engines import create_engine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.executor_process import ExecutorProcess
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import Branch, ForkJoinRequest, ParallelStage, RequestError, RequestLimits
from taper_trtllm.request_gate import ExecutorClosedError

MODEL = RandomModelConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, intermediate_size=32, vocab_size=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ServingConfig:
    engine_config = TorchEngineConfig(random_model=MODEL, num_kv_blocks=256, max_batch_size=32)
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    grid = Grid((1, 2, 4), (8, 32), prefill_tokens=(4,), repetitions=1, num_checks=1)
    Calibrator(create_engine(engine_config), grid).measure({})[0].save(path)
    return ServingConfig(
        engine=engine_config,
        scheduler=SchedulerConfig(max_num_requests=4, max_batch_size=32),
        limits=RequestLimits(max_total_tokens=2048),
        profile=path,
    )


def fan_out(request_id: str, max_tokens: int = 5) -> ForkJoinRequest:
    branches = tuple(Branch(header_ids=(i,), max_tokens=max_tokens) for i in range(3))
    stages = (ParallelStage(branches=branches),)
    return ForkJoinRequest(request_id=request_id, input_ids=(1, 2, 3), stages=stages)


def collect(outputs: queue.SimpleQueue[RequestOutput]) -> list[RequestOutput]:
    seen = [outputs.get(timeout=60)]
    while not seen[-1].finished:
        seen.append(outputs.get(timeout=60))
    return seen


def tokens(outputs: list[RequestOutput]) -> dict[str, list[int]]:
    by_branch: dict[str, list[int]] = {}
    for output in outputs:
        for branch in output.branches:
            by_branch.setdefault(branch.branch_path, []).extend(branch.token_ids)
    return by_branch


def test_it_answers_like_the_executor_itself_and_refuses_at_once(config):
    here = TaperExecutor.from_config(config)
    handle = here.submit(fan_out("a"))
    here.drain()
    expected = tokens(list(handle))
    process = ExecutorProcess(config)
    records = []
    process.add_step_observer(records.append)
    outputs = [queue.SimpleQueue() for _ in range(8)]
    for i, each in enumerate(outputs):
        process.submit(fan_out(f"r{i}"), each.put)
    with pytest.raises(RequestError, match="total tokens exceed the limit"):
        process.submit(fan_out("long", 5000), outputs[0].put)
    for each in outputs:
        assert tokens(collect(each)) == expected
    assert process.num_free_blocks == 256 and process.is_running("r0") is None
    assert records and all(r.policy == "taper" for r in records)
    process.stop()


def test_duplicates_cancels_and_shutdown(config):
    process = ExecutorProcess(config)
    first, second = queue.SimpleQueue(), queue.SimpleQueue()
    process.submit(fan_out("a", 600), first.put)
    with pytest.raises(RequestError, match="already in use"):
        process.submit(fan_out("a"), second.put)
    first.get(timeout=60)
    process.cancel("a")
    assert collect(first)[-1].finish_reason == "cancelled"
    process.submit(fan_out("b", 600), second.put)
    second.get(timeout=60)
    process.stop()
    last = collect(second)[-1]
    assert last.finish_reason == "error" and "shutting down" in last.error
    with pytest.raises(ExecutorClosedError):
        process.submit(fan_out("late"), second.put)


def test_its_death_is_answered_and_a_bad_start_is_told(config):
    process = ExecutorProcess(config)
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    process.submit(fan_out("a", 600), outputs.put)
    outputs.get(timeout=60)
    process._process.kill()
    assert "process ended" in collect(outputs)[-1].error
    with pytest.raises(ExecutorClosedError, match="process ended"):
        process.submit(fan_out("b"), outputs.put)
    process.stop()
    with pytest.raises(ConfigError, match="latency profile"):
        ExecutorProcess(config.model_copy(update={"profile": config.profile.parent / "absent"}))
