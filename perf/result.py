"""The result of a run: vLLM's JSON keys and ours, its banner, and records in AIPerf shape."""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perf.latency import RequestRecord, measure
from perf.metrics import (
    SloScore,
    describe,
    goodput,
    group_figures,
    scored,
    victims,
)

SCHEMA_VERSION = 1

_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "serial_tpot": ("TPOT inside Serial Stages", "serial TPOT"),
    "branch_tpot": ("TPOT of Branches", "branch TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
METRIC_NAMES = tuple(_TITLES)


def run_figures(
    records: Sequence[RequestRecord], slo: SloScore, percentiles: Sequence[float], window_s: float
) -> dict[str, Any]:
    """Everything that the client measured.

    Args:
        records: Of the measured requests; warm-up is not among them.
        slo: How they are scored.
        percentiles: Asked for each latency.
        window_s: Length of the arrival schedule; 0 if all were sent at once.
    """
    completed = [record for record in records if record.is_completed]
    counted = scored(records)
    duration_s = max(record.end_s for record in records)
    num_input = sum(record.num_prompt_tokens for record in completed)
    num_output = sum(record.num_output_tokens for record in completed)
    server = [record.server_metrics for record in completed if record.server_metrics]
    return {
        "duration": duration_s,
        "arrival_window_s": window_s or duration_s,
        "completed": len(completed),
        "failed": len(counted) - len(completed),
        "num_cancelled": len(records) - len(counted),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _max_tokens_per_s(records),
        "max_concurrent_requests": _max_concurrency(records),
        **goodput(records, slo, window_s or duration_s),
        **group_figures(counted, slo, percentiles),
        **describe("client_queue_ms", [1e3 * (r.sent_s - r.scheduled_s) for r in records], (99,)),
        "mean_width": _mean(server, "mean_width", branching=True),
        "mean_join_wait_ms": _mean(server, "join_wait_ms", branching=True),
        "kv_cache_reused_blocks": sum(m["num_reused_blocks"] for m in server),
        "groups": {
            name: group_figures(group, slo, percentiles)
            for name, group in {
                "plain": [r for r in counted if not r.is_branching],
                "branching": [r for r in counted if r.is_branching],
                "victims": victims(counted),
            }.items()
        },
    }


def _mean(metrics: Sequence[dict[str, Any]], key: str, branching: bool) -> float | None:
    values = [m[key] for m in metrics if bool(m["num_forks"]) == branching]
    return float(np.mean(values)) if values else None


def _max_tokens_per_s(records: Sequence[RequestRecord]) -> float:
    """Most tokens received within one whole second of the run."""
    seconds: Counter[int] = Counter()
    for record in records:
        for event in record.events:
            seconds[int(event.time_s)] += event.num_tokens
    return float(max(seconds.values(), default=0))


def _max_concurrency(records: Sequence[RequestRecord]) -> int:
    changes = sorted([(r.end_s, -1) for r in records] + [(r.sent_s, 1) for r in records])
    return int(max(np.cumsum([change for _, change in changes])))


def detailed_lists(records: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    """Per-request lists as vLLM names them, in seconds."""
    latencies = [measure(record) for record in records]
    return {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [m.ttft_ms / 1e3 if m else 0.0 for m in latencies],
        "itls": [[gap / 1e3 for gap in m.itl_ms] if m else [] for m in latencies],
        "latencies": [m.e2el_ms / 1e3 if m else 0.0 for m in latencies],
        "start_times": [record.sent_s for record in records],
        "errors": [record.error or "" for record in records],
    }


# --------------------------------------------------------------------------------------- banner


def banner(
    result: dict[str, Any], metric_names: Sequence[str], percentiles: Sequence[float]
) -> str:
    """The result as vLLM prints it, our lines below its own."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    for label, key in (
        ("Successful requests:", "completed"),
        ("Failed requests:", "failed"),
        ("Cancelled requests:", "num_cancelled"),
        ("Maximum request concurrency:", "max_concurrency"),
        ("Request rate configured (RPS):", "request_rate"),
        ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Token goodput (tok/s):", "token_goodput"),
        ("SLO attainment:", "slo_attainment"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
        ("Mean client queue delay (ms):", "mean_client_queue_ms"),
    ):
        lines += _line(label, result.get(key))
    for name in metric_names:
        title, short = _TITLES[name]
        lines.append(f"{title:-^50}")
        for statistic in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
            label = f"{statistic.capitalize()} {short} (ms):"
            lines += _line(label, result.get(f"{statistic}_{name}_ms"))
    lines.append(f"{'Branches':-^50}")
    for group in ("plain", "branching", "victims"):
        attained = result["groups"][group].get("slo_attainment")
        lines += _line(f"SLO attainment, {group}:", attained)
    for label, key in (
        ("Mean width (branching requests):", "mean_width"),
        ("Deferred branch steps:", "num_deferred_branch_steps"),
        ("Predicted externality (ms/step):", "mean_predicted_branch_externality_ms"),
        ("Realised externality (ms/step):", "mean_branch_externality_ms"),
    ):
        lines += _line(label, result.get(key))
    return "\n".join([*lines, "=" * 50])


def _line(label: str, value: float | str | None) -> list[str]:
    if value is None:
        return []
    text = f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return [f"{label:<40} {text:<10}".rstrip()]


# ---------------------------------------------------------------------------------------- files


def default_filename(result: dict[str, Any], now: datetime) -> str:
    """The file name that vLLM would choose."""
    limit = result["max_concurrency"]
    concurrency = f"-concurrency{limit}" if limit is not None else ""
    label = str(result["label"]).replace(":", "-").replace("/", "-")
    rate, date = result["request_rate"], now.strftime("%Y%m%d-%H%M%S")
    return f"{label}-{rate}qps{concurrency}-{result['model_id']}-{date}.json"


@cache
def git_sha() -> str | None:
    """Commit of the working tree; None outside of one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def save_json(result: dict[str, Any], path: Path) -> None:
    """Writes a result; a partial file is never left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def load_json(path: Path) -> dict[str, Any]:
    """Reads what `save_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def save_records(records: Sequence[RequestRecord], path: Path) -> None:
    """Writes one line per request in the shape of AIPerf's ``profile_export.jsonl``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_aiperf_record(record)) + "\n" for record in records))


def _aiperf_record(record: RequestRecord) -> dict[str, Any]:
    latency = measure(record)
    metrics: dict[str, Any] = {}
    if latency is not None:
        values = {
            "time_to_first_token": latency.ttft_ms,
            "inter_token_latency": latency.tpot_ms,
            "request_latency": latency.e2el_ms,
            "serial_inter_token_latency": latency.serial_tpot_ms,
            "branch_inter_token_latency": latency.branch_tpot_ms,
        }
        metrics = {k: {"value": v, "unit": "ms"} for k, v in values.items() if v is not None}
    counts = {
        "output_sequence_length": record.num_output_tokens,
        "input_sequence_length": record.num_prompt_tokens,
    }
    metrics |= {name: {"value": n, "unit": "tokens"} for name, n in counts.items()}
    error = None
    if record.error is not None:
        error = {"code": None, "type": "server", "message": record.error}
    return {
        "metadata": {
            "x_request_id": record.request_id,
            "family": record.family,
            "request_start_ns": round(1e9 * record.sent_s),
            "request_ack_ns": round(1e9 * record.events[0].time_s) if record.events else None,
            "request_end_ns": round(1e9 * record.end_s),
            "benchmark_phase": "profiling",
            "was_cancelled": record.was_cancelled,
        },
        "metrics": metrics,
        "server_metrics": record.server_metrics,
        "error": error,
    }
