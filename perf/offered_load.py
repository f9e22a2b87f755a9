"""The load of a simulation: one seed's requests, the same at every rate and for every policy.

Arrivals are gaps of mean 1 that a rate divides, so that rates are paired as well as policies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from perf.mixes import Mix
from perf.program import critical_tokens
from perf.trace import TraceError, TraceRow, read_trace, scale_count, to_wire_stages
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import (
    ForkJoinRequest,
    RequestError,
    RequestLimits,
    SamplingParams,
    build_request,
    check_request,
)

Arrivals = Literal["poisson", "gamma", "trace"]

_VOCAB_SIZE = 1  # token ids do not matter: all are 0
_DRAW = 1024  # gaps drawn at a time
_MAX_DROPPED_IN_A_ROW = 10_000


class LoadError(ValueError):
    """A load that cannot be offered, naming the option at fault."""


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What arrives.

    Attributes:
        source: A trace (CSV), or a mix.
        arrivals: ``poisson``, ``gamma``, or ``trace`` for the file's own, in its order.
        cv: Coefficient of variation of ``gamma`` gaps.
        length_scale: Factor on decoded token counts.
        prompt_scale: Factor on prompt lengths.
        max_seq_len: A request is dropped if its prompt, what it decodes on all branches, and the
            branch headers together exceed it; the next one takes its place.
        num_kv_blocks: Likewise if its serial footprint does not fit.
        tokens_per_block: KV block size.
    """

    source: Path | Mix
    arrivals: Arrivals = "poisson"
    cv: float = 1.0
    length_scale: float = 1.0
    prompt_scale: float = 1.0
    max_seq_len: int = 40960
    num_kv_blocks: int = 1 << 20
    tokens_per_block: int = 32

    def __post_init__(self) -> None:
        if self.arrivals == "trace":
            if isinstance(self.source, Mix):
                raise LoadError("--arrivals: 'trace' needs a --workload with arrivals")
            self.recorded_rate()  # fails now rather than in a worker

    @property
    def limits(self) -> RequestLimits:
        """What the simulated server accepts."""
        return RequestLimits(
            max_prompt_tokens=self.max_seq_len, max_total_tokens=self.max_seq_len,
            max_queue_length=1 << 30,
        )  # fmt: skip

    def recorded_rate(self) -> float:
        """Mean rate of the trace's own arrivals, in requests per second."""
        assert isinstance(self.source, Path)
        return 1 / float(np.mean(_recorded_gaps(self.source)))


@dataclass(frozen=True, slots=True)
class Offer:
    """One request of the load.

    Attributes:
        request: What is submitted.
        family: Kind of request, as the workload names it.
        critical_tokens: Decoded tokens on its longest path.
    """

    request: ForkJoinRequest
    family: str
    critical_tokens: int

    @property
    def is_branching(self) -> bool:
        """Its program has a parallel stage."""
        return any(stage.type == "parallel" for stage in self.request.program)


class OfferedLoad:
    """The endless requests of one seed, built when they are first asked for.

    Args:
        config: What arrives.
        seed: Of rows and gaps.
    """

    def __init__(self, config: LoadConfig, seed: int) -> None:
        self._config = config
        self._offers: list[Offer] = []
        self._unit_times: list[float] = []
        self._dropped_before: list[int] = []
        self._num_dropped = 0
        rng_rows, rng_gaps = (
            np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2)
        )
        self._rows = _rows(config, rng_rows, rng_gaps)

    def arrivals(self, rate: float) -> Iterator[tuple[float, Offer]]:
        """Arrival times in seconds and requests, without end, at `rate` per second.

        Raises:
            LoadError: Nothing in the workload fits the limits.
        """
        for i in itertools.count():
            while i >= len(self._offers):
                self._draw()
            yield self._unit_times[i] / rate, self._offers[i]

    def num_dropped(self, num_offers: int) -> int:
        """Requests passed over among the first `num_offers`."""
        return self._dropped_before[num_offers - 1] if num_offers else 0

    def _draw(self) -> None:
        for _ in range(_MAX_DROPPED_IN_A_ROW):
            gap, row = next(self._rows)
            try:
                offer = self._offer(row)
            except RequestError:
                self._num_dropped += 1
                continue
            before = self._unit_times[-1] if self._unit_times else 0.0
            self._offers.append(offer)
            self._unit_times.append(before + gap)
            self._dropped_before.append(self._num_dropped)
            return
        raise LoadError("--max-seq-len or --kv-cache-tokens: no request of the workload fits")

    def _offer(self, row: TraceRow) -> Offer:
        config = self._config
        request = build_request(
            request_id=str(len(self._offers)),
            input_ids=(0,) * scale_count(row.prompt_tokens, config.prompt_scale),
            stages=to_wire_stages(
                row.stages, config.length_scale, itertools.repeat(0), _VOCAB_SIZE
            ),
            sampling=SamplingParams(ignore_eos=True),
            cache_salt_id=len(self._offers),  # all text is one token: nothing else keeps them apart
        )
        check_request(request, config.limits, _VOCAB_SIZE)
        footprint = serial_footprint_blocks(
            len(request.input_ids), request.program, config.tokens_per_block
        )
        if footprint > config.num_kv_blocks:
            raise RequestError("stages", "needs more KV cache than there is")
        return Offer(request, row.family, critical_tokens(request.program))


def _rows(
    config: LoadConfig, rng_rows: np.random.Generator, rng_gaps: np.random.Generator
) -> Iterator[tuple[float, TraceRow]]:
    """Gap to the previous arrival, mean 1, and request; without end."""
    source = config.source
    if config.arrivals == "trace":
        assert isinstance(source, Path)
        rows, gaps = _trace(source), _recorded_gaps(source)
        unit_gaps = gaps / gaps.mean()
        start = int(rng_rows.integers(len(rows)))
        for i in itertools.count(start):
            yield float(unit_gaps[i % len(rows)]), rows[i % len(rows)]
    drawn = source.rows(rng_rows) if isinstance(source, Mix) else _shuffled(source, rng_rows)
    yield from zip(_gamma_gaps(config, rng_gaps), drawn, strict=True)


def _shuffled(path: Path, rng: np.random.Generator) -> Iterator[TraceRow]:
    """Rows at random without replacement, again from all of them once they are used up."""
    rows = _trace(path)
    while True:
        yield from (rows[i] for i in rng.permutation(len(rows)))


def _gamma_gaps(config: LoadConfig, rng: np.random.Generator) -> Iterator[float]:
    shape = 1.0 if config.arrivals == "poisson" else config.cv**-2
    while True:
        yield from rng.gamma(shape, 1 / shape, size=_DRAW).tolist()


@lru_cache(maxsize=1)
def _trace(path: Path) -> list[TraceRow]:
    return read_trace(path)


@lru_cache(maxsize=1)
def _recorded_gaps(path: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """[rows] seconds before each arrival; before the first, the mean of the others."""
    rows = _trace(path)
    times_s = np.array([np.nan if r.arrival_s is None else r.arrival_s for r in rows])
    if np.isnan(times_s).any() or len(rows) < 2 or not times_s[-1] > times_s[0]:
        raise TraceError(f"{path}: --arrivals 'trace' needs a column arrival_s that ascends")
    gaps = np.diff(times_s)
    if (gaps < 0).any():
        raise TraceError(f"{path}: --arrivals 'trace' needs rows in order of arrival_s")
    return np.concatenate([[gaps.mean()], gaps])
