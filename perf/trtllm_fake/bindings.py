"""Stands for `tensorrt_llm.bindings.executor`: every recorded name, `Executor` with behaviour.

Classes are the strict ones of the recorded contract. `Executor.runtime` is the fake's own: clock,
faults, block check and history for tests and simulations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_build.contract import load_contract
from perf.trtllm_fake import strict
from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    create_decoder,
    read_engine_dir,
)
from perf.trtllm_fake.loop import LoopLimits
from perf.trtllm_fake.ranks import Leader, Worker, own_rank
from perf.trtllm_fake.runtime import Runtime, RuntimeConfig
from perf.trtllm_fake.submission import read_request

_module = strict.build_module(load_contract())
__all__ = sorted(vars(_module))
globals().update(vars(_module))  # but for the classes below
_DEFAULT_PRIORITY = 0.5  # Request::kDefaultPriority


class Request(_module.Request):
    """Refuses what `Request::Impl::validate` refuses (executor/requestImpl.h)."""

    def _init(self, **arguments: Any) -> None:
        if not arguments["input_token_ids"]:
            raise RuntimeError("Assertion failed: !mInputTokenIds.empty()")
        if arguments["max_tokens"] <= 0:
            raise RuntimeError("Assertion failed: mMaxNewTokens > 0")


class Response(_module.Response):
    """Has an error or a result."""

    __slots__ = ()

    def _has_error(self) -> bool:
        return "error_msg" in self._values


def _deferred(recorded: property) -> property:
    """A property of metrics that are made when they are read."""

    def fget(self: Any) -> Any:
        make = self._values.get("make_metrics")
        return recorded.fget(self) if make is None else make()

    fget.__nb_signature__ = recorded.fget.__nb_signature__  # type: ignore[attr-defined]
    return property(fget, recorded.fset)


class Result(_module.Result):
    """Its metrics are made when they are read: few are."""

    __slots__ = ()
    request_perf_metrics = _deferred(_module.Result.request_perf_metrics)

    def _defer_metrics(self, make: Callable[[], Any]) -> None:
        """Of the fake: what makes the metrics."""
        self._values["make_metrics"] = make


class Executor(_module.Executor):
    """Runs on a fake engine directory (`engine_dir.py`).

    Left out: encoders, engines in memory, debug tensors, KV cache events.
    """

    __slots__ = ("_leader", "runtime")
    runtime: Runtime | Worker

    def _init(self, **arguments: Any) -> None:
        if (
            "model_path" not in arguments
            or arguments["model_type"] != _module.ModelType.DECODER_ONLY
        ):
            raise NotImplementedError("the fake executor runs decoder-only engine directories")
        path, config = Path(arguments["model_path"]), arguments["executor_config"]
        description, engine = read_engine_dir(path)
        runtime_config = _runtime_config(config, description.build_config, engine)
        rank = own_rank(description.num_ranks)
        if rank:
            self.runtime = Worker(path, rank)
            return
        decoder = create_decoder(path, description, engine)
        self._leader = Leader(path, description.num_ranks)
        self.runtime = Runtime(runtime_config, decoder, _names)

    def _enter(self) -> Executor:
        return self

    def _exit(self, type: Any, value: Any, traceback: Any) -> None:
        self._shutdown()

    def _shutdown(self) -> None:
        self.runtime.shutdown()
        if isinstance(self.runtime, Runtime):
            self._leader.end()

    def _enqueue_request(self, request: Any) -> int:
        return self._enqueue_requests([request])[0]

    def _enqueue_requests(self, requests: Sequence[Any]) -> list[int]:
        return self.runtime.enqueue([read_request(r, _priority(r)) for r in requests])

    def _await_responses(
        self,
        timeout: timedelta | None,
        id: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[Any]:
        timeout_s = None if timeout is None else timeout.total_seconds()
        if id is not None:
            return self.runtime.await_one(id, timeout_s)
        if ids is not None:
            return self.runtime.await_several(ids, timeout_s)
        return self.runtime.await_all(timeout_s)

    def _get_num_responses_ready(self, id: int | None) -> int:
        return self.runtime.num_ready(id)

    def _cancel_request(self, id: int) -> None:
        self.runtime.cancel(id)

    def _get_latest_iteration_stats(self) -> list[Any]:
        return self.runtime.take_iteration_stats()

    def _get_latest_request_stats(self) -> list[Any]:
        return self.runtime.take_request_stats()

    def _can_enqueue_requests(self) -> bool:
        return self.runtime.can_enqueue


def _priority(request: Any) -> float:
    priority = request._values["priority"]
    return _DEFAULT_PRIORITY if priority is None else priority


def _runtime_config(config: Any, build: BuildConfig, engine: FakeEngine) -> RuntimeConfig:
    """Engine and executor configuration together, as `TrtGptModelInflightBatching` has it.

    Raises:
        RuntimeError: What the original refuses.
        NotImplementedError: What the fake does not do.
    """
    _check_made(config)
    kv_cache, plugins = config.kv_cache_config, build.plugin_config
    if not plugins.paged_kv_cache or not plugins.remove_input_padding:
        raise RuntimeError(
            "TrtGptModelInflightBatching requires GPT attention/Mamba Conv 1d plugin with packed "
            "input and paged KV cache."
        )
    tokens_per_block, num_kv_blocks = plugins.tokens_per_block, engine.num_kv_blocks
    if kv_cache.max_tokens is not None:
        num_kv_blocks = min(num_kv_blocks, -(-kv_cache.max_tokens // tokens_per_block))
    return RuntimeConfig(
        limits=LoopLimits(
            max_batch_size=_smaller(config.max_batch_size, build.max_batch_size),
            max_num_tokens=_smaller(config.max_num_tokens, build.max_num_tokens),
            max_seq_len=build.max_seq_len,
            chunked_context=_if_paged(config.enable_chunked_context, plugins, "chunked context"),
            equal_progress=config.scheduler_config.context_chunking_policy
            == _module.ContextChunkingPolicy.EQUAL_PROGRESS,
            max_queue_size=config.max_queue_size,
        ),
        num_kv_blocks=num_kv_blocks,
        tokens_per_block=tokens_per_block,
        drive=engine.drive,
        enable_block_reuse=_if_paged(kv_cache.enable_block_reuse, plugins, "KV cache reuse"),
        enable_partial_reuse=kv_cache.enable_partial_reuse,
        copy_on_partial_reuse=kv_cache.copy_on_partial_reuse,
        iter_stats_max_iterations=config.iter_stats_max_iterations,
        request_stats_max_iterations=config.request_stats_max_iterations,
    )


def _check_made(config: Any) -> None:
    scheduler, kv_cache = config.scheduler_config, config.kv_cache_config
    policy = scheduler.capacity_scheduler_policy
    if policy != _module.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT:
        raise NotImplementedError(f"the fake executor does not do {policy.name}")
    if config.batching_type != _module.BatchingType.INFLIGHT or config.max_beam_width != 1:
        raise NotImplementedError("the fake executor does in-flight batching with one beam only")
    for name in ("host_cache_size", "max_attention_window", "sink_token_length"):
        if getattr(kv_cache, name):
            raise NotImplementedError(f"the fake executor does not do KvCacheConfig.{name}")
    if kv_cache.cross_kv_cache_fraction is not None:
        raise RuntimeError("Do not set crossKvCacheFraction for decoder-only model")
    parallel = config.parallel_config
    if parallel and parallel.communication_mode != _module.CommunicationMode.LEADER:
        raise NotImplementedError("the fake executor's ranks are started by mpirun (LEADER)")
    for name in ("spec_dec_config", "guided_decoding_config", "decoding_config"):
        if getattr(config, name) is not None:
            raise NotImplementedError(f"the fake executor does not do ExecutorConfig.{name}")


def _if_paged(wanted: bool, plugins: Any, what: str) -> bool:
    """Like the original, which turns off with a warning what the engine was not built for."""
    if wanted and not plugins.use_paged_context_fmha:
        warnings.warn(
            f"Fixing executorConfig: {what} disabled because model was not built with paged "
            "context FMHA support",
            stacklevel=2,
        )
        return False
    return wanted


def _smaller(wanted: int | None, built: int) -> int:
    """What the engine was built for is the most there can be."""
    return built if wanted is None else min(wanted, built)


_names = SimpleNamespace(**{**vars(_module), "Response": Response, "Result": Result})
