"""Deployments and loads drawn at random: cells that nobody chose, by number.

What decides between policies is drawn widely: the engine, how tight tau is against its step times,
memory, slots, chunks, who branches, how wide and how long. The durations follow from the load. What
would decide nothing is not drawn: programs without serial stages, whose TPOT nearly any step meets
(`upper_bound`, "pace"), and TTFT objectives that the longest prompt would miss in a quiet hour.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from perf.evaluation_cells import CELLS, FREE_EXTRAS, NamedCell, study_of
from perf.mixes import Mix
from perf.shipped_profiles import PROFILES, named_profile
from perf.upper_bound import bound_of_demand, demand_of_load
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.engines.simulated import StepTimes

_PREFIX = "random-"
_NUM_REQUESTS = 150  # of a scored window at 0.7 of the upper bound
_LONGEST_PROMPT_SHARE = 0.5  # of the TTFT objective
_WIDTH, _CONTEXT_TOKENS = 32, 2000  # of the decode batch to which objectives are fitted


def cell_named(name: str) -> NamedCell:
    """A cell of `CELLS` or ``random-N``, or one of them with ``-free-extras`` behind its name.

    Raises:
        KeyError: There is no such cell.
    """
    base = name.removesuffix(FREE_EXTRAS)
    number = base.removeprefix(_PREFIX)
    is_random = number != base and number.isdecimal()
    cell = _random_cell(int(number)) if is_random else CELLS[base]
    if base == name:
        return cell
    return replace(cell, title=f"{cell.title}; extras cost nothing", free_extras=True)


@cache
def _random_cell(number: int) -> NamedCell:
    rng = np.random.default_rng(number)
    profile_name = str(rng.choice(sorted(PROFILES)))
    profile = named_profile(profile_name)
    is_disaggregated = bool(rng.random() < 0.4)
    tightness = float(np.exp(rng.uniform(np.log(1.3), np.log(4.0))))
    memory_share = float(np.exp(rng.uniform(np.log(0.2), 0.0)))
    chunk_tokens = int(rng.choice([256, 512, 1024, 2048]))
    mix = _random_mix(rng)
    times = StepTimes(profile, _WIDTH)
    prompt_ms = 0.0 if is_disaggregated else _prompt_ms(times, chunk_tokens, mix.input_len[1])
    ttft_ms = [ms for ms in (1000, 2000, 5000, 10_000) if prompt_ms <= _LONGEST_PROMPT_SHARE * ms]
    cell = NamedCell(
        title="",
        profile=profile_name,
        source=mix,
        tpot_ms=round(tightness * _step_ms(times), 1),
        ttft_ms=float(rng.choice(ttft_ms[:3])),
        kv_cache_tokens=int(memory_share * int(profile.provenance["kv_cache_tokens"])),
        max_num_requests=int(rng.choice([64, 128, 512])),
        max_prefill_tokens=chunk_tokens,
        disaggregated_prefill=is_disaggregated,
        arrivals="gamma" if rng.random() < 0.25 else "poisson",
        cv=2.0,
    )
    return _with_durations(replace(cell, title=_title(cell)))


def _random_mix(rng: np.random.Generator) -> Mix:
    def one_of(*values: object) -> object:
        return values[int(rng.integers(len(values)))]

    return Mix(
        fork_fraction=one_of(0.2, 0.5, 0.8, 1.0),
        input_len=one_of((100, 1000), (500, 4000), (2000, 8000)),
        rounds=one_of((1, 1), (1, 3)),
        serial_len=one_of((10, 40), (30, 120), (100, 400)),
        num_branches=one_of((2, 4), (2, 16), (8, 16), (4, 32)),
        branch_len=one_of(30, 150, 300),
        nested_fraction=one_of(0.0, 0.0, 0.5),
    )  # type: ignore[arg-type]


def _step_ms(times: StepTimes) -> float:
    return times.decode_ms(_WIDTH, _CONTEXT_TOKENS)


def _prompt_ms(times: StepTimes, chunk_tokens: int, num_tokens: int) -> float:
    """Of a prompt's steps in chunks beside the decode batch."""
    starts = range(0, num_tokens, chunk_tokens)
    chunks = [PrefillLoad().with_chunk(min(chunk_tokens, num_tokens - at), at) for at in starts]
    prefill_ms = sum(times.prefill_ms(_WIDTH, chunk) for chunk in chunks)
    return prefill_ms + len(chunks) * _step_ms(times)


def _title(cell: NamedCell) -> str:
    mix = cell.source
    assert isinstance(mix, Mix)
    prefill = "elsewhere" if cell.disaggregated_prefill else f"by {cell.max_prefill_tokens}"
    nested = f", {mix.nested_fraction:.0%} nested" if mix.nested_fraction else ""
    bursts = f", CV {cell.cv:g}" if cell.arrivals == "gamma" else ""
    return (
        f"{cell.profile}, prefill {prefill}, {(cell.kv_cache_tokens or 0) // 1000}k KV tokens, "
        f"{cell.max_num_requests} slots; {mix.fork_fraction:.0%} fork, {_span(mix.rounds)} rounds, "
        f"{_span(mix.num_branches)} branches of {mix.branch_len}, serial {_span(mix.serial_len)}, "
        f"prompts {_span(mix.input_len)}{nested}{bursts}"
    )


def _span(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return f"{low}" if low == high else f"{low} to {high}"


def _with_durations(cell: NamedCell) -> NamedCell:
    """Long enough for memory to fill and for a number of requests to be scored."""
    study = study_of(cell, "taper", "shipped", 0.0, 1.0)
    demand = demand_of_load(study.deployment, study.load)
    alone_s = demand.output_tokens * cell.tpot_ms / 1e3  # one branch after another
    window_s = _NUM_REQUESTS / (0.7 * bound_of_demand(study.deployment, demand))
    return replace(
        cell,
        warmup_s=round(float(np.clip(alone_s, 30, 120))),
        quick_duration_s=round(float(np.clip(window_s, 60, 200))),
        drain_s=round(float(np.clip(4 * alone_s, 100, 500))),
    )
