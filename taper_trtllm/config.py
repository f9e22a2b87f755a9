"""The serving configuration: one YAML file, validated, every default stated here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from taper_trtllm.request import RequestLimits, SloTarget

LateRequests = Literal["defer", "fcfs"]
RequestAdmission = Literal["patient", "tpot", "slots"]


class ConfigError(ValueError):
    """A configuration that cannot be used, naming the field."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_PositiveInt = Annotated[int, Field(ge=1)]


class RandomModelConfig(_Model):
    """Shape of the seeded random Qwen3 that is served when no checkpoint is given."""

    hidden_size: _PositiveInt = 256
    num_hidden_layers: _PositiveInt = 4
    num_attention_heads: _PositiveInt = 8
    num_key_value_heads: _PositiveInt = 2
    head_dim: _PositiveInt = 32
    intermediate_size: _PositiveInt = 768
    vocab_size: _PositiveInt = 8192
    seed: int = 0

    @model_validator(mode="after")
    def _is_a_qwen3(self) -> RandomModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even: rotary embedding turns pairs")
        return self


QWEN3_SHAPES = {
    "qwen3-0.6b": RandomModelConfig(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151_936,
    ),
    "qwen3-8b": RandomModelConfig(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12_288,
        vocab_size=151_936,
    ),
    "qwen3-32b": RandomModelConfig(
        hidden_size=5120,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=25_600,
        vocab_size=151_936,
    ),
}
"""Shapes of published models by name, as `random_model` takes them."""


def _named_shape(value: Any) -> Any:
    """The shape of a name.

    Raises:
        ValueError: Nothing has this name.
    """
    if not isinstance(value, str):
        return value
    if value not in QWEN3_SHAPES:
        raise ValueError(f"{value!r} is neither a shape nor one of {', '.join(QWEN3_SHAPES)}")
    return QWEN3_SHAPES[value]


class TorchEngineConfig(_Model):
    """The embedded engine, and how much it may use.

    Attributes:
        model_dir: Local Hugging Face directory of a Qwen3; None serves `random_model`.
        random_model: Its shape, or the name of one of `QWEN3_SHAPES`.
        device: torch device.
        dtype: torch dtype name.
        num_threads: CPU threads of one iteration; one gives the most predictable latency on a
            machine that also runs the server and its clients.
        prefix_sharing_attention: A step reads what branches of a request share once (cascade
            attention). It takes most of a branch's price away, so policies differ less.
        cuda_graphs: On a GPU, steps of decode alone are replayed from CUDA graphs, one per padded
            width, captured at start.
    """

    kind: Literal["torch"] = "torch"
    model_dir: Path | None = None
    random_model: Annotated[RandomModelConfig, BeforeValidator(_named_shape)] = RandomModelConfig()
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: _PositiveInt = 1
    tokens_per_block: _PositiveInt = 16
    num_kv_blocks: _PositiveInt = 4096
    max_batch_size: _PositiveInt = 512
    max_seq_len: _PositiveInt = 8192
    prefix_sharing_attention: bool = False
    cuda_graphs: bool = True


class TrtllmEngineConfig(_Model):
    """A compiled TensorRT-LLM engine under its C++ executor (`engines/trtllm.py`).

    Attributes:
        engine_dir: What `python -m engine_build build` wrote.
        model_dir: Local Hugging Face directory of the model, for its tokenizer; None to take and
            return token ids alone.
        bindings: Python module with the executor's bindings.
        mode: ``lease``: places end after their tokens, or when a plan leaves them out; ``slice``:
            places end after their tokens only; ``lockstep``: one token a time, exactly as planned,
            for tests and ablations: it takes three iterations for one.
        lease_tokens: Tokens of a place that leaves compete for.
        hysteresis_steps: A place is taken back when so many plans in a row leave it out.
        start_interval_steps: Branches of requests that have a place start together, every so many
            steps or with one that cannot wait: a step that has a start in it is longer.
        kv_cache_tokens: Size of the KV pool; None for what the memory share gives.
        kv_cache_free_gpu_memory_fraction: Share of the free GPU memory that the KV pool takes.
        retention_s: How long the KV of parked branches and of their prefix is kept ahead of what
            nobody will come back to.
        communication_mode: ``leader``: one process per rank, started by mpirun. ``orchestrator``:
            this process starts the workers.
        worker_executable: The executor worker, for ``orchestrator``.
        iteration_timeout_s: The engine counts as lost when no iteration ends for so long.
    """

    kind: Literal["trtllm"]
    engine_dir: Path
    model_dir: Path | None = None
    bindings: str = "tensorrt_llm.bindings.executor"
    mode: Literal["lease", "slice", "lockstep"] = "lease"
    lease_tokens: _PositiveInt = 256
    hysteresis_steps: _PositiveInt = 4
    start_interval_steps: _PositiveInt = 8
    kv_cache_tokens: _PositiveInt | None = None
    kv_cache_free_gpu_memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    retention_s: Annotated[float, Field(gt=0)] = 60.0
    communication_mode: Literal["leader", "orchestrator"] = "leader"
    worker_executable: Path | None = None
    iteration_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _orchestrator_has_a_worker(self) -> TrtllmEngineConfig:
        if self.communication_mode == "orchestrator" and self.worker_executable is None:
            raise ValueError("worker_executable is required with communication_mode: orchestrator")
        return self


EngineConfig = Annotated[TorchEngineConfig | TrtllmEngineConfig, Field(discriminator="kind")]
_KINDS = {"torch", "trtllm"}


class SchedulerConfig(_Model):
    """Limits of an iteration and the controller's constants.

    Attributes:
        policy: ``irp-off``, ``irp-eager``, ``fixed-cap:N``, ``step-ceiling:F``, ``taper`` or one of
            its variants (`admission.py`).
        max_num_requests: Requests (programs) running at a time.
        max_batch_size: Sequences in one step.
        max_prefill_tokens: Prefill tokens in one step (the chunk budget), counted without context;
            a token behind a long context counts for as much as it costs more.
        prefill_chunking: ``full`` always uses the chunk budget. ``slack`` cuts chunks to what the
            smallest slack leaves, joins and prompts at the pace that they need (`prefill_gate.py`):
            for engines where small chunks cost no more per token than large ones. Leases hold
            whole prompts, which TensorRT-LLM cuts by the engine's max_num_tokens.
        late_requests: ``defer`` starts waiting requests that will miss their TTFT objective after
            all others; ``fcfs`` keeps the order of arrival.
        request_admission: ``patient`` starts a waiting request only while steps of one sequence per
            request, with the prefill that comes with them, keep the TPOT objectives of those that
            can still meet theirs, by (1 - m) tau or by a lead that pays for longer ones to the end;
            and it holds a prompt back while its own time would cost one of them the objective and
            all who wait can still be in time. ``tpot`` leaves out the latter; ``slots`` starts as
            long as slots and memory last.
        rho: Share of the slack above T0 that a step may spend. Steps settle at tau whatever it is;
            below 1, requests keep a lead for slow steps that nobody foresaw.
        kappa: Step budget limit, in smallest tau.
        margin: m; deadlines are built on (1 - m) tau.
        probe_interval_steps: Every so many steps with extras, one runs the baseline alone; None
            for never. None on leases, which extras would lose for it.
        kv_reserve_fraction: Share of a request's worst-case serial footprint that is reserved when
            it starts. Below 1, one that outgrows it is lent what others have reserved and not taken
            yet; when no block is free the newest request is preempted, and comes back with all of
            its footprint reserved.
        max_step_records: Length of the ring of step records.
    """

    policy: str = "taper"
    max_num_requests: _PositiveInt = 16
    max_batch_size: _PositiveInt = 256
    max_prefill_tokens: _PositiveInt = 128
    prefill_chunking: Literal["slack", "full"] = "full"
    late_requests: LateRequests = "defer"
    request_admission: RequestAdmission = "patient"
    rho: Annotated[float, Field(gt=0, le=1)] = 0.5
    kappa: Annotated[float, Field(ge=1)] = 1.0
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    probe_interval_steps: _PositiveInt | None = 100
    kv_reserve_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    max_step_records: _PositiveInt = 8192

    @model_validator(mode="after")
    def _baseline_fits(self) -> SchedulerConfig:
        if self.max_num_requests > self.max_batch_size:
            raise ValueError("max_num_requests must not exceed max_batch_size")
        return self


class ServingConfig(_Model):
    """Everything that a server is started with.

    Attributes:
        slo: Objective of requests that bring none.
        profile: Latency profile of the engine (`python -m engine_build calibrate`).
        step_log: JSONL file that receives every step record; None for none.
        fork_formats: YAML file of further fork formats (`fork_format.py`).
    """

    engine: EngineConfig = TorchEngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    limits: RequestLimits = RequestLimits()
    slo: SloTarget = SloTarget(ttft_ms=2000, tpot_ms=50)
    profile: Path | None = None
    step_log: Path | None = None
    fork_formats: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _embedded_by_default(cls, data: Any) -> Any:
        """The embedded engine unless another is named."""
        if isinstance(data, dict) and isinstance(engine := data.get("engine"), dict):
            return {**data, "engine": {"kind": "torch", **engine}}
        return data

    @model_validator(mode="after")
    def _fits(self) -> ServingConfig:
        if not isinstance(self.engine, TorchEngineConfig):  # its limits are in the engine directory
            if self.engine.mode != "lockstep" and self.scheduler.prefill_chunking == "slack":
                raise ValueError(
                    "scheduler.prefill_chunking: slack needs an engine that is planned step by "
                    "step; a compiled one cuts prompts by itself: use full"
                )
            return self
        if self.scheduler.max_batch_size > self.engine.max_batch_size:
            raise ValueError("scheduler.max_batch_size must not exceed engine.max_batch_size")
        if self.limits.max_total_tokens > self.engine.max_seq_len:
            raise ValueError("limits.max_total_tokens must not exceed engine.max_seq_len")
        return self


def parse_config(data: Any) -> ServingConfig:
    """Validates a configuration read from YAML.

    Raises:
        ConfigError: Names the field at fault.
    """
    try:
        return ServingConfig.model_validate(data or {})
    except ValidationError as failure:
        lines = [
            f"{_field(error['loc']) or 'configuration'}: {error['msg']}"
            for error in failure.errors(include_url=False)
        ]
        raise ConfigError("; ".join(lines)) from None


def _field(loc: tuple[int | str, ...]) -> str:
    """Path of a field as the file has it, without the kind of engine that pydantic puts in."""
    return ".".join(str(at) for at in loc if at not in _KINDS)


def load_config(path: str | Path) -> ServingConfig:
    """Reads a YAML file; relative paths inside it are relative to the file.

    Raises:
        ConfigError: The file is missing, not YAML, or a field is wrong.
    """
    import yaml  # the extra `config`; the core works without it

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    config = parse_config(data)
    base = path.resolve().parent
    return config.model_copy(
        update={
            "profile": config.profile and base / config.profile,
            "step_log": config.step_log and base / config.step_log,
            "fork_formats": config.fork_formats and base / config.fork_formats,
            "engine": _resolve(config.engine, base),
        }
    )


def _resolve(engine: TorchEngineConfig | TrtllmEngineConfig, base: Path) -> Any:
    """The engine's configuration with its paths under the file's directory."""
    paths = {
        name: base / value
        for name, value in engine
        if isinstance(value, Path)  # an absolute one stays as it is
    }
    return engine.model_copy(update=paths)
