"""Benchmarks a running server: ``python -m perf.bench_serving``.

Flags, printed lines and JSON keys are those of ``vllm bench serve`` where it has them. Requests
are scored strictly: TTFT, TPOT over all tokens and TPOT inside serial stages must each be within
bounds, and a request that fails or does not finish is a miss. Goodput is per second of the arrival
schedule.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tritonclient.grpc import aio as grpcclient

from perf.bench_arguments import bench_parser, client_config, score_of, workload_config
from perf.grpc_client import ClientConfig, ServerUnavailableError, check_server, send_workload
from perf.latency import RequestRecord
from perf.metrics import ScoreError, SloScore
from perf.result import (
    SCHEMA_VERSION,
    banner,
    default_filename,
    detailed_lists,
    git_sha,
    run_figures,
    save_json,
    save_records,
)
from perf.server_metrics import MetricsPage, scrape, server_figures
from perf.trace import TraceError
from perf.workload import Workload, WorkloadConfig, WorkloadError, build_workload
from taper_trtllm.config import ConfigError, ServingConfig, load_config

_EXPORT_DELAY_S = 0.5  # the server exports its metrics behind its steps


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """One run against a server that is up.

    Attributes:
        client: How requests are sent.
        workload: What is sent.
        score: How requests are scored.
        metrics_url: The server's Prometheus page.
        num_warmups: Requests sent before the run and not measured.
        percentiles: Asked for each latency.
        label: Name of the run; None for the policy that the server says it runs.
        metadata: Added to the result.
        show_progress: Draw a progress bar.
    """

    client: ClientConfig
    workload: WorkloadConfig
    score: SloScore
    metrics_url: str
    num_warmups: int = 0
    percentiles: tuple[float, ...] = (99.0,)
    label: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    show_progress: bool = True


async def run_benchmark(
    config: BenchConfig, workload: Workload
) -> tuple[dict[str, Any], list[RequestRecord]]:
    """Runs one benchmark.

    Args:
        config: Of the run.
        workload: Built from `config.workload`.

    Returns:
        The result under vLLM's keys and ours, and the records it was computed from.

    Raises:
        ServerUnavailableError: The server is not there or does not speak our tensors.
    """
    client = grpcclient.InferenceServerClient(config.client.url)
    try:
        await check_server(client, config.client)
        await _warm_up(client, config)
        before = await _scrape(config.metrics_url)
        with _progress(len(workload.requests), config.show_progress) as advance:
            records = await send_workload(client, config.client, workload.requests, advance)
        await asyncio.sleep(_EXPORT_DELAY_S)
        after = await _scrape(config.metrics_url)
    finally:
        await client.close()
    window_s = workload.requests[-1].arrival_s
    result = {
        **_header(config, after.policy),
        "dropped": workload.dropped,
        **run_figures(records, config.score, config.percentiles, window_s),
        **server_figures(before, after),
    }
    return result, records


async def _warm_up(client: grpcclient.InferenceServerClient, config: BenchConfig) -> None:
    if config.num_warmups == 0:
        return
    requests = build_workload(
        replace(
            config.workload,
            num_prompts=config.num_warmups,
            request_rate=float("inf"),
            arrivals="gamma",
            seed=config.workload.seed + 1_000_003,  # other requests than the measured ones
            request_id_prefix=f"{config.workload.request_id_prefix}warmup-",
        )
    ).requests
    records = await send_workload(client, replace(config.client, cancellation_rate=0.0), requests)
    errors = [record.error for record in records if record.error]
    if len(errors) == len(records):
        raise ServerUnavailableError(f"every warm-up request failed; the first: {errors[0]}")
    await asyncio.sleep(_EXPORT_DELAY_S)


async def _scrape(url: str) -> MetricsPage:
    try:
        return await asyncio.to_thread(scrape, url)
    except OSError as error:
        raise ServerUnavailableError(
            f"no metrics page at {url} ({error}); give it with --metrics-url"
        ) from None


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        refresh_per_second=2,  # the client shares its cores with the server
        disable=not shown,
    )
    with bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def _header(config: BenchConfig, policy: str | None) -> dict[str, Any]:
    rate = config.workload.request_rate
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "triton-grpc",
        "endpoint_type": "kserve-v2-stream",
        "label": config.label or policy or "unknown",
        "policy": policy,
        "model_id": config.client.model,
        "tokenizer_id": None,
        "num_prompts": config.workload.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": config.workload.burstiness,
        "max_concurrency": config.client.max_concurrency,
        "seed": config.workload.seed,
        "arrivals": config.workload.arrivals,
        "dataset_name": config.workload.dataset_name,
        "length_scale": config.workload.length_scale,
        "prompt_scale": config.workload.prompt_scale or config.workload.length_scale,
        "slo_ttft_ms": config.score.ttft_ms,
        "slo_tpot_ms": config.score.tpot_ms,
        "slo_e2el_ms": config.score.e2el_ms,
        "slo_stretch": config.score.stretch,
        "git_sha": git_sha(),
        **config.metadata,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the benchmark could not run."""
    arguments = bench_parser(__doc__ or "").parse_args(argv)
    try:
        serving = load_config(arguments.config) if arguments.config else ServingConfig()
        host = urllib.parse.urlsplit(f"//{arguments.url}").hostname
        config = BenchConfig(
            client=client_config(arguments),
            workload=workload_config(arguments, serving),
            score=score_of(arguments),
            metrics_url=arguments.metrics_url or f"http://{host}:8002/metrics",
            num_warmups=arguments.num_warmups,
            percentiles=arguments.metric_percentiles,
            label=arguments.label,
            metadata=dict(arguments.metadata),
            show_progress=not arguments.disable_tqdm,
        )
        workload = build_workload(config.workload)
        result, records = asyncio.run(run_benchmark(config, workload))
    except (
        ConfigError, ScoreError, ServerUnavailableError, TraceError, WorkloadError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(banner(result, arguments.percentile_metrics, config.percentiles))
    errors = {record.error for record in records if record.error}
    for message in sorted(errors)[:5]:
        print(f"failed: {message}", file=sys.stderr)
    if arguments.save_detailed:
        result |= detailed_lists(records)
    if arguments.save_result or arguments.save_detailed:
        name = arguments.result_filename or default_filename(result, datetime.now())
        path = arguments.result_dir / name
        save_json(result, path)
        print(f"result: {path}")
    if arguments.save_records:
        save_records(records, arguments.save_records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
