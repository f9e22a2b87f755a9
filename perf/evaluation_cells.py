"""The cells of the evaluation: deployments and loads by name, and the levers beside admission.

A to G are the anchors of an earlier simulation study and P its closest regime to the TAPER paper's
claims; no engine was run for any of them. Where the study does not say, the TTFT objective is 2 s
and there are as many request slots as sequences.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perf.mixes import MIXES, Mix
from perf.offered_load import Arrivals, LoadConfig
from perf.shipped_profiles import named_profile
from perf.simulated_cell import Study
from perf.simulation import Deployment
from perf.workload import DEFAULT_TRACE
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.simulated import Disturbance, SimulatedConfig
from taper_trtllm.request import SloTarget

_TOKENS_PER_BLOCK = 32
_MAX_BATCH_SIZE = 512
_NOISE = Disturbance(noise=0.02)

# Levers beside branch admission, that help any policy (`SchedulerConfig`). All sets but the first
# differ from it in what their name says.
LEVERS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "bare": {
        "late_requests": "fcfs",
        "request_admission": "slots",
        "kv_reserve_fraction": 1.0,
    },
    "slack-chunks": {"prefill_chunking": "slack"},
    "fcfs": {"late_requests": "fcfs"},
    "slots": {"request_admission": "slots"},
    "tpot": {"request_admission": "tpot"},
    "reserve-all": {"kv_reserve_fraction": 1.0},
}


FREE_EXTRAS = "-free-extras"  # behind a cell's name: the same cell with `free_extras`


@dataclass(frozen=True, slots=True)
class NamedCell:
    """One deployment under one kind of load.

    Attributes:
        title: What it is.
        profile: A shipped latency profile.
        source: What arrives; see `LoadConfig`.
        tpot_ms: tau.
        ttft_ms: Y.
        stretch: See `SloTarget`.
        kv_cache_tokens: Size of the KV pool; None for the profile's.
        max_num_requests: Request slots.
        max_prefill_tokens: Chunk budget of a step.
        disaggregated_prefill: See `SimulatedConfig`.
        free_joins: See `SimulatedConfig`.
        free_extras: See `SimulatedConfig`.
        prefix_sharing_attention: See `SimulatedConfig`.
        arrivals: See `LoadConfig`.
        cv: See `LoadConfig`.
        disturbance: How the device differs from its profile.
        told_scale: Step times that the executor is told, relative to the profile's.
        warmup_s: Arrivals before the scored window: about the time that a branching request takes
            if its branches run one after another, so that memory is as full as it gets.
        quick_duration_s: Scored window of a quick run: about 150 requests.
        drain_s: Enough for nearly all requests with their branches one after another; later ones
            are misses.
    """

    title: str
    profile: str
    source: Path | Mix
    tpot_ms: float
    ttft_ms: float = 2000
    stretch: float | None = None
    kv_cache_tokens: int | None = None
    max_num_requests: int = _MAX_BATCH_SIZE
    max_prefill_tokens: int = 1024
    disaggregated_prefill: bool = False
    free_joins: bool = False
    free_extras: bool = False
    prefix_sharing_attention: bool = False
    arrivals: Arrivals = "poisson"
    cv: float = 1.0
    disturbance: Disturbance = _NOISE
    told_scale: float = 1.0
    warmup_s: float = 60
    quick_duration_s: float = 90
    drain_s: float = 150


_STUDY = MIXES["study"]

_A = NamedCell("H200 FP8, chunks of 1024", "h200_fp8_tp1", _STUDY, tpot_ms=30)
_E = replace(
    _A, title="H200 FP8, disaggregated prefill", disaggregated_prefill=True, quick_duration_s=80
)
_P = replace(
    _E, title="regime P: E with 400k KV tokens, fan-out 8 to 16", kv_cache_tokens=400_000,
    source=replace(_STUDY, num_branches=(8, 16)), warmup_s=100, quick_duration_s=80, drain_s=200,
)  # fmt: skip
_PUBLIC = replace(_A, title="public branch trace, Poisson arrivals", source=DEFAULT_TRACE,
                  warmup_s=60, quick_duration_s=60, drain_s=120)  # fmt: skip

CELLS: dict[str, NamedCell] = {  # the most important first
    "A": _A,
    "E": _E,
    "P": _P,
    "C": NamedCell(
        "H100 FP8, chunks of 256, 16 branches of 300 tokens, 64 slots", "h100_fp8_tp1",
        replace(_STUDY, num_branches=(16, 16), branch_len=300), tpot_ms=32, ttft_ms=5000,
        kv_cache_tokens=300_000, max_num_requests=64, max_prefill_tokens=256,
        warmup_s=120, quick_duration_s=180, drain_s=400,
    ),
    "public": _PUBLIC,
    "B": NamedCell(
        "H200 bf16, disaggregated prefill, 245k KV tokens", "h200_bf16_tp1", _STUDY, tpot_ms=40,
        kv_cache_tokens=245_000, disaggregated_prefill=True, quick_duration_s=120,
    ),
    "F": NamedCell(
        "H100 bf16 TP2, chunks of 512, fan-out 4 to 16", "h100_bf16_tp2",
        replace(_STUDY, num_branches=(4, 16)), tpot_ms=30, kv_cache_tokens=290_000,
        max_prefill_tokens=512, quick_duration_s=120,
    ),
    "G": replace(_E, title="E with end-to-end at most 1.5 x critical path x tau", stretch=1.5),
    "lists": replace(_A, title="list-like: wide and short", source=MIXES["list"]),
    "reasoning": replace(
        _A, title="reasoning-like: narrow, long, nested", source=MIXES["reasoning"], warmup_s=120,
        quick_duration_s=120, drain_s=250,
    ),
    "tree": replace(
        _A, title="tree-search-like: rounds of short calls", source=MIXES["tree-search"],
        warmup_s=120, quick_duration_s=180, drain_s=600,
    ),
    "plain": replace(_A, title="plain requests only", source=MIXES["plain"]),
    "public-bursty": replace(
        _PUBLIC, title="public trace, bursty (CV 4)", arrivals="gamma", cv=4.0
    ),
    "public-azure": replace(_PUBLIC, title="public trace, Azure arrivals", arrivals="trace"),
    "E-bursty": replace(_E, title="E, bursty (CV 4)", arrivals="gamma", cv=4.0),
    "A-free-joins": replace(_A, title="A, joins cost nothing", free_joins=True),
    "E-free-joins": replace(_E, title="E, joins cost nothing", free_joins=True),
    "P-free-joins": replace(_P, title="P, joins cost nothing", free_joins=True),
    "A-cascade": replace(_A, title="A, prefix-sharing attention", prefix_sharing_attention=True),
    "E-cascade": replace(_E, title="E, prefix-sharing attention", prefix_sharing_attention=True),
    "P-cascade": replace(_P, title="P, prefix-sharing attention", prefix_sharing_attention=True),
    "E-drift": replace(
        _E, title="E, steps 15 % and 2 ms longer than the profile says",
        disturbance=Disturbance(host_overhead_ms=2.0, step_scale=1.15, noise=0.02),
    ),
    "A-told-0.7": replace(_A, title="A, told that steps take 0.7 of their time", told_scale=0.7),
    "A-told-1.3": replace(_A, title="A, told that steps take 1.3 of their time", told_scale=1.3),
    "E-told-0.7": replace(_E, title="E, told that steps take 0.7 of their time", told_scale=0.7),
    "E-told-1.3": replace(_E, title="E, told that steps take 1.3 of their time", told_scale=1.3),
}  # fmt: skip


def study_of(
    cell: NamedCell, policy: str, levers: str, warmup_s: float, duration_s: float
) -> Study:
    """One policy under one set of levers in a cell; it is the study's only policy, by its name."""
    profile = named_profile(cell.profile)
    kv_cache_tokens = cell.kv_cache_tokens or int(profile.provenance["kv_cache_tokens"])
    engine = SimulatedConfig(
        num_kv_blocks=kv_cache_tokens // _TOKENS_PER_BLOCK,
        tokens_per_block=_TOKENS_PER_BLOCK,
        max_batch_size=_MAX_BATCH_SIZE,
        disaggregated_prefill=cell.disaggregated_prefill,
        free_joins=cell.free_joins,
        free_extras=cell.free_extras,
        prefix_sharing_attention=cell.prefix_sharing_attention,
        disturbance=cell.disturbance,
    )
    load = LoadConfig(
        source=cell.source, arrivals=cell.arrivals, cv=cell.cv, max_seq_len=engine.max_seq_len,
        num_kv_blocks=engine.num_kv_blocks, tokens_per_block=_TOKENS_PER_BLOCK,
    )  # fmt: skip
    scheduler = SchedulerConfig(
        policy=policy, max_num_requests=cell.max_num_requests, max_batch_size=_MAX_BATCH_SIZE,
        max_prefill_tokens=cell.max_prefill_tokens, **LEVERS[levers],
    )  # fmt: skip
    slo = SloTarget(ttft_ms=cell.ttft_ms, tpot_ms=cell.tpot_ms, stretch=cell.stretch)
    told = profile.scaled(cell.told_scale)
    deployment = Deployment(told, profile, engine, scheduler, slo, load.limits)
    return Study(deployment, {policy: scheduler}, load, warmup_s, duration_s, cell.drain_s)


def described(cell: NamedCell) -> dict[str, Any]:
    """A cell as JSON; a trace by its file name."""
    text = asdict(cell)
    if isinstance(cell.source, Path):
        text["source"] = cell.source.name
    return text
