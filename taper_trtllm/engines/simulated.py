"""The virtual-time engine: no model, step times from a latency profile, KV accounted in full.

The executor above it is the one that serves; only the clock and the tokens are made up. Its step
time interpolates the profile's measured points, and can be disturbed in ways that the profile does
not show (`Disturbance`), so that a predictor fitted on the profile has something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from taper_trtllm.batch import FloatArray, PrefillLoad
from taper_trtllm.engines.base import (
    IterationAudit,
    PrefillKind,
    SequenceId,
    SequenceParams,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.kv_cache import BlockCopy
from taper_trtllm.engines.paged_engine import (
    ChunkWork,
    PagedEngine,
    per_step_capabilities,
)
from taper_trtllm.engines.paged_sequences import EngineSequence
from taper_trtllm.prefill_cost import PrefillCost
from taper_trtllm.profile import LatencyProfile

_VOCAB_SIZE = 151_936  # Qwen3's
_FAR = 1_000_000.0  # context beyond which nothing is asked
_TOKEN = 0  # every token that is drawn; programs end by length

_Lineage = tuple[tuple[SequenceId, int], ...]
"""Whose tokens a sequence consists of, and from which position on; the last part is its own."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How the device differs from its profile.

    Attributes:
        host_overhead_ms: Added to every step.
        step_scale: Factor on every step.
        context_scale: Factor on the part of a step that reads contexts.
        imbalance: A batch of unequal contexts reads as if each were this share of the way from the
            mean to the longest.
        width_shift: Tiles begin so many sequences earlier.
        noise: Standard deviation of the logarithm of a step.
    """

    host_overhead_ms: float = 0.0
    step_scale: float = 1.0
    context_scale: float = 1.0
    imbalance: float = 0.0
    width_shift: int = 0
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class SimulatedConfig:
    """Memory, limits and what prefill costs.

    Attributes:
        num_kv_blocks: Size of the KV pool.
        tokens_per_block: KV block size.
        max_batch_size: Most sequences in a step.
        max_seq_len: Most tokens in a sequence.
        disaggregated_prefill: Prompts are computed elsewhere and cost no time here; headers and
            joins always do.
        free_joins: Headers and joins cost no time (the assumption of earlier studies).
        free_extras: A step takes, and is seen to take, the time of its protected baseline and its
            prefill alone: what branches would come to if they cost nothing.
        prefix_sharing_attention: A step reads what sequences of a request share once (cascade
            attention).
        disturbance: Of the step time.
        seed: Of the noise.
    """

    num_kv_blocks: int
    tokens_per_block: int = 32
    max_batch_size: int = 512
    max_seq_len: int = 40960
    disaggregated_prefill: bool = False
    free_joins: bool = False
    free_extras: bool = False
    prefix_sharing_attention: bool = False
    disturbance: Disturbance = Disturbance()
    seed: int = 0

    @property
    def computed_elsewhere(self) -> frozenset[PrefillKind]:
        """See `EngineCapabilities.disaggregated_prefill`."""
        costs_nothing: dict[PrefillKind, bool] = {
            "prompt": self.disaggregated_prefill,
            "join": self.free_joins,
        }
        return frozenset(kind for kind, is_so in costs_nothing.items() if is_so)


class StepTimes:
    """Step times as measured: linear between the points of a profile.

    Args:
        profile: The points.
        max_width: Widest step that will be asked for.
    """

    def __init__(self, profile: LatencyProfile, max_width: int) -> None:
        knots = np.array(sorted({p.width for p in profile.decode}))
        self._lines = [
            _line([(p.context_tokens, p.step_ms) for p in profile.decode if p.width == width])
            for width in knots
        ]
        widths = profile.padded_widths(max_width)
        # Padding reads no context: the sequences that are there share theirs with it.
        self._share_of_padded = np.arange(max_width + 1) / np.maximum(widths, 1.0)
        self._low = np.clip(np.searchsorted(knots, widths, side="right") - 1, 0, len(knots) - 2)
        self._share = (widths - knots[self._low]) / (knots[self._low + 1] - knots[self._low])
        self._share = np.maximum(self._share, 0.0)
        self._prefill = PrefillCost(
            profile, lambda width, total: self.decode_ms(width, total / max(1, width)), max_width
        )

    def decode_ms(self, width: int, mean_context_tokens: float) -> float:
        """T of a step without prefill; 0 at width 0."""
        if width == 0:
            return 0.0
        low, share = int(self._low[width]), float(self._share[width])
        mean_context_tokens *= float(self._share_of_padded[width])
        step_ms = float(np.interp(mean_context_tokens, *self._lines[low]))
        if share:
            above_ms = float(np.interp(mean_context_tokens, *self._lines[low + 1]))
            step_ms += share * (above_ms - step_ms)
        return step_ms

    def prefill_ms(self, width: int, load: PrefillLoad) -> float:
        """What prefill adds beside so many decoding sequences."""
        return float(self._prefill.steps_ms(width, 1, load)[0])


class Device:
    """Takes as long as a profile says, but for its disturbance.

    Args:
        profile: Step times.
        disturbance: How it differs.
        max_width: Widest step.
        seed: Of the noise.
    """

    def __init__(
        self, profile: LatencyProfile, disturbance: Disturbance, max_width: int, seed: int
    ) -> None:
        self._times = StepTimes(profile, max_width + disturbance.width_shift)
        self._disturbance = disturbance
        self._rng = np.random.default_rng(seed)

    def step_ms(self, contexts: Sequence[float], load: PrefillLoad) -> float:
        """T of one step.

        Args:
            contexts: Context tokens that every decoding sequence reads.
            load: Prefill beside them.
        """
        disturbance, step_ms = self._disturbance, 0.0
        if contexts:
            mean = sum(contexts) / len(contexts)
            mean += disturbance.imbalance * (max(contexts) - mean)
            width = len(contexts) + disturbance.width_shift
            step_ms = self._times.decode_ms(width, mean * disturbance.context_scale)
        if load.num_tokens:
            step_ms += self._times.prefill_ms(len(contexts), load)
        step_ms = step_ms * disturbance.step_scale + disturbance.host_overhead_ms
        if disturbance.noise:
            step_ms *= float(np.exp(disturbance.noise * self._rng.standard_normal()))
        return step_ms


class SimulatedEngine(PagedEngine):
    """Implements `engines.base.Engine` in virtual time.

    Args:
        profile: What a step takes.
        config: Memory and limits.
    """

    def __init__(self, profile: LatencyProfile, config: SimulatedConfig) -> None:
        super().__init__(
            per_step_capabilities(
                name="simulated",
                width_buckets=profile.width_buckets,
                disaggregated_prefill=config.computed_elsewhere,
                prefix_sharing_attention=config.prefix_sharing_attention,
                bitwise_deterministic=True,
                virtual_time=True,
                max_batch_size=config.max_batch_size,
                max_seq_len=config.max_seq_len,
                tokens_per_block=config.tokens_per_block,
                num_kv_blocks=config.num_kv_blocks,
                vocab_size=_VOCAB_SIZE,
            )
        )
        self._config = config
        self._fingerprint = dict(profile.fingerprint)
        self._shared_weight = profile.shared_context_weight
        self._device = Device(profile, config.disturbance, config.max_batch_size, config.seed)
        self._clock_s = 0.0
        self._lineage: dict[SequenceId, _Lineage] = {}

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The profile's: there is nothing else that times depend on."""
        return self._fingerprint

    def now_s(self) -> float:
        """The virtual clock."""
        return self._clock_s

    def advance_to(self, time_s: float) -> None:
        """Lets time pass without work; never back."""
        self._clock_s = max(self._clock_s, time_s)

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        super().add_sequence(sequence_id, family, token_ids, params)
        self._lineage[sequence_id] = ((sequence_id, 0),)

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        super().fork_sequence(parent_id, child_id, num_shared_tokens, suffix_ids, params)
        above = [part for part in self._lineage[parent_id] if part[1] < num_shared_tokens]
        self._lineage[child_id] = (*above, (child_id, num_shared_tokens))

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        """See `Engine`."""
        super().join_sequence(parent_id, child_id, suffix_ids)
        del self._lineage[child_id]

    def release_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        super().release_sequence(sequence_id)
        del self._lineage[sequence_id]

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine`."""
        if not self._config.free_extras:
            return super().step(plan)
        load = self._load(self._chunks(plan))
        contexts = [self.num_tokens(i) for i in plan.decode[: plan.num_protected]]
        result = super().step(plan)
        audit = IterationAudit(result.iteration, result.step_ms, len(contexts), sum(contexts), load)
        return replace(result, audits=(audit,))

    def _compute(
        self,
        plan: StepPlan,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> dict[SequenceId, int]:
        contexts: Sequence[float] = [sequence.table.num_tokens for sequence in decode]
        if self._config.prefix_sharing_attention:
            contexts = self._read_once(plan.decode, contexts)
        if self._config.free_extras:
            contexts = contexts[: plan.num_protected]
        self._clock_s += self._device.step_ms(contexts, self._load(chunks)) / 1e3
        drawn = dict.fromkeys(plan.decode, _TOKEN)
        drawn |= {chunk.sequence_id: _TOKEN for chunk in chunks if chunk.sample}
        return drawn

    def _read_once(self, decode: Sequence[SequenceId], contexts: Sequence[float]) -> list[float]:
        """Context tokens that each sequence reads; those that one before it read weigh less."""
        seen: dict[SequenceId, float] = {}  # how far each part of the trees of branches was read
        read = []
        for sequence_id, num_tokens in zip(decode, contexts, strict=True):
            total = 0.0
            parts = self._lineage[sequence_id]
            ends = [start for _, start in parts[1:]] + [num_tokens]
            for (owner, start), end in zip(parts, ends, strict=True):
                read_before = min(end, seen.get(owner, start))
                total += end - read_before + self._shared_weight * (read_before - start)
                seen[owner] = max(seen.get(owner, start), end)
            read.append(total)
        return read

    @staticmethod
    def _load(chunks: Sequence[ChunkWork]) -> PrefillLoad:
        """The chunks that cost time here."""
        counted = [item for item in chunks if not item.is_remote]
        pairs = sum(item.num_tokens * (item.start + item.num_tokens / 2) for item in counted)
        return PrefillLoad(len(counted), sum(item.num_tokens for item in counted), pairs)


def _line(points: list[tuple[int, float]]) -> tuple[FloatArray, FloatArray]:
    """Contexts and times, continued straight on both sides."""
    contexts, times = np.array(sorted(points), dtype=float).T
    slopes = np.diff(times) / np.diff(contexts)
    first = times[0] - slopes[0] * contexts[0]
    last = times[-1] + slopes[-1] * _FAR
    return (
        np.concatenate([[0.0], contexts, [contexts[-1] + _FAR]]),
        np.concatenate([[first], times, [last]]),
    )
