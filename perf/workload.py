"""Workloads: the requests of a benchmark run, from a trace or synthetic, with their schedule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perf.arrivals import FloatArray, gamma_arrivals_s, trace_arrivals_s
from perf.trace import TraceError, TraceRow, read_trace, scale_count, to_wire_stages
from taper_trtllm.config import (
    ConfigError,
    EngineConfig,
    TorchEngineConfig,
    TrtllmEngineConfig,
)
from taper_trtllm.engines.trtllm_engine_dir import read_engine_dir
from taper_trtllm.request import (
    ForkJoinRequest,
    RequestError,
    RequestLimits,
    SamplingParams,
    build_request,
    check_request,
)

DEFAULT_TRACE = Path(__file__).parent / "workloads" / "branch_public.csv"

DatasetName = Literal["fork-join", "random", "trace"]
ArrivalProcess = Literal["gamma", "trace"]


class WorkloadError(ValueError):
    """A workload that cannot be built, naming the option at fault."""


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """What to send and when; equal configurations give equal workloads.

    Attributes:
        dataset_name: ``trace`` replays `dataset_path`; ``fork-join`` and ``random`` are synthetic.
        dataset_path: Trace to replay.
        num_prompts: Requests to send.
        request_rate: Requests per second; infinite for all at once.
        burstiness: Shape of gamma arrivals; 1 is Poisson.
        arrivals: ``gamma``, or ``trace`` for the file's arrivals stretched to `request_rate`.
        length_scale: Factor on the trace's decoded token counts.
        prompt_scale: Factor on its prompt lengths; `length_scale` if None.
        seed: Of rows, token ids and arrivals.
        vocab_size: Token ids are drawn from [0, vocab_size).
        limits: Of the server; rows beyond them are dropped and counted.
        request_id_prefix: Before the running number of a request.
        input_len: Prompt tokens of synthetic requests.
        output_len: Tokens of a ``random`` request.
        num_branches: Fan-out of a ``fork-join`` request.
        branch_len: Mean tokens of a branch.
        branch_len_cv: Coefficient of variation of branch lengths (lognormal); 0 for constant.
        serial_len: Tokens of the stage before the fork and of the one after the join; a request
            that does not fork decodes twice as many.
        fork_fraction: Share of ``fork-join`` requests that fork.
        shared_prefix_len: First prompt tokens that all requests have in common.
    """

    dataset_name: DatasetName = "trace"
    dataset_path: Path = DEFAULT_TRACE
    num_prompts: int = 1000
    request_rate: float = float("inf")
    burstiness: float = 1.0
    arrivals: ArrivalProcess = "gamma"
    length_scale: float = 1.0
    prompt_scale: float | None = None
    seed: int = 0
    vocab_size: int = 8192
    limits: RequestLimits = field(default_factory=RequestLimits)
    request_id_prefix: str = "bench-"
    input_len: int = 256
    output_len: int = 128
    num_branches: int = 4
    branch_len: int = 32
    branch_len_cv: float = 0.5
    serial_len: int = 32
    fork_fraction: float = 0.5
    shared_prefix_len: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "num_branches", "branch_len"):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _require("seed", self.seed >= 0, "at least 0", self.seed)
        _require("length_scale", self.length_scale < np.inf, "finite", self.length_scale)
        for name in ("request_rate", "burstiness", "length_scale"):
            _require(name, getattr(self, name) > 0, "positive", getattr(self, name))
        _require("fork_fraction", 0 <= self.fork_fraction <= 1, "in [0, 1]", self.fork_fraction)
        _require("branch_len_cv", self.branch_len_cv >= 0, "at least 0", self.branch_len_cv)
        _require("serial_len", self.serial_len >= 1, "at least 1", self.serial_len)
        if self.arrivals == "trace" and self.dataset_name != "trace":
            raise WorkloadError(f"arrivals: 'trace' needs a trace, not {self.dataset_name!r}")


def vocab_size_of(engine: EngineConfig) -> int:
    """Vocabulary of the model that a configuration serves.

    Raises:
        ConfigError: The checkpoint or the compiled engine does not say.
    """
    if isinstance(engine, TrtllmEngineConfig):
        return read_engine_dir(engine.engine_dir).vocab_size
    if engine.model_dir is None:
        return engine.random_model.vocab_size
    path = engine.model_dir / "config.json"
    try:
        return int(json.loads(path.read_text())["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"engine.model_dir: no vocab_size in {path} ({error})") from None


def embedded(engine: EngineConfig) -> TorchEngineConfig:
    """The configuration of the embedded engine, for programs that set or count its KV blocks.

    Raises:
        ConfigError: Another engine is configured.
    """
    if not isinstance(engine, TorchEngineConfig):
        raise ConfigError(
            f"engine.kind: this runs on the embedded engine (torch) alone (got {engine.kind}); "
            "perf.bench_serving and perf.host_time run on any"
        )
    return engine


def _require(name: str, holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise WorkloadError(f"{name}: must be {rule} (got {value})")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """A request with its place in the schedule.

    Attributes:
        arrival_s: When to send it, since the start of the run.
        request: What to send.
        stages_json: Its `stages` tensor.
        family: Kind of request, as the trace names it.
    """

    arrival_s: float
    request: ForkJoinRequest
    stages_json: bytes
    family: str


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run, in order of arrival.

    Attributes:
        requests: What is sent.
        dropped: Rows left out because the server would refuse them, by field at fault. The next
            row takes their place.
    """

    requests: tuple[WorkloadRequest, ...]
    dropped: dict[str, int]


def build_workload(config: WorkloadConfig) -> Workload:
    """Builds the requests of a run.

    Trace rows are drawn at random without replacement (again from the whole file once it is used
    up); with `arrivals` ``trace`` they are a contiguous window from a random row on, which goes on
    at the beginning of the file.

    Args:
        config: What to build.

    Raises:
        WorkloadError: Nothing can be built from the configuration.
        TraceError: The trace cannot be read.
    """
    rng_rows, rng_ids, rng_arrivals = (
        np.random.default_rng(s) for s in np.random.SeedSequence(config.seed).spawn(3)
    )
    shared_prefix = rng_ids.integers(config.vocab_size, size=config.shared_prefix_len)
    requests: list[WorkloadRequest] = []
    rows_used: list[TraceRow] = []
    dropped: Counter[str] = Counter()
    for row in _rows(config, rng_rows):
        if len(requests) == config.num_prompts:
            break
        request_id = f"{config.request_id_prefix}{len(requests)}"
        try:
            requests.append(make_request(row, config, request_id, shared_prefix.tolist(), rng_ids))
            rows_used.append(row)
        except RequestError as error:
            dropped[error.field.split("[")[0]] += 1
    if len(requests) < config.num_prompts:
        raise WorkloadError(
            f"num_prompts: {config.num_prompts} asked, the limits leave {len(requests)} "
            f"(dropped: {dict(dropped)})"
        )
    arrivals_s = _arrivals_s(config, rows_used, rng_arrivals)
    scheduled = (
        replace(request, arrival_s=float(at))
        for request, at in zip(requests, arrivals_s, strict=True)
    )
    return Workload(tuple(scheduled), dict(dropped))


def make_request(
    row: TraceRow,
    config: WorkloadConfig,
    request_id: str,
    shared_prefix: list[int],
    rng: np.random.Generator,
) -> WorkloadRequest:
    """Builds one request of a trace row, due at once.

    Raises:
        RequestError: The server would refuse it.
    """
    num_prompt = scale_count(row.prompt_tokens, config.prompt_scale or config.length_scale)
    own = rng.integers(config.vocab_size, size=max(0, num_prompt - len(shared_prefix)))
    stages = to_wire_stages(
        row.stages, config.length_scale, _token_ids(rng, config.vocab_size), config.vocab_size
    )
    request = build_request(
        request_id=request_id,
        input_ids=[*shared_prefix[:num_prompt], *own.tolist()],
        stages=stages,
        sampling=SamplingParams(ignore_eos=True),
    )
    check_request(request, config.limits, config.vocab_size)
    return WorkloadRequest(0.0, request, json.dumps(stages).encode(), row.family)


def _token_ids(rng: np.random.Generator, vocab_size: int) -> Iterator[int]:
    while True:
        yield from rng.integers(vocab_size, size=64).tolist()


def _rows(config: WorkloadConfig, rng: np.random.Generator) -> Iterator[TraceRow]:
    if config.dataset_name != "trace":
        yield from _synthetic_rows(config, rng)
        return
    rows = read_trace(config.dataset_path)
    if config.arrivals == "trace":
        if any(row.arrival_s is None for row in rows):
            raise TraceError(f"{config.dataset_path}: arrivals 'trace' needs a column arrival_s")
        span_s = (rows[-1].arrival_s or 0.0) - (rows[0].arrival_s or 0.0)
        start = int(rng.integers(len(rows)))
        yield from rows[start:]
        yield from (replace(r, arrival_s=(r.arrival_s or 0.0) + span_s) for r in rows[:start])
        return
    passes = -(-config.num_prompts // len(rows)) + 1
    for _ in range(passes):
        yield from (rows[i] for i in rng.permutation(len(rows)))


def _synthetic_rows(config: WorkloadConfig, rng: np.random.Generator) -> Iterator[TraceRow]:
    for _ in range(config.num_prompts):
        stages: list[Any]
        if config.dataset_name == "random":
            stages = [["s", config.output_len]]
        elif rng.random() < config.fork_fraction:
            stages = [
                ["s", config.serial_len],
                ["p", 0, _branch_lens(config, rng), config.serial_len],
            ]
        else:
            stages = [["s", 2 * config.serial_len]]
        forks = len(stages) > 1
        yield TraceRow(None, config.input_len, stages, "fork-join" if forks else "plain")


def _branch_lens(config: WorkloadConfig, rng: np.random.Generator) -> list[int]:
    variance = np.log1p(config.branch_len_cv**2)
    lens = rng.lognormal(
        np.log(config.branch_len) - variance / 2, np.sqrt(variance), config.num_branches
    )
    return [max(1, round(n)) for n in lens]


def _arrivals_s(
    config: WorkloadConfig, rows: list[TraceRow], rng: np.random.Generator
) -> FloatArray:
    if config.arrivals == "gamma":
        return gamma_arrivals_s(config.num_prompts, config.request_rate, config.burstiness, rng)
    recorded_s = np.array([row.arrival_s for row in rows], dtype=np.float64)
    if (np.diff(recorded_s) < 0).any():
        raise TraceError(
            f"{config.dataset_path}: arrivals 'trace' needs rows in order of arrival_s"
        )
    return trace_arrivals_s(recorded_s, config.request_rate)
