"""TensorRT-LLM's executor bindings, called in one place; nothing is decided here.

Everything used is in the recorded contract of 1.2.1 (`tests/contracts/trtllm_1_2_1.json`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from taper_trtllm.config import ConfigError, TrtllmEngineConfig
from taper_trtllm.engines.base import EngineError
from taper_trtllm.engines.trtllm_engine_dir import EngineDir
from taper_trtllm.request import SamplingParams

_PREFIX_PRIORITY = 90  # of 1..100; the default is 35: what nobody waits for goes first
_BRANCH_PRIORITY = 70
_STATS_DEPTH = 1000


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """One place in the batch, to be asked for.

    Attributes:
        token_ids: The prompt: prefix and all of the branch so far.
        max_tokens: Tokens to draw.
        sampling: How.
        seed: Of this place alone; the sampler starts anew with it.
        num_prefix_tokens: Of the prompt, what others share.
        client_id: Shows in TensorRT-LLM's logs and statistics.
        cache_salt_id: KV is shared among equal ones only.
    """

    token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    seed: int
    num_prefix_tokens: int
    client_id: int
    cache_salt_id: int | None


@dataclass(frozen=True, slots=True)
class News:
    """What the executor said since it was last asked.

    Attributes:
        responses: `Response` objects, in order.
        iterations: `IterationStats`, in order.
        requests: `RequestStatsPerIteration`, in order.
    """

    responses: list[Any]
    iterations: list[Any]
    requests: list[Any]


class TrtllmSession:
    """A running executor.

    Args:
        config: How to run it.
        engine: What to run.

    Raises:
        ConfigError: The bindings are not there, or they refuse the engine.
    """

    def __init__(self, config: TrtllmEngineConfig, engine: EngineDir) -> None:
        self._config = config
        self._trt = _import_bindings(config.bindings)
        try:
            self.executor = self._trt.Executor(
                engine.path, self._trt.ModelType.DECODER_ONLY, self._executor_config(engine)
            )
        except Exception as error:
            raise ConfigError(
                f"engine.engine_dir: TensorRT-LLM cannot run {engine.path}, which needs "
                f"{engine.num_ranks} rank(s): {error}"
            ) from error

    def _executor_config(self, engine: EngineDir) -> Any:
        trt, config = self._trt, self._config
        return trt.ExecutorConfig(
            max_beam_width=1,
            # By turns, each start needs one chunk unit of the token budget; in order, the first
            # takes its whole prompt of it, though all but its last token has KV.
            scheduler_config=trt.SchedulerConfig(
                trt.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
                trt.ContextChunkingPolicy.EQUAL_PROGRESS,
            ),
            kv_cache_config=trt.KvCacheConfig(
                enable_block_reuse=True,
                max_tokens=config.kv_cache_tokens,
                free_gpu_memory_fraction=config.kv_cache_free_gpu_memory_fraction,
                enable_partial_reuse=True,
                copy_on_partial_reuse=True,
            ),
            enable_chunked_context=True,
            iter_stats_max_iterations=_STATS_DEPTH,
            request_stats_max_iterations=_STATS_DEPTH,
            batching_type=trt.BatchingType.INFLIGHT,
            max_batch_size=engine.max_batch_size,
            max_num_tokens=engine.max_num_tokens,
            parallel_config=self._parallel_config(),
        )

    def _parallel_config(self) -> Any:
        trt, config = self._trt, self._config
        if config.communication_mode == "leader":
            return trt.ParallelConfig(trt.CommunicationType.MPI, trt.CommunicationMode.LEADER)
        return trt.ParallelConfig(
            trt.CommunicationType.MPI,
            trt.CommunicationMode.ORCHESTRATOR,
            orchestrator_config=trt.OrchestratorConfig(True, str(config.worker_executable)),
        )

    @property
    def takes_requests(self) -> bool:
        """False after a shutdown or failure, and on ranks that only work for their leader."""
        return bool(self.executor.can_enqueue_requests())

    def ask(self, place: PlaceRequest) -> int:
        """Asks for a place; returns the executor's id of the request.

        Raises:
            ValueError: The executor refuses this request.
            EngineError: It takes none any more.
        """
        try:
            return int(self.executor.enqueue_request(self._request(place)))
        except Exception as error:
            if not self.takes_requests:
                raise EngineError(f"TensorRT-LLM takes no requests: {error}") from error
            raise ValueError(f"TensorRT-LLM refuses the request: {error}") from error

    def cancel(self, request_id: int) -> None:
        """Gives a place back; its last token is lost."""
        self.executor.cancel_request(request_id)

    def poll(self, timeout_s: float) -> News:
        """What happened; waits for a response until the timeout.

        Raises:
            EngineError: The executor is lost.
        """
        try:
            responses = self.executor.await_responses(timedelta(seconds=timeout_s))
            iterations = self.executor.get_latest_iteration_stats()
            requests = self.executor.get_latest_request_stats()
        except Exception as error:
            raise EngineError(f"TensorRT-LLM's executor is lost: {error}") from error
        return News(list(responses), list(iterations), list(requests))

    def shutdown(self) -> None:
        """Ends the executor; on ranks that only work it returns when the leader does so."""
        self.executor.shutdown()

    # ------------------------------------------------------------------------- conversions

    def _request(self, place: PlaceRequest) -> Any:
        """All have one priority, so they start in the order in which they were asked for.

        A higher one that waits for blocks would stand before one that is amid its prompt and holds
        them: the capacity scheduler ends at the first that does not fit, and neither goes on.
        """
        trt, sampling = self._trt, place.sampling
        stop_ids = sorted(sampling.stop_ids)
        return trt.Request(
            place.token_ids,
            place.max_tokens,
            streaming=True,
            sampling_config=self._sampling_config(sampling, place.seed),
            output_config=trt.OutputConfig(exclude_input_from_output=True),
            end_id=stop_ids[0] if stop_ids else None,
            stop_words=[[token_id] for token_id in stop_ids[1:]] or None,
            kv_cache_retention_config=self._retention_config(place),
            client_id=place.client_id,
            cache_salt_id=place.cache_salt_id,
        )

    def _sampling_config(self, sampling: SamplingParams, seed: int) -> Any:
        if sampling.temperature == 0:
            return self._trt.SamplingConfig(1, top_k=1, seed=seed)
        return self._trt.SamplingConfig(
            1,
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            seed=seed,
        )

    def _retention_config(self, place: PlaceRequest) -> Any:
        """Keeps a shared prefix before all, then branches that will come back."""
        kept = timedelta(seconds=self._config.retention_s)
        retention = self._trt.KvCacheRetentionConfig
        cut, end = place.num_prefix_tokens, len(place.token_ids)
        ranges = [
            retention.TokenRangeRetentionConfig(start, end, priority, kept)
            for start, end, priority in ((0, cut, _PREFIX_PRIORITY), (cut, end, _BRANCH_PRIORITY))
            if start < end
        ]
        # The binding refuses its own default of `directory`, which this transfer mode does not use.
        return retention(ranges, _BRANCH_PRIORITY, kept, directory="")


def _import_bindings(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"engine.bindings: cannot import {name} ({error}); compiled engines need "
            "tensorrt-llm 1.2 (the NGC container has it), `engine: kind: torch` runs without"
        ) from error
