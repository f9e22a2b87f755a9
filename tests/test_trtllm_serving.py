"""Compiled engines behind the executor process: ranks, ways of launching, and what is imported."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_trtllm import NUM_KV_BLOCKS, REPLAY, write_serving

from engine_build.contract import load_contract
from perf.trtllm_fake import strict
from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    ProfileDecoderConfig,
    pretrained_config,
    write_engine_dir,
)
from perf.trtllm_fake.ranks import Leader
from taper_trtllm.config import (
    ConfigError,
    RandomModelConfig,
    ServingConfig,
    TrtllmEngineConfig,
    load_config,
    parse_config,
)
from taper_trtllm.engines.trtllm_engine_dir import read_engine_dir
from taper_trtllm.engines.trtllm_session import TrtllmSession
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.executor_process import ExecutorProcess
from taper_trtllm.output import RequestOutput
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import load_profile
from taper_trtllm.request import Branch, ForkJoinRequest, ParallelStage
from taper_trtllm.request_gate import ExecutorClosedError

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ForkJoinRequest(request_id="plain", input_ids=(1, 2, 3), max_tokens=5)


def run(process: ExecutorProcess, request: ForkJoinRequest) -> RequestOutput:
    """The last output of a request."""
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    process.submit(request, outputs.put)
    while not (output := outputs.get(timeout=60)).finished:
        pass
    return output


# ---- ranks


@pytest.fixture
def two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServingConfig:
    """An engine of two ranks, of which processes from here are rank 1."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    return load_config(write_serving(tmp_path, decoder=REPLAY, tp_size=2))


def test_a_rank_that_works_is_ready_and_refuses_requests_until_its_leader_ends(two_ranks):
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(ExecutorProcess, two_ranks)
        leader = Leader(two_ranks.engine.engine_dir, 2)  # ranks wait for each other
        process = starting.result(60)
    with pytest.raises(ExecutorClosedError, match="send requests to rank 0"):
        process.submit(PLAIN, lambda output: None)
    process._process.send_signal(signal.SIGTERM)  # mpirun signals whole process groups
    with pytest.raises(subprocess.TimeoutExpired):
        process._process.wait(0.3)
    leader.end()
    assert process._process.wait(30) == 0
    process.stop()


def test_a_rank_that_works_ends_with_its_server(two_ranks):
    path = str(two_ranks.profile.parent / "config.yaml")
    code = (
        "import time\n"
        "from taper_trtllm.config import load_config\n"
        "from taper_trtllm.executor_process import ExecutorProcess\n"
        f"process = ExecutorProcess(load_config({path!r}))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    leader = Leader(two_ranks.engine.engine_dir, 2)
    assert server.stdout.readline() == "ready\n"
    server.kill()
    server.wait()
    assert select.select([server.stdout], [], [], 30)[0], "the rank, which has it too, lives on"
    assert server.stdout.read() == ""
    leader.end()


def test_the_leader_serves_and_releases_the_other_rank(two_ranks, monkeypatch):
    """The other rank runs a command line, as all ranks do when an engine is calibrated."""
    profile = two_ranks.profile.read_bytes()
    worker = subprocess.Popen(
        [sys.executable, "-m", "engine_build", "calibrate", "--config", "config.yaml"],
        cwd=two_ranks.profile.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    leader = ExecutorProcess(two_ranks)
    assert run(leader, PLAIN).finish_reason == "completed"
    assert leader.num_free_blocks == NUM_KV_BLOCKS
    assert worker.poll() is None
    leader.stop()
    assert worker.wait(30) == 0
    assert two_ranks.profile.read_bytes() == profile


def test_an_engine_of_two_ranks_needs_two_processes(tmp_path):
    config = load_config(write_serving(tmp_path, decoder=REPLAY, tp_size=2))
    with pytest.raises(ConfigError, match=r"engine\.engine_dir: .* needs 2 rank.*worldSize"):
        ExecutorProcess(config)


def test_what_the_engine_was_not_built_for_is_refused_by_field(tmp_path):
    config = load_config(write_serving(tmp_path, scheduler={"max_batch_size": 64}))
    with pytest.raises(ConfigError, match=r"scheduler\.max_batch_size exceeds the engine's"):
        ExecutorProcess(config)
    path = tmp_path / "engine/config.json"
    path.write_text(path.read_text().replace('fmha": true', 'fmha": false'))
    with pytest.raises(ConfigError, match=r"engine\.engine_dir: .*use_paged_context_fmha"):
        ExecutorProcess(config)


# ---- how the bindings are called


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Bindings that check every argument against the recorded API, and run nothing."""
    module = strict.build_module(load_contract())
    module.created = []

    def executor(path, model_type, executor_config):
        module.created.append((path, model_type, executor_config))
        return SimpleNamespace(can_enqueue_requests=lambda: True)

    module.Executor = executor
    monkeypatch.setitem(sys.modules, "recording_bindings", module)
    return module


def executor_config(path: Path, recording: SimpleNamespace, **engine: str) -> object:
    config = load_config(write_serving(path, engine={"bindings": "recording_bindings", **engine}))
    TrtllmSession(config.engine, read_engine_dir(config.engine.engine_dir))
    ((engine_path, model_type, created),) = recording.created
    assert engine_path == path / "engine"
    assert model_type == recording.ModelType.DECODER_ONLY
    return created


def test_the_orchestrator_starts_the_named_workers(tmp_path, recording):
    created = executor_config(
        tmp_path, recording, communication_mode="orchestrator", worker_executable="bin/worker"
    )
    parallel = created.parallel_config
    assert parallel.communication_type == recording.CommunicationType.MPI
    assert parallel.communication_mode == recording.CommunicationMode.ORCHESTRATOR
    assert parallel.participant_ids is None  # refused when workers are spawned
    orchestrator = parallel.orchestrator_config
    assert orchestrator.is_orchestrator and orchestrator.spawn_processes
    assert orchestrator.worker_executable_path == str(tmp_path / "bin/worker")


def test_mpirun_is_the_default_and_scheduling_is_what_branches_need(tmp_path, recording):
    created = executor_config(tmp_path, recording)
    assert created.parallel_config.communication_mode == recording.CommunicationMode.LEADER
    assert created.parallel_config.orchestrator_config is None
    scheduler = created.scheduler_config
    policy = recording.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    assert scheduler.capacity_scheduler_policy == policy
    assert created.enable_chunked_context
    assert created.kv_cache_config.enable_block_reuse
    assert created.request_stats_max_iterations > 0
    assert (created.max_batch_size, created.max_num_tokens) == (32, 512)


def test_the_orchestrator_needs_its_workers_executable():
    engine = {"kind": "trtllm", "engine_dir": "engine", "communication_mode": "orchestrator"}
    with pytest.raises(ConfigError, match=r"engine: .*worker_executable is required"):
        parse_config({"engine": engine})


# ---- the example configuration


def test_the_example_for_compiled_engines_serves_the_engine_that_it_says_how_to_build(tmp_path):
    """On the fake executor, with the step times of its GPU."""
    config = load_config(ROOT / "triton_repo/taper/config.trtllm.yaml")
    engine = config.engine
    assert isinstance(engine, TrtllmEngineConfig)
    assert engine.engine_dir == config.profile.parent == Path("/engines/qwen3-32b")
    truth = load_profile(ROOT / "perf/profiles/h200_fp8_tp1.json")
    scheduler = config.scheduler
    predictor = StepLatencyPredictor(truth, scheduler.max_batch_size)
    num_requests = scheduler.max_num_requests
    baseline_ms = predictor.predict_step_ms(num_requests, num_requests * 4096)
    assert baseline_ms < (1 - scheduler.margin) * config.slo.tpot_ms

    build = BuildConfig(
        max_input_len=16383, max_seq_len=16384, max_batch_size=128, max_num_tokens=1024
    )
    decoder = ProfileDecoderConfig(path=tmp_path / "profile.json")
    fake = FakeEngine(drive="virtual", num_kv_blocks=24_583, decoder=decoder)
    shape = pretrained_config(RandomModelConfig(vocab_size=151_936), 40960)
    write_engine_dir(tmp_path, build, fake, shape)
    fingerprint = dict(read_engine_dir(tmp_path).fingerprint)
    truth.model_copy(update={"fingerprint": fingerprint}).save(tmp_path / "profile.json")
    update = {"engine_dir": tmp_path, "bindings": "perf.trtllm_fake.bindings"}
    served = config.model_copy(
        update={"engine": engine.model_copy(update=update), "profile": tmp_path / "profile.json"}
    )
    executor = TaperExecutor.from_config(served)
    stage = ParallelStage(branches=tuple(Branch(max_tokens=40) for _ in range(16)))
    handles = [
        executor.submit(ForkJoinRequest(request_id=str(i), input_ids=(i,) * 2048, stages=(stage,)))
        for i in range(8)
    ]
    executor.drain()
    for handle in handles:
        *_, last = handle
        assert last.finish_reason == "completed"
        assert last.metrics.num_output_tokens == 16 * 40
        assert last.metrics.num_reused_blocks >= 15 * 2048 // 32
    executor.shutdown()


# ---- what is imported


def test_a_compiled_engine_is_served_without_torch(tmp_path):
    """The container's torch is TensorRT-LLM's: nothing here may depend on its version."""
    path = write_serving(tmp_path, decoder=REPLAY)
    code = (
        "import sys\n"
        "from taper_trtllm.config import load_config\n"
        "from taper_trtllm.executor import TaperExecutor\n"
        "from taper_trtllm.request import Branch, ForkJoinRequest, ParallelStage\n"
        "stage = ParallelStage(branches=tuple(Branch(max_tokens=9) for _ in range(3)))\n"
        "request = ForkJoinRequest(request_id='r', input_ids=(1, 2, 3), stages=(stage,))\n"
        f"executor = TaperExecutor.from_config(load_config({str(path)!r}))\n"
        "handle = executor.submit(request)\n"
        "executor.drain(60)\n"
        "outputs = list(handle)\n"
        "executor.shutdown()\n"
        "assert sum(len(b.token_ids) for o in outputs for b in o.branches) == 27, outputs\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'taper_trtllm.engines.torch_engine',\n"
        "         'taper_trtllm.engines.qwen3', 'taper_trtllm.engines.sampling'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
