"""Command line of the simulation, and what it describes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perf.argument_types import (
    at_least_0,
    count,
    output_path,
    plot_path,
    positive,
    positive_int,
    positive_share,
    share,
)
from perf.mixes import MIXES, Mix, Range
from perf.offered_load import LoadConfig
from perf.shipped_profiles import PROFILES, named_profile
from perf.simulated_cell import Study
from perf.simulation import Deployment
from perf.workload import DEFAULT_TRACE
from taper_trtllm.admission import make_policy
from taper_trtllm.config import ConfigError, SchedulerConfig
from taper_trtllm.engines.simulated import Disturbance, SimulatedConfig
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import LatencyProfile
from taper_trtllm.request import SloTarget

POLICIES = ("irp-off", "irp-eager", "taper")

_TOKENS_PER_BLOCK = 32
_MAX_BATCH_SIZE = 512
_MIX_OPTIONS = (
    "fork_fraction", "input_len", "output_len", "rounds", "serial_len", "num_branches",
    "branch_len", "nested_fraction",
)  # fmt: skip


class SimulateError(ValueError):
    """A simulation that cannot run, naming the option at fault."""


def simulate_parser(description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m perf.simulate``."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.simulate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_load(parser.add_argument_group("load"))
    _add_mix(parser.add_argument_group("synthetic mix (each overrides the one of --mix)"))
    _add_policy(parser.add_argument_group("policies and objectives"))
    _add_server(parser.add_argument_group("server"))
    _add_run(parser.add_argument_group("run"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--workload", type=Path, metavar="CSV",
        help="trace, in the format of perf/workloads/README.md (the public one)",
    )  # fmt: skip
    source.add_argument("--mix", choices=MIXES, help="synthetic requests instead of a trace")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument(
        "--request-rate", type=_rates, metavar="R[,R...]",
        help="requests per second (the trace's own with --arrivals trace)",
    )  # fmt: skip
    rate.add_argument(
        "--find-capacity", action="store_true",
        help="search each policy's SLO capacity: the highest rate with --target attainment",
    )  # fmt: skip
    group.add_argument(
        "--arrivals", choices=("trace", "poisson", "gamma"), default="poisson",
        help="the trace's own order and gaps, scaled to the rate; or drawn (%(default)s)",
    )  # fmt: skip
    group.add_argument("--cv", type=positive, help="coefficient of variation of gamma gaps")
    group.add_argument(
        "--length-scale", type=positive, default=1.0, help="on decoded token counts (%(default)s)"
    )
    group.add_argument(
        "--prompt-scale", type=positive, default=1.0, help="on prompt lengths (%(default)s)"
    )


def _add_mix(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--fork-fraction", type=share, help="share of requests that fork")
    group.add_argument("--input-len", type=_range, metavar="LOW:HIGH", help="prompt tokens")
    group.add_argument("--output-len", type=positive_int, help="median tokens of a plain request")
    group.add_argument("--rounds", type=_range, metavar="LOW:HIGH", help="parallel stages")
    group.add_argument("--serial-len", type=_range, metavar="LOW:HIGH", help="of a serial stage")
    group.add_argument("--num-branches", type=_range, metavar="LOW:HIGH", help="fan-out")
    group.add_argument("--branch-len", type=positive_int, help="median tokens of a branch")
    group.add_argument("--nested-fraction", type=share, help="of forking requests, fork twice")


def _add_policy(group: argparse._ArgumentGroup) -> None:
    defaults = SchedulerConfig()
    group.add_argument(
        "--policy", type=_names, default=POLICIES, metavar="NAMES",
        help="comma list; NAME@margin=0.05@kappa=2 changes scheduler settings of one "
        f"({','.join(POLICIES)})",
    )  # fmt: skip
    group.add_argument("--slo-tpot-ms", type=positive, required=True, help="TPOT objective")
    group.add_argument("--slo-ttft-ms", type=positive, required=True, help="TTFT objective")
    group.add_argument("--slo-stretch", type=positive, help="stretch objective (none)")
    group.add_argument(
        "--margin", type=float, default=defaults.margin,
        help="share of the TPOT objective that deadlines hold back (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--rho", type=float, default=defaults.rho,
        help="share of the slack that a step may spend (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--kappa", type=float, default=defaults.kappa,
        help="longest step, in TPOT objectives (%(default)s)",
    )  # fmt: skip


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--profile", required=True,
        help="latency profile: a file, or a shipped one by name ("
        + ", ".join(PROFILES) + ")",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-tokens", type=positive_int, help="size of the KV pool (the profile's)"
    )
    group.add_argument(
        "--max-num-requests", type=positive_int, help="request slots (--max-batch-size)"
    )
    group.add_argument(
        "--max-batch-size", type=positive_int,
        help=f"sequences in a step (widest bucket of the profile, or {_MAX_BATCH_SIZE})",
    )  # fmt: skip
    group.add_argument(
        "--max-prefill-tokens", type=positive_int, default=1024,
        help="prefill tokens in a step (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-seq-len", type=positive_int, default=40960,
        help="context limit; requests whose prompt, decoded tokens of all branches and branch "
        "headers exceed it are dropped and counted (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--disaggregated-prefill", action="store_true",
        help="prompts are computed elsewhere and cost nothing here; headers and joins do",
    )  # fmt: skip
    group.add_argument(
        "--free-joins", action="store_true", help="branch headers and joins cost nothing"
    )
    group.add_argument(
        "--prefix-sharing-attention", action="store_true",
        help="a step reads what branches of a request share once (cascade attention)",
    )  # fmt: skip
    group.add_argument(
        "--host-overhead-ms", type=at_least_0, default=0.0,
        help="added to every step, unknown to the profile (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--noise", type=at_least_0, default=0.02,
        help="lognormal standard deviation of a step (%(default)s)",
    )  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seeds", type=positive_int, default=6, metavar="N", help="%(default)s")
    group.add_argument("--seed", type=count, default=0, help="the first (%(default)s)")
    group.add_argument(
        "--duration", type=positive, default=300.0, metavar="S",
        help="length of the scored window of arrivals (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--warmup-s", type=at_least_0, default=60.0, help="arrivals before it (%(default)s)"
    )
    group.add_argument(
        "--drain-s", type=at_least_0, default=300.0,
        help="scored requests that are not done so long after it are misses; arrivals go on "
        "until then (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--target", type=positive_share, default=0.95, help="attainment at capacity (%(default)s)"
    )
    group.add_argument(
        "--processes", type=positive_int, default=os.cpu_count() or 1, help="%(default)s"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", type=output_path, metavar="FILE", help="results")
    group.add_argument("--plot", type=plot_path, metavar="PNG", help="curves over the rate")
    group.add_argument(
        "--chrome-trace", type=output_path, metavar="FILE",
        help="steps of the first policy and seed at the first rate, or its capacity, for https://ui.perfetto.dev",
    )  # fmt: skip
    group.add_argument(
        "--trace-window", type=_window, default=(60.0, 70.0), metavar="START:END",
        help="its virtual seconds (60:70)",
    )  # fmt: skip
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


# --------------------------------------------------------------------- arguments to a study


def study_of(arguments: argparse.Namespace) -> Study:
    """What the command line describes.

    Raises:
        SimulateError: Options do not fit each other.
        ConfigError: A policy or one of its settings is wrong.
        ProfileError: The profile cannot be read.
        TraceError: The trace has no arrivals where they are needed.
    """
    profile = named_profile(arguments.profile)
    max_batch_size = arguments.max_batch_size or max(profile.width_buckets or (_MAX_BATCH_SIZE,))
    num_kv_blocks = _kv_cache_tokens(arguments, profile) // _TOKENS_PER_BLOCK
    if num_kv_blocks < 1:
        raise SimulateError(f"--kv-cache-tokens: at least {_TOKENS_PER_BLOCK}")
    load = _load_config(arguments, num_kv_blocks)
    engine = SimulatedConfig(
        num_kv_blocks=num_kv_blocks,
        tokens_per_block=_TOKENS_PER_BLOCK,
        max_batch_size=max_batch_size,
        max_seq_len=arguments.max_seq_len,
        disaggregated_prefill=arguments.disaggregated_prefill,
        free_joins=arguments.free_joins,
        prefix_sharing_attention=arguments.prefix_sharing_attention,
        disturbance=Disturbance(host_overhead_ms=arguments.host_overhead_ms, noise=arguments.noise),
    )
    policies = _schedulers(arguments, max_batch_size, profile)
    slo = SloTarget(
        ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms, stretch=arguments.slo_stretch
    )
    deployment = Deployment(
        profile, profile, engine, next(iter(policies.values())), slo, load.limits
    )
    return Study(
        deployment, policies, load, arguments.warmup_s, arguments.duration, arguments.drain_s
    )


def _kv_cache_tokens(arguments: argparse.Namespace, profile: LatencyProfile) -> int:
    if arguments.kv_cache_tokens is not None:
        return int(arguments.kv_cache_tokens)
    if "kv_cache_tokens" not in profile.provenance:
        raise SimulateError("--kv-cache-tokens: required, the profile does not say")
    return int(profile.provenance["kv_cache_tokens"])


def _load_config(arguments: argparse.Namespace, num_kv_blocks: int) -> LoadConfig:
    if (arguments.cv is not None) != (arguments.arrivals == "gamma"):
        raise SimulateError("--cv: goes with --arrivals gamma, and only with it")
    return LoadConfig(
        source=_source(arguments),
        arrivals=arguments.arrivals,
        cv=arguments.cv or 1.0,
        length_scale=arguments.length_scale,
        prompt_scale=arguments.prompt_scale,
        max_seq_len=arguments.max_seq_len,
        num_kv_blocks=num_kv_blocks,
        tokens_per_block=_TOKENS_PER_BLOCK,
    )


def _source(arguments: argparse.Namespace) -> Path | Mix:
    changes = {k: v for k in _MIX_OPTIONS if (v := getattr(arguments, k)) is not None}
    if arguments.mix is not None:
        return replace(MIXES[arguments.mix], **changes)
    if changes:
        option = next(iter(changes)).replace("_", "-")
        raise SimulateError(f"--{option}: goes with --mix, not with a trace")
    path: Path = arguments.workload or DEFAULT_TRACE
    return path


def _schedulers(
    arguments: argparse.Namespace, max_batch_size: int, profile: LatencyProfile
) -> dict[str, SchedulerConfig]:
    """Scheduler of each policy, by its name on the command line."""
    common = {
        "max_num_requests": arguments.max_num_requests or max_batch_size,
        "max_batch_size": max_batch_size,
        "max_prefill_tokens": arguments.max_prefill_tokens,
        "margin": arguments.margin,
        "rho": arguments.rho,
        "kappa": arguments.kappa,
    }
    predictor = StepLatencyPredictor(profile, max_batch_size)
    schedulers = {}
    for name in arguments.policy:
        policy, *settings = name.split("@")
        own = dict(setting.partition("=")[::2] for setting in settings)
        if "policy" in own:
            raise ConfigError(f"--policy {name}: the policy stands before the first @")
        scheduler = _scheduler(name, {**common, **own, "policy": policy})
        make_policy(policy, scheduler, predictor)  # refuses an unknown one
        schedulers[name] = scheduler
    return schedulers


def _scheduler(name: str, settings: dict[str, Any]) -> SchedulerConfig:
    try:
        return SchedulerConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])).replace("_", "-")
        at = f"--{field}" if field else "--max-num-requests"
        raise ConfigError(f"{at} (policy {name}): {first['msg']}") from None


# ------------------------------------------------------------------------- argument types


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def _range(text: str) -> Range:
    low, _, high = text.partition(":")
    bounds = positive_int(low), positive_int(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"must ascend (got {text})")
    return bounds


def _window(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    window = at_least_0(start), positive(end)
    if window[0] >= window[1]:
        raise argparse.ArgumentTypeError(f"must ascend (got {text})")
    return window


def workload_name(arguments: argparse.Namespace) -> str:
    """How results name the load."""
    if arguments.mix is None:
        return (arguments.workload or DEFAULT_TRACE).name
    changes = [
        f"{k}={':'.join(map(str, v)) if isinstance(v, Sequence) else v}"
        for k in _MIX_OPTIONS
        if (v := getattr(arguments, k)) is not None
    ]
    return " ".join([arguments.mix, *changes])
