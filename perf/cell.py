"""One cell of an experiment: a fresh server of the regime under one policy, measured once."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.bench_serving import BenchConfig, run_benchmark
from perf.grpc_client import ClientConfig
from perf.latency import RequestRecord
from perf.metrics import SloScore
from perf.regime import Regime, write_config
from perf.workload import DEFAULT_TRACE, build_workload
from taper_trtllm.config import ServingConfig
from taper_trtllm.triton_server import TritonServer

_NUM_WARMUPS = 8
_STREAM_TIMEOUT_S = 120.0  # far beyond any objective; a request that takes longer is a miss


@dataclass(frozen=True, slots=True)
class Experiment:
    """What all cells have in common.

    Attributes:
        regime: Slots, memory, objectives.
        base: Configuration that the regime builds on.
        profile: Latency profile of the engine.
        dataset_path: Trace that is replayed.
    """

    regime: Regime
    base: ServingConfig
    profile: Path
    dataset_path: Path = DEFAULT_TRACE

    @property
    def score(self) -> SloScore:
        """How requests are scored: by the objectives that the server holds them to."""
        return SloScore(ttft_ms=self.regime.ttft_slo_ms, tpot_ms=self.regime.tpot_slo_ms)


def run_cell(
    experiment: Experiment,
    policy: str,
    request_rate: float,
    num_prompts: int,
    seed: int,
    show_progress: bool,
) -> tuple[dict[str, Any], list[RequestRecord]]:
    """Starts a server, replays the trace against it and stops it.

    Equal seeds give equal requests and arrivals, so cells of different policies are paired.

    Raises:
        TritonServerError: The server does not start.
        ServerUnavailableError: It cannot be benchmarked.
    """
    workload_config = experiment.regime.workload_config(
        experiment.base, experiment.dataset_path, request_rate, num_prompts, seed
    )
    workload = build_workload(workload_config)
    config = experiment.regime.serving_config(experiment.base, policy, experiment.profile)
    with tempfile.TemporaryDirectory(prefix="taper_cell_") as directory:
        config_path = Path(directory) / "serving.yaml"
        write_config(config, config_path)
        with TritonServer(config_path) as server:
            bench = BenchConfig(
                client=ClientConfig(url=server.grpc_url, stream_timeout_s=_STREAM_TIMEOUT_S),
                workload=workload_config,
                score=experiment.score,
                metrics_url=server.metrics_url,
                num_warmups=_NUM_WARMUPS,
                percentiles=(50.0, 99.0),
                label=policy,
                show_progress=show_progress,
            )
            return asyncio.run(run_benchmark(bench, workload))
