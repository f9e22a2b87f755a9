"""Which leaves enter the next step: every policy, as pure functions of a batch.

All policies share one scheme. The protected baseline, one leaf per request, always runs. The other
leaves, the extras, are put in an order that does not depend on slack; the policy admits a prefix of
that order. TAPER admits, of the prefixes whose predicted step fits the step budget

    B = T0 + rho max(0, min slack - T0), at most kappa x the smallest tau,

the one with the most tokens per second, the widest of equals. It evaluates T on *every* prefix: T
is not monotone in width on padded or tiled engines, where stopping at the first prefix that does
not fit would stall, and a few sequences in the next tile can cost more than
they yield: slack that is kept is a lead for later, slack that is spent badly is lost.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from taper_trtllm.batch import (
    AdmissionDecision,
    BatchState,
    BoolArray,
    FloatArray,
    IntArray,
    RefusalReason,
)
from taper_trtllm.config import ConfigError, SchedulerConfig
from taper_trtllm.predictor import PredictorMode, StepLatencyPredictor

POLICIES = (
    "irp-off",
    "irp-eager",
    "fixed-cap:N",
    "step-ceiling:F",
    "taper",
    "taper:widest",
    "taper:no-slack",
    "taper:no-replan",
    "taper:constant-predictor",
    "taper:uncorrected",
)

_MAX_GENERATED = 1 << 20  # tokens of one branch; far beyond any context length
_AFTER_ALL = 1 << 62  # added to a sort key

_Refusals = list[tuple[IntArray, RefusalReason]]


class AdmissionPolicy(Protocol):
    """Decides who enters a step.

    Attributes:
        name: The specification it was made from.
        max_width: Leaves of one request that may be started at a time; None for all of them.
    """

    name: str
    max_width: int | None

    def baseline(self, batch: BatchState) -> IntArray:
        """The protected leaf of every request: [R] rows of leaves."""

    def admit(
        self, batch: BatchState, baseline: IntArray, extras_allowed: bool = True
    ) -> AdmissionDecision:
        """Decides one step; equal batches give equal decisions.

        Args:
            batch: The ready leaves.
            baseline: What `baseline` says of them.
            extras_allowed: False for a probe step, which runs the baseline alone.
        """


def make_policy(
    spec: str, scheduler: SchedulerConfig, predictor: StepLatencyPredictor
) -> AdmissionPolicy:
    """Builds a policy from its specification, one of `POLICIES`.

    Raises:
        ConfigError: The specification is not known, or its argument is out of range.
    """
    name, _, argument = spec.partition(":")
    if name == "irp-off" and not argument:
        return WidthPolicy(spec, 1, predictor)
    if name == "irp-eager" and not argument:
        return WidthPolicy(spec, None, predictor)
    if name == "fixed-cap" and argument.isdecimal() and int(argument) >= 1:
        return WidthPolicy(spec, int(argument), predictor)
    if name == "step-ceiling" and _is_positive(argument):
        return StepCeilingPolicy(spec, float(argument), predictor)
    if spec == name == "taper" or (name == "taper" and spec in POLICIES):
        return TaperPolicy(spec, scheduler, predictor)
    raise ConfigError(f"scheduler.policy: {spec!r} is not one of {', '.join(POLICIES)}")


def predictor_mode(spec: str) -> PredictorMode:
    """The predictor that a policy specification asks for."""
    if spec == "taper:constant-predictor":
        return "constant"
    return "uncorrected" if spec == "taper:uncorrected" else "corrected"


class WidthPolicy:
    """w = min(n, N), no slack test: irp-off (N = 1), fixed-cap:N and irp-eager (no N).

    Leaves run in program order, each to its end.
    """

    def __init__(self, name: str, max_width: int | None, predictor: StepLatencyPredictor) -> None:
        self.name = name
        self.max_width = max_width
        self._predictor = predictor

    def baseline(self, batch: BatchState) -> IntArray:
        """The first leaf of every request in program order."""
        return batch.first_leaf

    def admit(
        self, batch: BatchState, baseline: IntArray, extras_allowed: bool = True
    ) -> AdmissionDecision:
        """Admits every extra below the cap."""
        extras = _extras(batch, baseline)
        refused: _Refusals = []
        if self.max_width is not None:
            rank = extras - batch.first_leaf[batch.request_index[extras]]
            extras = _keep(extras, rank < self.max_width, RefusalReason.CAP, refused)
        extras = _fitting(batch, extras, extras_allowed, refused)
        times = _prefix_times(batch, self._predictor, baseline, extras)
        return _decision(baseline, extras, len(extras), times, np.inf, refused)


class StepCeilingPolicy:
    """The largest prefix with T <= F x the smallest tau; no slack accounting."""

    max_width: int | None = None

    def __init__(self, name: str, ceiling: float, predictor: StepLatencyPredictor) -> None:
        self.name = name
        self._ceiling = ceiling
        self._predictor = predictor

    def baseline(self, batch: BatchState) -> IntArray:
        """The least recently advanced leaf of every request."""
        return _least_recent_leaves(batch)

    def admit(
        self, batch: BatchState, baseline: IntArray, extras_allowed: bool = True
    ) -> AdmissionDecision:
        """Admits by the ceiling alone."""
        refused: _Refusals = []
        extras = _fitting(batch, _ordered_extras(batch, baseline), extras_allowed, refused)
        times = _prefix_times(batch, self._predictor, baseline, extras)
        budget_ms = self._ceiling * float(np.min(batch.tpot_slo_ms, initial=np.inf))
        admitted = _largest_prefix(times, budget_ms)
        refused.append((extras[admitted:], RefusalReason.SLACK))
        return _decision(baseline, extras, admitted, times, budget_ms, refused)


class TaperPolicy:
    """Extras within the batch's slack, at the most tokens per second; with its ablations.

    More slack never admits fewer extras: a step that becomes feasible is longer than the one that
    was chosen, so at a better rate it is wider.

    * ``widest``: the largest feasible prefix, whatever its rate.
    * ``no-slack``: the budget is kappa x the smallest tau, whatever the slack.
    * ``no-replan``: a request keeps the width it was granted when its stage began.
    """

    max_width: int | None = None

    def __init__(
        self, name: str, scheduler: SchedulerConfig, predictor: StepLatencyPredictor
    ) -> None:
        self.name = name
        self._variant = name.partition(":")[2]
        self._rho = scheduler.rho
        self._kappa = scheduler.kappa
        self._predictor = predictor

    def baseline(self, batch: BatchState) -> IntArray:
        """The least recently advanced leaf of every request, so that the baseline rotates."""
        return _least_recent_leaves(batch)

    def admit(
        self, batch: BatchState, baseline: IntArray, extras_allowed: bool = True
    ) -> AdmissionDecision:
        """Admits what the slack can pay for."""
        refused: _Refusals = []
        extras = _ordered_extras(batch, baseline)
        num_kept = 0
        if self._variant == "no-replan":
            extras, num_kept = _granted_first(batch, extras, refused)
        fitting = _fitting(batch, extras, extras_allowed, refused)
        num_kept = min(num_kept, len(fitting))
        times = _prefix_times(batch, self._predictor, baseline, fitting)
        budget_ms = self._budget_ms(batch, float(times[0]))
        feasible = max(num_kept, _largest_prefix(times, budget_ms))
        admitted = feasible
        if self._variant != "widest":
            within = times[: feasible + 1]
            admitted = max(num_kept, _most_efficient_prefix(within, len(baseline), budget_ms))
            refused.append((fitting[admitted:feasible], RefusalReason.EFFICIENCY))
        refused.append((fitting[feasible:], RefusalReason.SLACK))
        return _decision(baseline, fitting, admitted, times, budget_ms, refused)

    def _budget_ms(self, batch: BatchState, baseline_ms: float) -> float:
        """B; unbounded when no request can meet its objective any more."""
        savable = batch.savable
        ceiling_ms = self._kappa * float(batch.tpot_slo_ms.min(where=savable, initial=np.inf))
        if self._variant == "no-slack":
            return ceiling_ms
        slack_ms = float(batch.slack_ms.min(where=savable, initial=np.inf))
        return min(baseline_ms + self._rho * max(0.0, slack_ms - baseline_ms), ceiling_ms)


# --------------------------------------------------------------------------- baseline, order


def _least_recent_leaves(batch: BatchState) -> IntArray:
    """Per request the leaf that waited longest, among those that hold a place if there are any."""
    num = batch.num_leaves
    key = batch.last_advanced * num + np.arange(num)
    key[~batch.holding] += _AFTER_ALL
    oldest: IntArray = (np.minimum.reduceat(key, batch.first_leaf) % _AFTER_ALL) % num
    return oldest


def _extras(batch: BatchState, baseline: IntArray) -> IntArray:
    is_extra = np.ones(batch.num_leaves, dtype=np.bool_)
    is_extra[baseline] = False
    return np.flatnonzero(is_extra)


def _ordered_extras(batch: BatchState, baseline: IntArray) -> IntArray:
    """Extras by token per marginal cost, least progressed first inside a request.

    A token costs what its leaf's step reads beside the others. A request is ranked by its shortest
    leaf, so that its leaves keep their order by progress. Those that hold a place go before all.
    """
    num_requests, num_leaves = batch.num_requests, batch.num_leaves
    if num_leaves == num_requests:
        return baseline[:0]
    shortest = np.minimum.reduceat(batch.extra_context_tokens, batch.first_leaf)
    request_key = shortest * num_requests + np.arange(num_requests)
    key = request_key[batch.request_index]
    key *= _MAX_GENERATED
    key += batch.num_generated
    key *= num_leaves
    key += np.arange(num_leaves)
    key[~batch.holding] += _AFTER_ALL
    key[baseline] = -1  # ahead of all extras
    order: IntArray = key.argsort()
    return order[num_requests:]


def _granted_first(batch: BatchState, extras: IntArray, refused: _Refusals) -> tuple[IntArray, int]:
    """For ``no-replan``: extras within their request's granted width, then those undecided."""
    request = batch.request_index[extras]
    granted = batch.stage_width[request]
    rank = _rank_in_request(request)
    inside = (granted > 0) & (rank < granted - 1)
    outside = (granted > 0) & ~inside
    refused.append((extras[outside], RefusalReason.CAP))
    return np.concatenate([extras[inside], extras[granted == 0]]), int(inside.sum())


def _rank_in_request(request: IntArray) -> IntArray:
    """Position of each entry among those of its request, in the order given."""
    order = np.argsort(request, kind="stable")
    grouped = request[order]
    first = np.searchsorted(grouped, grouped)
    rank = np.empty(len(request), dtype=np.int64)
    rank[order] = np.arange(len(request)) - first
    return rank


# -------------------------------------------------------------------- limits that are not time


def _keep(extras: IntArray, kept: BoolArray, reason: RefusalReason, refused: _Refusals) -> IntArray:
    refused.append((extras[~kept], reason))
    return extras[kept]


def _fitting(
    batch: BatchState, extras: IntArray, extras_allowed: bool, refused: _Refusals
) -> IntArray:
    """Extras that memory and the batch size allow, in order."""
    if not extras_allowed:
        refused.append((extras, RefusalReason.PROBE))
        return extras[:0]
    if int(batch.blocks_needed.sum()) > batch.num_unreserved_blocks:
        extras = _keep(extras, _within_memory(batch, extras), RefusalReason.KV_PRESSURE, refused)
    room = max(0, batch.max_batch_size - batch.num_requests)
    refused.append((extras[room:], RefusalReason.BATCH_SIZE))
    return extras[:room]


def _within_memory(batch: BatchState, extras: IntArray) -> BoolArray:
    """Extras that the reservation of their request covers, or unreserved blocks in their order."""
    needed = batch.blocks_needed[extras]
    request = batch.request_index[extras]
    of_request = np.bincount(request, weights=needed, minlength=batch.num_requests)
    charged = needed * (of_request > batch.kv_headroom_blocks)[request]
    fits: BoolArray = (needed == 0) | (charged.cumsum() <= batch.num_unreserved_blocks)
    return fits


# ------------------------------------------------------------------------------- prefixes


def _prefix_times(
    batch: BatchState, predictor: StepLatencyPredictor, baseline: IntArray, extras: IntArray
) -> FloatArray:
    """T of the baseline with the first k extras, k = 0..len(extras)."""
    read = (batch.context_tokens[baseline], batch.extra_context_tokens[extras])
    context = np.concatenate(read).cumsum()
    return predictor.predict_steps_ms(len(baseline), context[len(baseline) - 1 :], batch.prefill)


def _largest_prefix(times: FloatArray, budget_ms: float) -> int:
    fits = times <= budget_ms
    fits[0] = True  # no extra at all
    return len(fits) - 1 - int(fits[::-1].argmax())


def _most_efficient_prefix(times: FloatArray, num_baseline: int, budget_ms: float) -> int:
    """The feasible prefix with the most tokens per second, ties to the wider."""
    if len(times) == 1:
        return 0
    rate = np.arange(num_baseline, num_baseline + len(times)) / times
    rate[1:][times[1:] > budget_ms] = -1.0
    return len(rate) - 1 - int(np.argmax(rate[::-1]))


def _decision(
    baseline: IntArray,
    extras: IntArray,
    num_admitted: int,
    times: FloatArray,
    budget_ms: float,
    refused: _Refusals,
) -> AdmissionDecision:
    return AdmissionDecision(
        baseline=baseline,
        extras=extras[:num_admitted],
        refused=tuple((rows, reason) for rows, reason in refused if len(rows)),
        baseline_ms=float(times[0]),
        step_ms=float(times[num_admitted]),
        budget_ms=budget_ms,
    )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < 100
    except ValueError:
        return False
