"""Exact steps on an engine, and how long they took.

An engine that does what a plan says tells it with the result. One that iterates by itself gives
account of its iterations afterwards: there, a plan is kept up until the account of the wanted
iteration comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from taper_trtllm.batch import PrefillLoad
from taper_trtllm.config import ConfigError
from taper_trtllm.engines.base import (
    Engine,
    EngineError,
    IterationAudit,
    PrefillChunk,
    SequenceId,
    SequenceParams,
    StepPlan,
    StepResult,
)
from taper_trtllm.request import SamplingParams

_PREFILL_TOKENS = 1024  # of a step that is not measured
_LEASE_TOKENS = 8  # starts, a few iterations at full width, and the last, which is not accounted
_MAX_STEPS = 64


class StepMeter:
    """Measures an engine that does every step as planned.

    Args:
        engine: Measured.

    Attributes:
        least_width: Narrowest decode batch beside which prefill can be measured.
    """

    least_width = 0

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def num_tokens_of(self, num_decodes: int) -> int:
        """Tokens that a sequence needs memory for, beyond its own, to decode so often."""
        return num_decodes

    def compute(self, sequence_ids: Sequence[SequenceId], *, draw: bool) -> None:
        """Computes all pending tokens of sequences, and may draw the next of each."""
        chunks: list[PrefillChunk] = []
        room, most_chunks = _PREFILL_TOKENS, self.engine.capabilities.max_batch_size
        for sequence_id in sequence_ids:
            num_pending = self._num_pending(sequence_id)
            while num_pending:
                num = min(room, num_pending)
                num_pending, room = num_pending - num, room - num
                chunks.append(PrefillChunk(sequence_id, num, draw and not num_pending))
                if not room or len(chunks) == most_chunks:
                    self._run(StepPlan(prefill=tuple(chunks)))
                    chunks, room = [], _PREFILL_TOKENS
        if chunks:
            self._run(StepPlan(prefill=tuple(chunks)))

    def decode(self, sequence_ids: Sequence[SequenceId]) -> IterationAudit:
        """One decode step of exactly these sequences, or what several of them say together."""
        return self._measure(StepPlan(tuple(sequence_ids), (1,) * len(sequence_ids)))

    def prefill(
        self, decoding: Sequence[SequenceId], chunks: Sequence[PrefillChunk]
    ) -> IterationAudit:
        """One step that computes the chunks beside decoding sequences."""
        return self._measure(StepPlan(tuple(decoding), (1,) * len(decoding), tuple(chunks)))

    def _measure(self, plan: StepPlan) -> IterationAudit:
        """Raises ConfigError if the engine does not tell how long its steps take."""
        context = sum(self.engine.num_tokens(i) for i in plan.decode)
        load = self._load(plan.prefill)
        result = self._run(plan)
        if result.step_ms <= 0:
            raise ConfigError(
                f"engine: {self.engine.capabilities.name} does not tell how long single steps take "
                "in this mode; if it has others, calibrate it in its default mode"
            )
        return IterationAudit(result.iteration, result.step_ms, len(plan.decode), context, load)

    def _run(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        for reason in result.failed.values():
            raise EngineError(f"a sequence failed: {reason}")
        return result

    def _num_pending(self, sequence_id: SequenceId) -> int:
        return self.engine.num_tokens(sequence_id) - self.engine.num_computed_tokens(sequence_id)

    def _load(self, chunks: Sequence[PrefillChunk]) -> PrefillLoad:
        load = PrefillLoad()
        for chunk in chunks:
            load = load.with_chunk(
                chunk.num_tokens, self.engine.num_computed_tokens(chunk.sequence_id)
            )
        return load


class LeaseMeter(StepMeter):
    """Measures an engine that gives places and iterates by itself.

    Sequences decode as forks of themselves, so that they stay as long as they are. A step without
    decode cannot be measured: when it is the first after an idle time, or the last before one, the
    engine does not tell how long it took.

    Args:
        engine: Measured.
        ids: Numbers for forks that no sequence has.
    """

    least_width = 1

    def __init__(self, engine: Engine, ids: Iterator[SequenceId]) -> None:
        super().__init__(engine)
        self._ids = ids

    def num_tokens_of(self, num_decodes: int) -> int:
        """See `StepMeter`."""
        return _LEASE_TOKENS + self.engine.capabilities.tokens_per_block

    def compute(self, sequence_ids: Sequence[SequenceId], *, draw: bool) -> None:
        """See `StepMeter`."""
        for sequence_id in sequence_ids:
            if num_pending := self._num_pending(sequence_id):
                chunk = PrefillChunk(sequence_id, num_pending, draw)
                self._run_to_end(self._run(StepPlan(prefill=(chunk,))))

    def decode(self, sequence_ids: Sequence[SequenceId]) -> IterationAudit:
        """See `StepMeter`."""
        forks = self._fork(sequence_ids)
        is_wanted = self._is(len(forks), PrefillLoad())
        result, audits = self._run_until(self._plan(forks), is_wanted)
        audits += self._run_to_end(result)
        self._release(forks)
        matching = [audit for audit in audits if is_wanted(audit)]
        step_ms = float(np.median([audit.step_ms for audit in matching]))
        context = round(float(np.median([audit.num_context_tokens for audit in matching])))
        return IterationAudit(
            matching[-1].iteration, step_ms, len(forks), context, matching[-1].prefill
        )

    def prefill(
        self, decoding: Sequence[SequenceId], chunks: Sequence[PrefillChunk]
    ) -> IterationAudit:
        """See `StepMeter`."""
        forks, load = self._fork(decoding), self._load(chunks)
        self._run_until(self._plan(forks), self._is(len(forks), PrefillLoad()))
        is_wanted = self._is(len(forks), load)
        result, audits = self._run_until(self._plan(forks, chunks), is_wanted)
        self._run_to_end(result)
        self._release(forks)
        return next(filter(is_wanted, audits))

    @staticmethod
    def _plan(forks: Sequence[SequenceId], chunks: Sequence[PrefillChunk] = ()) -> StepPlan:
        leases = (_LEASE_TOKENS,) * len(forks)
        return StepPlan(tuple(forks), leases, tuple(chunks), num_protected=len(forks))

    @staticmethod
    def _is(width: int, load: PrefillLoad) -> Callable[[IterationAudit], bool]:
        """Whether an account is of a batch that wide, with as much prefill."""
        return lambda audit: (
            (audit.width, audit.prefill.num_chunks, audit.prefill.num_tokens)
            == (
                width,
                load.num_chunks,
                load.num_tokens,
            )
        )

    def _run_until(
        self, plan: StepPlan, is_wanted: Callable[[IterationAudit], bool]
    ) -> tuple[StepResult, list[IterationAudit]]:
        """Keeps a plan up until the account of a wanted iteration comes; it, and all the others."""
        audits: list[IterationAudit] = []
        for _ in range(_MAX_STEPS):
            result = self._run(plan)
            audits.extend(result.audits or ())
            if any(map(is_wanted, audits)):
                return result, audits
        raise ConfigError(
            f"engine: never had {len(plan.decode)} sequences and {len(plan.prefill)} prefill chunks"
            " in one iteration; its max_num_tokens may be too small to calibrate"
        )

    def _run_to_end(self, result: StepResult) -> list[IterationAudit]:
        """Lets all places end; the accounts that come meanwhile."""
        audits: list[IterationAudit] = []
        while result.holding:
            result = self._run(self._plan(sorted(result.holding)))  # keeps them, and gives no more
            audits.extend(result.audits or ())
        return audits

    def _fork(self, sequence_ids: Sequence[SequenceId]) -> list[SequenceId]:
        forks = []
        for sequence_id in sequence_ids:
            fork = next(self._ids)
            num_shared = self.engine.num_computed_tokens(sequence_id)
            self.engine.fork_sequence(sequence_id, fork, num_shared, (), params(sequence_id))
            forks.append(fork)
        return forks

    def _release(self, sequence_ids: Sequence[SequenceId]) -> None:
        for sequence_id in sequence_ids:
            self.engine.release_sequence(sequence_id)


def make_meter(engine: Engine, ids: Iterator[SequenceId]) -> StepMeter:
    """The meter for an engine, by what it declares."""
    return (
        LeaseMeter(engine, ids) if engine.capabilities.granularity == "lease" else StepMeter(engine)
    )


def params(root: SequenceId) -> SequenceParams:
    """How measured sequences sample: to no end, and sharing KV with those of the same root only."""
    return SequenceParams(SamplingParams(ignore_eos=True), seed=0, cache_salt_id=root)
