"""Synthetic mixes of requests: how many branch, how widely, and how long everything is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from perf.trace import TraceRow, TraceStages

Range = tuple[int, int]

_CLIP = (1 / 3, 8 / 3)  # branch lengths, relative to their median


@dataclass(frozen=True, slots=True)
class Mix:
    """A population of plain and fork-join requests.

    A fork-join request decodes `serial_len`, forks, joins, for some rounds, and ends with another
    serial stage. Ranges are log-uniform, both ends included.

    Attributes:
        fork_fraction: Share of requests that fork.
        input_len: Prompt tokens.
        output_len: Median tokens of a plain request; lognormal.
        output_sigma: Standard deviation of their logarithm.
        rounds: Parallel stages of a request; uniform.
        serial_len: Tokens of a serial stage; None for programs without any.
        num_branches: Fan-out.
        branch_len: Median tokens of a branch; lognormal, from a third to 8/3 of the median.
        branch_sigma: Standard deviation of their logarithm.
        nested_fraction: Share of fork-join requests in which one branch forks again.
    """

    fork_fraction: float = 0.5
    input_len: Range = (500, 4000)
    output_len: int = 300
    output_sigma: float = 0.7
    rounds: Range = (1, 3)
    serial_len: Range | None = (100, 400)
    num_branches: Range = (2, 16)
    branch_len: int = 150
    branch_sigma: float = 0.6
    nested_fraction: float = 0.0

    def rows(self, rng: np.random.Generator) -> Iterator[TraceRow]:
        """Endless requests."""
        while True:
            forks = rng.random() < self.fork_fraction
            stages = self._program(rng) if forks else [["s", self._plain_len(rng)]]
            prompt = _log_uniform(self.input_len, rng)
            yield TraceRow(None, prompt, stages, "fork-join" if forks else "plain")

    def _plain_len(self, rng: np.random.Generator) -> int:
        return max(1, round(self.output_len * math.exp(self.output_sigma * rng.standard_normal())))

    def _program(self, rng: np.random.Generator) -> TraceStages:
        stages: TraceStages = []
        rounds = int(rng.integers(self.rounds[0], self.rounds[1] + 1))
        nests_in = int(rng.integers(rounds)) if rng.random() < self.nested_fraction else None
        for i in range(rounds):
            branches = self._branches(rng)
            if i == nests_in:
                inner = ["p", 0, self._branches(rng), 0]
                branches[0] = [["s", branches[0]], inner, ["s", self._branch_len(rng)]]
            stages += [*self._serial(rng), ["p", 0, branches, 0]]
        return [*stages, *self._serial(rng)]

    def _serial(self, rng: np.random.Generator) -> TraceStages:
        return [] if self.serial_len is None else [["s", _log_uniform(self.serial_len, rng)]]

    def _branches(self, rng: np.random.Generator) -> TraceStages:
        return [self._branch_len(rng) for _ in range(_log_uniform(self.num_branches, rng))]

    def _branch_len(self, rng: np.random.Generator) -> int:
        low, high = _CLIP
        factor = math.exp(self.branch_sigma * rng.standard_normal())
        return max(1, round(self.branch_len * min(max(factor, low), high)))


def _log_uniform(bounds: Range, rng: np.random.Generator) -> int:
    low, high = bounds
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


_STUDY = Mix()

MIXES: dict[str, Mix] = {
    # Half plain, half wide: where policies differ most.
    "study": _STUDY,
    # Parallel reasoning: narrow, long, two in three nested.
    "reasoning": replace(
        _STUDY, fork_fraction=1.0, input_len=(100, 1000), serial_len=(200, 1000),
        num_branches=(2, 3), branch_len=400, nested_fraction=2 / 3,
    ),
    # Skeleton-style answers: one fork into short points.
    "list": replace(
        _STUDY, fork_fraction=1.0, rounds=(1, 1), serial_len=(30, 120), num_branches=(4, 12),
        branch_len=30, branch_sigma=0.3,
    ),
    # Tree search: rounds of short calls and nothing between them.
    "tree-search": replace(
        _STUDY, fork_fraction=1.0, input_len=(200, 600), rounds=(4, 8), serial_len=None,
        num_branches=(5, 225), branch_len=20, branch_sigma=0.3,
    ),
    "plain": replace(_STUDY, fork_fraction=0.0),
}  # fmt: skip
