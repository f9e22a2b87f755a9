from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.capacity import (
    antitonic_fit,
    capacity,
    crossing,
    grid_rate,
    grid_step,
    ratio,
)
from perf.rate_search import FULL, QUICK, wanted_seeds

values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def pool_adjacent_violators(sequence):
    """The textbook algorithm."""
    blocks = []
    for value in sequence:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, n = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * n) / (blocks[-1][1] + n),
                          blocks[-1][1] + n]  # fmt: skip
    return [mean for mean, n in blocks for _ in range(n)]


@given(values)
def test_the_fit_is_that_of_pooling_adjacent_violators(sequence):
    assert antitonic_fit(np.array(sequence)) == pytest.approx(pool_adjacent_violators(sequence))


def test_rows_are_fitted_apart():
    table = np.array([[1.0, 0.5, 0.7], [0.2, 0.4, 0.0]])
    assert antitonic_fit(table) == pytest.approx(np.array([[1, 0.6, 0.6], [0.3, 0.3, 0]]))


def test_the_crossing_is_linear_between_rates_and_goes_on_beyond_them():
    rates = np.array([1.0, 2.0, 4.0])
    fits = np.array([[1.0, 0.96, 0.94], [1.0, 0.99, 0.95], [1.0, 1.0, 0.9]])
    assert crossing(rates, fits, 0.95, 0.1) == pytest.approx([3.0, 4.0, 3.0])
    beyond = np.array([[0.9, 0.5, 0.1], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert crossing(rates, beyond, 0.95, 0.1) == pytest.approx([0.5, 4.5, 0.1])


def test_the_error_is_that_of_repeated_measurements():
    """Two equal policies, 6 seeds, rates found by the quick search: the error is not cut short."""
    rng, ratios, errors = np.random.default_rng(5), [], []
    for _ in range(150):
        pair = []
        for _ in range(2):
            shift = rng.normal(0, 0.1, 6)
            measured: dict[int, list[float]] = {}
            while wanted := wanted_seeds(
                {s: [(a, 0.0) for a in v] for s, v in measured.items()}, QUICK, 0, 6, 0.95
            ):
                for step, n in wanted.items():
                    met = 0.97 - 1.2 * np.log(grid_rate(step)) + shift[:n]
                    measured[step] = list(np.clip(met, 0, 1))
            pair.append(capacity(measured, 6, 0.95))
        if found := ratio(*pair):
            ratios.append(found[0])
            errors.append(found[1])
    assert 0.85 < np.mean(errors) / np.std(ratios) < 1.25  # cut off at the ends: 0.75


def curve(rate, true_capacity):
    """Attainment that falls through 95 % at the capacity."""
    return float(np.clip(0.95 - 0.8 * (rate / true_capacity - 1), 0.0, 1.0))


def search(true_capacity, start, num_seeds, noise, generator):
    """Runs the search against a made-up system; returns what it measured."""
    offsets = noise * generator.standard_normal(num_seeds)
    measured = {}
    while wanted := wanted_seeds(measured, FULL, start, num_seeds, 0.95):
        for step, n in wanted.items():
            assert len(measured.get(step, ())) < n <= num_seeds
            rate = grid_rate(step)
            met = [curve(rate, true_capacity * (1 + offset)) for offset in offsets[:n]]
            measured[step] = [(a, a * rate) for a in met]
    return {step: [a for a, _ in figures] for step, figures in measured.items()}


@pytest.mark.parametrize("num_seeds", [1, 2, 6])
@pytest.mark.parametrize("start", [0.03, 0.9, 1.0, 60.0])
def test_the_search_finds_the_capacity_wherever_it_starts(start, num_seeds):
    measured = search(1.37, grid_step(start), num_seeds, 0.0, np.random.default_rng(0))
    found = capacity(measured, num_seeds, 0.95)
    more = {step: [*values, 0.0] for step, values in measured.items() if len(values) == num_seeds}
    assert capacity(more, num_seeds, 0.95).rate == found.rate  # seeds beyond those asked for
    assert found.rate == pytest.approx(1.37, rel=1e-3)
    assert found.std == (None if num_seeds == 1 else pytest.approx(0.0, abs=1e-9))
    assert sum(len(v) == num_seeds for v in measured.values()) >= 7


def test_the_spread_is_that_of_the_seeds_and_ratios_are_paired():
    """Seeds differ by 5 %, policies by 10 %: the ratio must not inherit the seeds' spread."""
    seeds = np.random.default_rng(1).integers(1 << 30)
    found = []
    for true_capacity in (1.0, 1.1):
        measured = search(true_capacity, 0, 12, 0.05, np.random.default_rng(seeds))
        found.append(capacity(measured, 12, 0.95))
    low, high = found
    assert 0.005 < low.std < 0.04
    times, std = ratio(high, low)
    assert times == pytest.approx(1.1, rel=5e-3)
    assert std < low.std / 3


def test_a_target_that_is_never_reached_ends_the_search():
    measured = {}
    while wanted := wanted_seeds(measured, FULL, 0, 6, 0.95):
        measured |= {step: [(0.5, 1.0)] * n for step, n in wanted.items()}
    assert 2 <= len(measured) <= FULL.max_rates
    nothing = capacity({step: [0.5] * len(v) for step, v in measured.items()}, 6, 0.95)
    assert nothing.rate is None and nothing.std is None
    assert ratio(nothing, nothing) is None


def test_neighbouring_grid_rates_are_three_per_cent_apart():
    assert grid_rate(1) / grid_rate(0) == pytest.approx(1.029, abs=1e-3)
    assert all(grid_step(grid_rate(step)) == step for step in range(-160, 161))
