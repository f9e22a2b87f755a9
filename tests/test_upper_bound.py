from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_simulate import study

from perf.simulated_cell import Cell, run_cell
from perf.upper_bound import (
    Demand,
    demand_of,
    held_token_steps,
    largest_rate,
    longest_step,
    reserved_token_steps,
    step_kinds,
    upper_bound,
)
from taper_trtllm.request import ForkJoinRequest

PLENTY = 1e12


def demand(output=100.0, prefill=0.0, critical=100.0, held=1.0, pace=1.0) -> Demand:
    return Demand(output, output, 500.0, prefill, 300.0, critical, held, pace)


def kinds(*rows):
    """Width, prefill tokens, milliseconds."""
    widths, tokens, step_ms = np.array(rows, dtype=float).T
    return widths, tokens, step_ms / 1e3


def brute_force(rows, asked: Demand, tau_s, num_kv_tokens, num_slots, resolution=60) -> float:
    """The best mixture of kinds, all of them tried, straight from the constraints."""
    widths, tokens, times = rows
    best = 0.0
    for cuts in itertools.combinations_with_replacement(range(resolution + 1), len(widths) - 1):
        share = np.diff([0, *cuts, resolution]) / resolution
        step_s = share @ times
        if step_s > asked.pace * tau_s + 1e-12:
            continue
        rates = [
            share @ widths / (asked.decode_tokens * step_s),
            num_kv_tokens / (asked.kv_token_steps * step_s),
            num_slots / (asked.critical_steps * step_s),
        ]
        if asked.prefill_tokens:
            rates.append(share @ tokens / (asked.prefill_tokens * step_s))
        best = max(best, min(rates))
    return best


def test_hand_computed():
    """10 sequences in 20 ms are 500 tokens/s: five requests of 100 tokens."""
    one_kind = kinds((10, 0, 20))
    assert largest_rate(one_kind, demand(), 0.03, PLENTY, PLENTY) == pytest.approx(5.0)
    assert largest_rate(one_kind, demand(), 0.01, PLENTY, PLENTY) == pytest.approx(0.0, abs=1e-6)
    # A request takes 100 steps, 2 s: eight slots serve four per second.
    assert largest_rate(one_kind, demand(), 0.03, PLENTY, 8) == pytest.approx(4.0)
    # And holds 1,000 tokens meanwhile: so do 6,000 tokens three.
    asked = demand(held=1000.0 * 100)
    assert largest_rate(one_kind, asked, 0.03, 6000, PLENTY) == pytest.approx(3.0)


def test_a_wide_step_above_tau_is_used_for_part_of_the_time():
    steps = kinds((10, 0, 20), (40, 0, 40))
    # Half the steps each: 25 tokens in 30 ms.
    found = largest_rate(steps, demand(), 0.03, PLENTY, PLENTY)
    assert found == pytest.approx(25 / 0.03 / 100)


@pytest.mark.parametrize("tau_s", [0.022, 0.03, 0.05])
@pytest.mark.parametrize("prefill", [0.0, 60.0, 400.0])
@pytest.mark.parametrize("held", [1.0, 2e5])
@pytest.mark.parametrize("num_slots", [PLENTY, 9])
@pytest.mark.parametrize("pace", [1.0, 1.7])
def test_it_is_the_best_of_all_mixtures(tau_s, prefill, held, num_slots, pace):
    """Never below it, and above only by the resolution of the enumeration."""
    steps = kinds((8, 0, 12), (8, 64, 19), (16, 0, 24), (32, 0, 31), (32, 64, 47))
    steps = steps if prefill else tuple(column[[0, 2, 3]] for column in steps)
    asked = demand(prefill=prefill, held=held, pace=pace)
    tried = brute_force(steps, asked, tau_s, 5000, num_slots, 24 if prefill else 200)
    found = largest_rate(steps, asked, tau_s, 5000, num_slots)
    assert tried * (1 - 1e-6) <= found <= tried * 1.06


def program(stages) -> ForkJoinRequest:
    return ForkJoinRequest.model_validate(
        {"request_id": "r", "input_ids": (0,) * 10, "stages": stages}
    )


def test_memory_held_in_parallel():
    """Counted step by step; the reservation by its formula."""
    plain = program([{"type": "serial", "max_tokens": 3}])
    assert held_token_steps(plain) == pytest.approx(10 + 11 + 12)
    branches = [{"max_tokens": 2, "header_ids": [1]}, {"max_tokens": 4, "header_ids": [1]}]
    forks = program(
        [{"type": "parallel", "branches": branches}, {"type": "serial", "max_tokens": 1}]
    )
    prefix, first, second = 4 * 10, 1 + 2, 1 + 2 + 3 + 4
    joined = 10 + (1 + 2) + (1 + 4)
    assert held_token_steps(forks) == pytest.approx(prefix + first + second + joined)
    # ceil(tokens) + max(1, 3 x depth) blocks, over 5 steps.
    assert reserved_token_steps(forks, 1, 1.0) == pytest.approx(5 * (joined + 1 + 3))
    assert reserved_token_steps(forks, 1, 0.5) == pytest.approx(2.5 * (joined + 1 + 3))


def test_pace_that_a_program_affords():
    """One with a serial stage takes a step per token there; one without has its branches."""
    serial = {"type": "serial", "max_tokens": 5}
    branches = {"type": "parallel", "branches": [{"max_tokens": 5}] * 4}
    paces = {
        1.0: [[serial], [serial, branches], [branches, serial]],
        19 / 4: [[branches]],
        20 / 5: [[{**serial, "max_tokens": 1}, branches]],  # one token has no interval
        np.inf: [[{**serial, "max_tokens": 1}]],
    }
    for pace, programs in paces.items():
        for stages in programs:
            assert longest_step(program(stages).program) == pytest.approx(pace)


def test_a_few_without_branches_may_miss():
    """All but 5 % draw four tokens per step; the others are let go, but not more of them."""
    forks = program([{"type": "parallel", "branches": [{"max_tokens": 5}] * 4}])
    plain = program([{"type": "serial", "max_tokens": 5}])
    deployment = study().deployment
    assert demand_of([plain] * 4 + [forks] * 96, deployment).pace == pytest.approx(19 / 4)
    assert demand_of([plain] * 6 + [forks] * 94, deployment).pace == 1.0


def test_prefill_counts_where_it_costs_time():
    branches = [{"max_tokens": 2, "header_ids": [1]}, {"max_tokens": 4, "header_ids": [1]}]
    forks = program([{"type": "parallel", "branches": branches}])
    deployment = study().deployment

    def asked(**settings):
        engine = replace(deployment.engine, **settings)
        return demand_of([forks], replace(deployment, engine=engine)).prefill_tokens

    headers_and_join = 2 + (1 + 4)
    assert asked() == 10 + headers_and_join
    assert asked(disaggregated_prefill=True) == headers_and_join
    assert asked(free_joins=True) == 10
    assert asked(disaggregated_prefill=True, free_joins=True) == 0


def test_tokens_that_prefill_draws_need_no_decode_step():
    """The first behind a prompt, a header and a join; not behind a serial stage or a bare fork."""
    serial, branch = {"type": "serial", "max_tokens": 5}, {"max_tokens": 4, "header_ids": [1]}
    deployment = study().deployment

    def drawn(*stages) -> float:
        asked = demand_of([program(stages)], deployment)
        return asked.output_tokens - asked.decode_tokens

    forks = {"type": "parallel", "branches": [branch, branch]}
    assert drawn(serial) == 1
    assert drawn(serial, serial) == 1
    assert drawn(serial, forks) == 1 + 2
    assert drawn(serial, forks, serial) == 1 + 2 + 1
    assert drawn(forks) == 2
    headless = {"type": "parallel", "branches": [{"max_tokens": 4}]}
    assert drawn(serial, headless, serial) == 1


def test_a_shared_prefix_that_is_read_once_is_counted_once():
    branch = {"max_tokens": 1, "header_ids": [1]}
    forks = program([{"type": "parallel", "branches": [branch] * 4}])
    deployment = study().deployment
    shares = replace(deployment.engine, prefix_sharing_attention=True)
    assert demand_of([forks], deployment).context_tokens == 10 + 1
    once = demand_of([forks], replace(deployment, engine=shares))
    assert once.context_tokens == pytest.approx(10 / 4 + 1)


def test_kinds_take_what_the_engine_takes():
    """10 ms, half a millisecond per further sequence, and 10 ms with any prefill.

    Chunks fill up to the rows that were measured, 16 and 1024, or the budget.
    """
    asked = demand(prefill=50.0)
    widths, tokens, times = step_kinds(study(extra_ms=0.5).deployment, asked)
    assert set(zip(widths, tokens, strict=True)) == {
        *((1, 0), (1, 15), (1, 1023), (1, 1024)),
        *((2, 0), (2, 14), (2, 1022), (2, 1024)),
        *((64, 0), (64, 960), (64, 1024)),
    }
    expected_ms = 10 + 0.5 * (widths - 1) + 10 * (tokens > 0)
    assert times == pytest.approx(expected_ms / 1e3, rel=1e-3)


@pytest.mark.parametrize("policy", ["taper", "irp-eager"])
def test_no_policy_serves_more(policy):
    small = study(extra_ms=0.5, tpot_ms=20.0)
    bound = upper_bound(small.deployment, small.load)
    attained = run_cell(small, Cell(policy, 1.25 * bound, 0))["slo_attainment"]
    assert attained < 0.9
