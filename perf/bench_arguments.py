"""Command line of the benchmark; flags are named as vLLM names them."""

from __future__ import annotations

import argparse
from pathlib import Path

from perf.argument_types import at_least_0, count, positive, positive_int, positive_or_inf, share
from perf.grpc_client import ClientConfig
from perf.metrics import SloScore
from perf.result import METRIC_NAMES
from perf.workload import DEFAULT_TRACE, WorkloadConfig, vocab_size_of
from taper_trtllm.config import ServingConfig

_GOODPUT_NAMES = ("ttft", "tpot", "e2el", "stretch")


def bench_parser(description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m perf.bench_serving``."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.bench_serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("workload"))
    _add_synthetic(parser.add_argument_group("synthetic requests"))
    _add_scoring(parser.add_argument_group("objectives and scoring"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="localhost:8001", help="gRPC host:port (%(default)s)")
    group.add_argument("--model", default="taper", help="model name (%(default)s)")
    group.add_argument("--metrics-url", help="Prometheus page (port 8002 of the same host)")
    group.add_argument(
        "--config", type=Path, help="the server's configuration, for its limits and vocabulary"
    )
    group.add_argument("--max-concurrency", type=positive_int, help="requests in flight at most")
    group.add_argument(
        "--stream-timeout", type=positive, default=300.0, metavar="S",
        help="a request fails after so many seconds (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--request-cancellation-rate", type=share, default=0.0, metavar="SHARE",
        help="share of requests that are withdrawn while they decode (%(default)s)",
    )  # fmt: skip


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=("fork-join", "random", "trace"), default="trace")
    group.add_argument("--dataset-path", type=Path, default=DEFAULT_TRACE, help="CSV trace")
    group.add_argument(
        "--length-scale", type=positive, default=1.0, help="on decoded token counts (%(default)s)"
    )
    group.add_argument(
        "--prompt-scale", type=positive, help="on prompt lengths (as --length-scale)"
    )
    group.add_argument("--num-prompts", type=positive_int, default=1000, help="%(default)s")
    group.add_argument(
        "--request-rate", type=positive_or_inf, default=float("inf"),
        help="requests/s (all at once)",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=positive, default=1.0, help="gamma shape of gaps; 1 is Poisson"
    )
    group.add_argument(
        "--arrivals", choices=("gamma", "trace"), default="gamma",
        help="drawn, or the trace's own stretched to the rate (%(default)s)",
    )  # fmt: skip
    group.add_argument("--num-warmups", type=count, default=0, help="unmeasured requests before")
    group.add_argument("--seed", type=count, default=0, help="%(default)s")
    group.add_argument("--request-id-prefix", default="bench-", help="%(default)s")


def _add_synthetic(group: argparse._ArgumentGroup) -> None:
    defaults = WorkloadConfig()
    for flag, kind, text in (
        ("input-len", positive_int, "prompt tokens"),
        ("output-len", positive_int, "tokens of a `random` request"),
        ("num-branches", positive_int, "fan-out"),
        ("branch-len", positive_int, "mean tokens of a branch"),
        ("branch-len-cv", at_least_0, "coefficient of variation of branch lengths"),
        ("serial-len", positive_int, "tokens before the fork, and after the join"),
        ("fork-fraction", share, "share of `fork-join` requests that fork"),
        ("shared-prefix-len", count, "first prompt tokens common to all requests"),
    ):
        default = getattr(defaults, flag.replace("-", "_"))
        group.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} (%(default)s)")


def _add_scoring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo-ttft-ms", type=positive, help="TTFT objective sent with requests")
    group.add_argument("--slo-tpot-ms", type=positive, help="TPOT objective sent with requests")
    group.add_argument("--slo-stretch", type=positive, help="stretch objective sent with requests")
    group.add_argument(
        "--goodput", nargs="+", type=_goodput_item, default=None, metavar="NAME:VALUE",
        help="bounds a good request keeps: ttft:MS tpot:MS e2el:MS stretch:FACTOR; tpot also "
        "bounds the TPOT inside serial stages (default: the objectives sent)",
    )  # fmt: skip


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics", type=_metric_names,
        default=("ttft", "tpot", "serial_tpot", "itl", "e2el"), metavar="NAMES",
        help=f"comma list of {', '.join(METRIC_NAMES)}",
    )  # fmt: skip
    group.add_argument(
        "--metric-percentiles", type=_percentiles, default=(99.0,), metavar="P,P",
        help="comma list of percentiles (99)",
    )  # fmt: skip
    group.add_argument("--label", help="name of the run (the server's policy)")
    group.add_argument(
        "--metadata", nargs="*", type=_key_value, default=[], metavar="KEY=VALUE",
        help="added to the result",
    )  # fmt: skip
    group.add_argument("--save-result", action="store_true", help="write the result as JSON")
    group.add_argument("--save-detailed", action="store_true", help="with per-request lists")
    group.add_argument("--save-records", type=Path, metavar="FILE", help="JSONL, one per request")
    group.add_argument("--result-dir", type=Path, default=Path("results"), help="%(default)s")
    group.add_argument("--result-filename", help="instead of vLLM's pattern")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


# ---------------------------------------------------------------------- arguments to configurations


def client_config(arguments: argparse.Namespace) -> ClientConfig:
    """How requests are sent."""
    return ClientConfig(
        url=arguments.url,
        model=arguments.model,
        max_concurrency=arguments.max_concurrency,
        stream_timeout_s=arguments.stream_timeout,
        slo_ttft_ms=arguments.slo_ttft_ms,
        slo_tpot_ms=arguments.slo_tpot_ms,
        slo_stretch=arguments.slo_stretch,
        cancellation_rate=arguments.request_cancellation_rate,
        seed=arguments.seed,
    )


def workload_config(arguments: argparse.Namespace, serving: ServingConfig) -> WorkloadConfig:
    """What is sent.

    Raises:
        WorkloadError: An option is out of range.
    """
    return WorkloadConfig(
        dataset_name=arguments.dataset_name,
        dataset_path=arguments.dataset_path,
        num_prompts=arguments.num_prompts,
        request_rate=arguments.request_rate,
        burstiness=arguments.burstiness,
        arrivals=arguments.arrivals,
        length_scale=arguments.length_scale,
        prompt_scale=arguments.prompt_scale,
        seed=arguments.seed,
        vocab_size=vocab_size_of(serving.engine),
        limits=serving.limits,
        request_id_prefix=arguments.request_id_prefix,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        num_branches=arguments.num_branches,
        branch_len=arguments.branch_len,
        branch_len_cv=arguments.branch_len_cv,
        serial_len=arguments.serial_len,
        fork_fraction=arguments.fork_fraction,
        shared_prefix_len=arguments.shared_prefix_len,
    )


def score_of(arguments: argparse.Namespace) -> SloScore:
    """How requests are scored: by `--goodput`, or else by the objectives that are sent."""
    if arguments.goodput is None:
        return SloScore(
            ttft_ms=arguments.slo_ttft_ms,
            tpot_ms=arguments.slo_tpot_ms,
            stretch=arguments.slo_stretch,
        )
    bounds = dict(arguments.goodput)
    return SloScore(
        ttft_ms=bounds.get("ttft"),
        tpot_ms=bounds.get("tpot"),
        e2el_ms=bounds.get("e2el"),
        stretch=bounds.get("stretch"),
    )


# ------------------------------------------------------------------------------- argument types


def _goodput_item(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in _GOODPUT_NAMES or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME:VALUE with a name of {', '.join(_GOODPUT_NAMES)} (got {text!r})"
        )
    return name, positive(value)


def _key_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE (got {text!r})")
    return key, value


def _metric_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = set(names) - set(METRIC_NAMES)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"must be in [0, 100] (got {text})")
    return values
