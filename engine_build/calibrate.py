"""Measures the step latencies of an engine, through the `Engine` interface alone.

Decode steps over a grid of widths and context lengths, steps with prefill of several sizes, then a
check of the fitted predictor on random batches of mixed lengths that were not fitted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engine_build.step_meter import StepMeter, make_meter, params
from taper_trtllm import __version__
from taper_trtllm.config import ConfigError, ServingConfig, load_config
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.base import Engine, IterationAudit, PrefillChunk
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

_PREFILL_WIDTH = 8  # sequences that decode beside a measured prefill
_PREFILL_BESIDE_CONTEXT = 128
_MAX_CHUNKS = 4
_MAX_CHECK_WIDTH = 64
# However short the time is:
_LEAST_REPETITIONS = 2
_LEAST_CHECKS = 12
_CHECK_SAMPLES = 3
_DECODE_SHARE, _PREFILL_SHARE, _CHECK_SHARE = 0.6, 0.2, 0.2  # of the time


@dataclass(frozen=True)
class Grid:
    """Which steps are measured.

    Attributes:
        widths: Decode widths; those that the engine or its KV pool cannot hold are left out.
        contexts: Context tokens of every sequence, ascending.
        prefill_tokens: Chunk sizes.
        prefill_contexts: Computed tokens before a chunk.
        repetitions: Measurements of each point; the median counts.
        num_checks: Random batches of the final check.
    """

    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill_tokens: tuple[int, ...] = (4, 32, 128)
    prefill_contexts: tuple[int, ...] = (0, 512)
    repetitions: int = 7
    num_checks: int = 24


QUICK = Grid((1, 2, 4, 8, 16, 24, 32, 48, 64, 96), (32, 128, 384, 768), repetitions=5)
FULL = Grid(
    (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512),
    tuple(int(c) for c in np.unique(np.geomspace(32, 8192, 25).round())),
    repetitions=9,
    num_checks=100,
)


@dataclass(frozen=True)
class FitReport:
    """How well the fitted predictor does on batches it was not fitted on.

    Attributes:
        mape: Mean absolute error of T, as a fraction of T.
        externality_error: Mean absolute error of T(S) - T(S0) over the mean of |T(S) - T(S0)|.
        num_checks: Batches.
    """

    mape: float
    externality_error: float
    num_checks: int


@dataclass
class Calibrator:
    """Measures one engine.

    Attributes:
        engine: Measured; left without sequences.
        grid: Which steps.
        advance: Called after every measured repetition, for progress.
        budget_s: About how long the whole may take: there are fewer repetitions and checks, and
            contexts are left out, as the time asks for it; None for the whole grid.
    """

    engine: Engine
    grid: Grid
    advance: Callable[[], None] = lambda: None
    budget_s: float | None = None
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _meter: StepMeter = field(init=False)

    def __post_init__(self) -> None:
        self._meter = make_meter(self.engine, self._ids)

    def measure(self, provenance: dict[str, str]) -> tuple[LatencyProfile, FitReport]:
        """Runs the whole grid.

        Raises:
            ConfigError: The engine is too small for it, or does not tell its step times.
            EngineError: A step failed.
        """
        self._check_size()
        decode = tuple(self._measure_decode())
        if len({point.width for point in decode}) < 2:
            raise ConfigError("the time is too short to calibrate: fewer than two widths measured")
        profile = LatencyProfile(
            fingerprint=dict(self.engine.fingerprint),
            provenance=provenance,
            width_buckets=self.engine.capabilities.width_buckets,
            decode=decode,
            prefill=tuple(self._measure_prefill()),
        )
        if self._shares_prefixes:
            weight = self._measure_sharing()
            profile = profile.model_copy(update={"shared_context_weight": weight})
        return profile, self._check(profile)

    @property
    def num_repetitions(self) -> int:
        """Repetitions of `measure`, for a progress bar."""
        num_points = len(self._levels()) + 2 * len(self._prefill_cases())
        num_points += self._shares_prefixes
        return self.grid.repetitions * num_points + self.grid.num_checks

    @property
    def _shares_prefixes(self) -> bool:
        return self.engine.capabilities.prefix_sharing_attention

    def _check_size(self) -> None:
        capabilities = self.engine.capabilities
        longest = max(self.grid.prefill_contexts) + max(self.grid.prefill_tokens)
        num_steps = (self.grid.repetitions + 1) * len(self._prefill_cases())
        num_beside = _PREFILL_BESIDE_CONTEXT + self._meter.num_tokens_of(num_steps)
        num_tokens = 2 * longest + _PREFILL_WIDTH * num_beside
        num_tails = _PREFILL_WIDTH + _MAX_CHUNKS + 2
        for name, has, needed in (
            ("max_seq_len", capabilities.max_seq_len, longest + 2),
            ("max_batch_size", capabilities.max_batch_size, _PREFILL_WIDTH + _MAX_CHUNKS),
            (
                "num_kv_blocks",
                capabilities.num_kv_blocks,
                num_tokens // capabilities.tokens_per_block + num_tails,
            ),
        ):
            if has < needed:
                raise ConfigError(f"engine.{name}: {has} is too small to calibrate, needs {needed}")
        if len({width for _, widths in self._levels() for width in widths}) < 2:
            raise ConfigError(
                f"engine.num_kv_blocks: {capabilities.num_kv_blocks} is too small to calibrate: "
                "fewer than two widths fit at two contexts"
            )

    # ---- decode

    def _levels(self) -> list[tuple[int, list[int]]]:
        """Contexts with the widths that fit at each; a width counts if it fits at two contexts."""
        capabilities = self.engine.capabilities
        fitting = {}
        for context in self.grid.contexts:
            most = min(capabilities.max_batch_size, self._most_sequences(context))
            if context + self._num_tokens_per_level() < capabilities.max_seq_len:
                fitting[context] = [w for w in self.grid.widths if w <= most]
        count = Counter(width for widths in fitting.values() for width in widths)
        levels = [(c, [w for w in widths if count[w] >= 2]) for c, widths in fitting.items()]
        return [(context, widths) for context, widths in levels if widths]

    def _most_sequences(self, context: int) -> int:
        return self.engine.capabilities.num_kv_blocks // self._blocks_of(context)

    def _blocks_of(self, context: int) -> int:
        """KV blocks of a sequence that begins with so many tokens, until its level is measured."""
        tokens = context + self._num_tokens_per_level()
        return -(-tokens // self.engine.capabilities.tokens_per_block) + 1  # where a fork begins

    def _num_tokens_per_level(self) -> int:
        return self._meter.num_tokens_of(self._num_decodes_per_level())

    def _num_decodes_per_level(self) -> int:
        return len(self.grid.widths) * (self.grid.repetitions + 1) + 1

    def _measure_decode(self) -> list[DecodePoint]:
        """Points of widths that were measured at two contexts at least.

        Sequences grow from one context to the next, so that nothing is computed twice; what is
        measured are forks of them.
        """
        levels = self._levels()
        pace = self._pace(_DECODE_SHARE, len(levels))
        points: list[DecodePoint] = []
        roots: list[int] = []
        for index, (context, widths) in enumerate(levels):
            if pace.is_behind(index):
                continue
            self._release(roots[widths[-1] :])
            roots = [self._grow(root, context - 1) for root in roots[: widths[-1]]]
            roots += self._add([context - 1] * (widths[-1] - len(roots)))
            self._meter.compute(roots, draw=True)
            forks = [self._fork(root) for root in roots]
            points += self._measure_level(forks, widths, partial(pace.has_time, index))
            self._release(forks)
        self._release(roots)
        count = Counter(point.width for point in points)
        return [point for point in points if count[point.width] >= 2]

    def _measure_level(
        self, sequences: Sequence[int], widths: Sequence[int], has_time: Callable[[], bool]
    ) -> Iterator[DecodePoint]:
        samples: dict[int, list[tuple[float, float]]] = {w: [] for w in widths}
        for repetition in range(self.grid.repetitions + 1):
            if repetition > _LEAST_REPETITIONS and not has_time():
                break
            for width in self._rng.permutation(widths):
                # A random subset, so that sequences stay about equally long.
                chosen = self._rng.permutation(sequences)[:width]
                step = self._decode(chosen)
                if repetition:  # the first one warms up
                    mean_context = step.num_context_tokens / width
                    samples[int(width)].append((step.step_ms, mean_context))
            if repetition:
                self.advance()
        for width in widths:
            step_ms, mean_context = np.median(np.array(samples[width]), axis=0)
            yield DecodePoint(
                width=width, context_tokens=round(mean_context), step_ms=float(step_ms)
            )

    def _decode(self, sequences: Sequence[int]) -> IterationAudit:
        return self._meter.decode([int(s) for s in sequences])

    def _measure_sharing(self) -> float:
        """`LatencyProfile.shared_context_weight`, from branches on one prefix.

        Measured in turn with as many unrelated sequences, as long and shorter, which say what a
        token costs that is read for one alone.

        Raises:
            ConfigError: The KV pool does not hold two of each.
        """
        context, widths = self._levels()[-1]
        shortest = min(self.grid.contexts)
        num_kv_blocks = self.engine.capabilities.num_kv_blocks
        blocks_each = sum(self._blocks_of(c) for c in (context, shortest, 0)) + 1  # a tail's copy
        width = min(widths[-1], (num_kv_blocks - self._blocks_of(context)) // blocks_each)
        if width < 2:
            raise ConfigError(
                f"engine.num_kv_blocks: {num_kv_blocks} is too small to calibrate "
                "prefix_sharing_attention"
            )
        base, *long = self._make_sequences([context] * (width + 1))
        short = self._make_sequences([shortest] * width)
        num_shared = self.engine.num_computed_tokens(base)
        branches = list(itertools.islice(self._ids, width))
        for branch in branches:
            self.engine.fork_sequence(base, branch, num_shared, (), params(base))
        samples = []
        for repetition in range(self.grid.repetitions + 1):
            steps = [self._decode(sequences) for sequences in (short, long, branches)]
            if repetition:  # the first one warms up
                samples.append([(step.step_ms, step.num_context_tokens) for step in steps])
                self.advance()
        self._release([base, *long, *short, *branches])
        times_ms, totals = np.median(np.array(samples), axis=0).T
        token_ms = (times_ms[1] - times_ms[0]) / (totals[1] - totals[0])
        if token_ms <= 0:
            return 0.0
        num_read = totals[0] + (times_ms[2] - times_ms[0]) / token_ms
        num_again = (width - 1) * num_shared
        return float(np.clip((num_read - (totals[2] - num_again)) / num_again, 0.0, 1.0))

    # ---- prefill

    def _measure_prefill(self) -> Iterator[PrefillPoint]:
        width = _PREFILL_WIDTH
        decoding = self._make_sequences([_PREFILL_BESIDE_CONTEXT] * width)
        cases = list(itertools.product((self._meter.least_width, width), self._prefill_cases()))
        pace = self._pace(_PREFILL_SHARE, len(cases))
        for index, (beside, (context, num_tokens, num_chunks)) in enumerate(cases):
            base = self._make_sequences([context] if context else [], draw=False)
            steps = []
            for repetition in range(self.grid.repetitions + 1):
                if repetition > _LEAST_REPETITIONS and not pace.has_time(index):
                    break
                chunks = self._make_chunks(base, context, num_tokens, num_chunks)
                step = self._meter.prefill(decoding[:beside], chunks)
                self._release([chunk.sequence_id for chunk in chunks])
                if repetition:
                    steps.append(step)
                    self.advance()
            self._release(base)
            load = steps[-1].prefill
            yield PrefillPoint(
                width=beside,
                context_tokens=round(steps[-1].num_context_tokens / max(1, beside)),
                num_chunks=load.num_chunks,
                num_tokens=load.num_tokens,
                token_context=load.token_context,
                step_ms=float(np.median([step.step_ms for step in steps])),
            )
        self._release(decoding)

    def _prefill_cases(self) -> list[tuple[int, int, int]]:
        """(context, tokens of a chunk, chunks); several chunks only of small ones."""
        sizes = self.grid.prefill_tokens
        return [
            (context, num_tokens, num_chunks)
            for context in self.grid.prefill_contexts
            for num_tokens in sizes
            for num_chunks in (1, _MAX_CHUNKS)
            if num_chunks == 1 or num_tokens < max(sizes)
        ]

    def _make_chunks(
        self, base: Sequence[int], context: int, num_tokens: int, num_chunks: int
    ) -> list[PrefillChunk]:
        """Chunks of fresh tokens, on a context shared from `base` if there is one.

        Tokens that were computed before would be found again by engines that reuse any prefix.
        """
        chunks = []
        for _ in range(num_chunks):
            child, ids = next(self._ids), self._random_ids(num_tokens + 1)
            if base:
                self.engine.fork_sequence(base[0], child, context, ids, params(base[0]))
            else:
                self.engine.add_sequence(child, child, ids, params(child))
            chunks.append(PrefillChunk(child, num_tokens, sample=False))
        return chunks

    # ---- check

    def _check(self, profile: LatencyProfile) -> FitReport:
        """Random batches of mixed lengths: a narrow one, and a wider one that contains it."""
        predictor = StepLatencyPredictor(profile, self.engine.capabilities.max_batch_size)
        longest, most = self._widest_check(profile)
        logs = self._rng.uniform(math.log(min(self.grid.contexts)), math.log(longest), size=most)
        lengths = [round(c) for c in np.exp(logs)]
        sequences: list[int] = []
        num_decodes_left = 0  # until the sequences outgrow what the grid had memory for
        errors, gaps, externalities = [], [], []
        pace = self._pace(_CHECK_SHARE, 1)
        for index in range(self.grid.num_checks):
            if index >= _LEAST_CHECKS and not pace.has_time(0):
                break
            if num_decodes_left < 2 * _CHECK_SAMPLES:
                self._release(sequences)
                sequences = self._make_sequences(lengths)
                num_decodes_left = self._num_decodes_per_level()
            num_decodes_left -= 2 * _CHECK_SAMPLES
            order = self._rng.permutation(sequences)
            narrow, wide = np.sort(self._rng.integers(1, most + 1, size=2))
            measured, predicted = [], []
            for width in (narrow, wide):
                samples = []
                for _ in range(_CHECK_SAMPLES):
                    step = self._decode(order[:width])
                    samples.append(step.step_ms)
                measured.append(float(np.median(samples)))
                predicted.append(predictor.predict_step_ms(int(width), step.num_context_tokens))
            errors.append(abs(predicted[1] - measured[1]) / measured[1])
            externality = measured[1] - measured[0]
            externalities.append(abs(externality))
            gaps.append(abs(predicted[1] - predicted[0] - externality))
            self.advance()
        self._release(sequences)
        externality_error = float(np.sum(gaps) / max(np.sum(externalities), 1e-9))
        return FitReport(float(np.mean(errors)), externality_error, len(errors))

    def _widest_check(self, profile: LatencyProfile) -> tuple[int, int]:
        """Longest context of the check, and how many sequences; within what was measured."""
        most = min(_MAX_CHECK_WIDTH, max(point.width for point in profile.decode))
        longest = max(point.context_tokens for point in profile.decode if point.width >= most)
        return min(longest, max(self.grid.contexts)), most

    def _pace(self, share: float, num_parts: int) -> _Pace:
        return _Pace(math.inf if self.budget_s is None else share * self.budget_s, num_parts)

    # ---- sequences

    def _random_ids(self, num: int) -> list[int]:
        ids: list[int] = self._rng.integers(0, self.engine.capabilities.vocab_size, num).tolist()
        return ids

    def _make_sequences(self, contexts: Sequence[int], *, draw: bool = True) -> list[int]:
        """Sequences of random tokens; all are computed, or all but a last one that was drawn."""
        sequences = self._add([context - draw for context in contexts])
        self._meter.compute(sequences, draw=draw)
        return sequences

    def _add(self, lengths: Sequence[int]) -> list[int]:
        """Sequences of random tokens, all pending."""
        sequences = []
        for length in lengths:
            sequence = next(self._ids)
            ids = self._random_ids(max(length, 1))
            self.engine.add_sequence(sequence, sequence, ids, params(sequence))
            sequences.append(sequence)
        return sequences

    def _grow(self, sequence: int, num_tokens: int) -> int:
        """A sequence of so many tokens that takes the place of a shorter one."""
        grown = self._fork(sequence, num_tokens - self.engine.num_tokens(sequence))
        self._release([sequence])
        return grown

    def _fork(self, sequence: int, num_suffix: int = 0) -> int:
        """A sequence with the same tokens, and so many random ones behind them."""
        fork, num_computed = next(self._ids), self.engine.num_computed_tokens(sequence)
        ids = self._random_ids(num_suffix)
        self.engine.fork_sequence(sequence, fork, num_computed, ids, params(sequence))
        return fork

    def _release(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self.engine.release_sequence(sequence)


class _Pace:
    """Parts of a measurement that share its time equally, from now on.

    Args:
        budget_s: Of all parts.
        num_parts: How many there are.
    """

    def __init__(self, budget_s: float, num_parts: int) -> None:
        self._part_s = budget_s / max(1, num_parts)
        self._num_parts = num_parts
        self._start_s = time.monotonic()

    def has_time(self, index: int) -> bool:
        """The part may go on."""
        return self._elapsed_s < (index + 1) * self._part_s

    def is_behind(self, index: int) -> bool:
        """The part is to be left out; never one of the first two."""
        return index > 1 and self._elapsed_s > index * self._part_s

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s


def add_parser(commands: Any) -> None:
    """Adds the `calibrate` sub-command."""
    parser = commands.add_parser(
        "calibrate",
        help="measure an engine's step latencies and write the profile that serving needs",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="serving configuration; its engine is measured")
    parser.add_argument("--output", type=Path, default=Path("profile.json"))
    parser.add_argument(
        "--full", action="store_true", help="the 20x25 grid instead of the quick one (minutes)"
    )
    parser.add_argument("--repetitions", type=int, help="measurements of each point")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config) if arguments.config else ServingConfig()
    grid = FULL if arguments.full else QUICK
    if arguments.repetitions is not None:
        grid = Grid(**{**vars(grid), "repetitions": max(1, arguments.repetitions)})
    console = Console(stderr=True)
    engine = create_engine(config.engine)
    try:
        columns = (
            TextColumn("calibrating {task.fields[engine]}"),
            BarColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            calibrator = Calibrator(engine, grid)
            task = progress.add_task(
                "", total=calibrator.num_repetitions, engine=engine.capabilities.name
            )
            calibrator.advance = lambda: progress.advance(task)
            profile, report = calibrator.measure(
                {
                    "tool": f"taper_trtllm {__version__} engine_build calibrate",
                    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
                        timespec="seconds"
                    ),
                    "repetitions": str(grid.repetitions),
                }
            )
    finally:
        engine.shutdown()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    profile.save(arguments.output)
    predictor = StepLatencyPredictor(profile)
    for width in (1, 8, 32):
        step_ms = predictor.predict_step_ms(width, width * 256)
        console.print(f"T({width} sequences x 256 tokens) = {step_ms:.2f} ms")
    console.print(
        f"on {report.num_checks} random batches: MAPE {report.mape:.1%}, "
        f"externality error {report.externality_error:.1%}"
    )
    console.print(f"wrote {arguments.output}")
    return 0
