"""What no control of branch width can exceed: the fluid bound of the request rate.

In steady state at lambda requests per second, steps of every kind k (a width n_k, m_k prefill
tokens, t_k seconds) happen y_k times per second. Let a request decode N tokens, but for those that
its prefill draws, prefill M tokens and be at least C steps long (its critical path), each on
average. Whatever decides the widths,

  time      sum y_k t_k <= 1
  decode    sum y_k n_k >= lambda N
  prefill   sum y_k m_k >= lambda M
  pace      sum y_k >= 1 / (p tau): requests afford a mean step of p tau. One that has a serial
            stage, plain ones do, gets one token of it per step, so that its p is 1. One that has
            none draws N_i tokens in C_i steps at least, and meets its time per token with steps of
            (N_i - 1) / (C_i - 1) tau. 5 % may miss: p is that of the request at this quantile
  memory    sum y_k >= lambda A / K: with s the mean step, a request holds KV for at least C s
            seconds; A is its tokens held x steps, or reserved x C where that is more: either sum
            stays below the pool K (Little). What is reserved and not held may be lent
  slots     sum y_k >= lambda C / R for R request slots, likewise

The largest lambda is a linear program. With s = 1 / sum y_k and x_k = s y_k it asks for a mixture
of kinds with mean time s <= min(p tau, K / (lambda A), R / (lambda C)), E[n] >= lambda N s and
E[m] >= lambda M s. For every price beta >= 0 of a prefill token in decoded ones this implies

  lambda <= max over mixtures of E[n + beta m] / s / (N + beta M),

which one kind, or two that share the time, attain. Each price bounds lambda; the least of them is
the bound (linear programming duality; prices come from a grid, which can only make it larger).

The bound is approximate: contexts are equal to their mean, every request sees the mean step, and
those that miss are served too. Queueing, and with it the TTFT, is absent. Where the engine reads a
shared prefix once, branches are taken to run abreast.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from perf.offered_load import LoadConfig, OfferedLoad
from perf.program import critical_tokens, program_cost
from perf.simulation import Deployment
from taper_trtllm.batch import FloatArray, PrefillLoad
from taper_trtllm.engines.simulated import StepTimes
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import ForkJoinRequest, ParallelStage, SerialStage, max_new_tokens

_SAMPLE = 1000  # requests whose mean stands for the load
_PRICES = (0.0, *np.geomspace(1e-3, 10, 33).tolist())  # decoded tokens per prefill token
_HALVINGS = 30
_MISSES = 0.05  # share of requests that may miss their objective


@dataclass(frozen=True, slots=True)
class Demand:
    """Means over requests.

    Attributes:
        output_tokens: Decoded tokens.
        decode_tokens: N, those of them that need a place in a decode batch.
        context_tokens: Context of a decoded token.
        prefill_tokens: M, prefill tokens that cost time here.
        prefill_context: Context of such a token.
        critical_steps: C, steps of the longest path.
        kv_token_steps: A, KV tokens held, or reserved, x steps.
        pace: p, the longest mean step that all but 5 % afford, in units of tau.
    """

    output_tokens: float
    decode_tokens: float
    context_tokens: float
    prefill_tokens: float
    prefill_context: float
    critical_steps: float
    kv_token_steps: float
    pace: float


def upper_bound(deployment: Deployment, load: LoadConfig) -> float:
    """The fluid bound of a deployment in requests per second, from a sample of its load."""
    return bound_of_demand(deployment, demand_of_load(deployment, load))


def bound_of_demand(deployment: Deployment, demand: Demand) -> float:
    """The fluid bound of a deployment in requests per second, for requests that ask so much."""
    kinds = step_kinds(deployment, demand)
    engine = deployment.engine
    return largest_rate(
        kinds, demand, deployment.slo.tpot_ms / 1e3, engine.num_kv_blocks * engine.tokens_per_block,
        deployment.scheduler.max_num_requests,
    )  # fmt: skip


def demand_of_load(deployment: Deployment, load: LoadConfig) -> Demand:
    """Means over a sample of a load."""
    offers = itertools.islice(OfferedLoad(load, 0).arrivals(1.0), _SAMPLE)
    return demand_of((offer.request for _, offer in offers), deployment)


def demand_of(requests: Iterable[ForkJoinRequest], deployment: Deployment) -> Demand:
    """Means over requests of what they ask of a deployment."""
    engine = deployment.engine
    shared_weight = 1.0
    if engine.prefix_sharing_attention:
        shared_weight = deployment.truth.shared_context_weight
    rows, paces = [], []
    for request in requests:
        cost = program_cost(request, engine.tokens_per_block, shared_weight)
        prompt = len(request.input_ids)
        tokens = context = 0
        if not engine.disaggregated_prefill:
            tokens, context = prompt, prompt * (prompt - 1) // 2
        if not engine.free_joins:
            tokens += cost.num_prefill_tokens - prompt
            context += cost.prefill_token_context - prompt * (prompt - 1) // 2
        fraction = deployment.scheduler.kv_reserve_fraction
        rows.append((cost.num_output_tokens, cost.num_output_tokens - cost.num_drawn_by_prefill,
                     cost.decode_context_tokens, tokens, context,
                     cost.critical_tokens, held_token_steps(request),
                     reserved_token_steps(request, engine.tokens_per_block, fraction)))  # fmt: skip
        paces.append(longest_step(request.program))
    means = np.mean(rows, axis=0)
    output, decoded, decode_context, prefill, prefill_context, critical, held, reserved = means
    return Demand(
        float(output), float(decoded), float(decode_context / output), float(prefill),
        float(prefill_context / max(prefill, 1e-9)), float(critical), float(max(held, reserved)),
        float(np.quantile(paces, _MISSES, method="lower")),
    )  # fmt: skip


def longest_step(program: Sequence[SerialStage | ParallelStage]) -> float:
    """The longest mean step, in units of tau, with which a program meets its TPOT objectives."""
    if any(isinstance(stage, SerialStage) and stage.max_tokens > 1 for stage in program):
        return 1.0
    num_steps = critical_tokens(program) - 1
    return (max_new_tokens(program) - 1) / num_steps if num_steps else np.inf


def reserved_token_steps(
    request: ForkJoinRequest, tokens_per_block: int, reserve_fraction: float
) -> float:
    """KV tokens x steps that a request reserves over its critical path, with a share reserved."""
    footprint = serial_footprint_blocks(len(request.input_ids), request.program, tokens_per_block)
    return reserve_fraction * footprint * tokens_per_block * critical_tokens(request.program)


def held_token_steps(request: ForkJoinRequest) -> float:
    """The least KV tokens x steps that a request holds under any control of its width.

    That is with all branches at once, since a deferred branch keeps its own tokens and everyone's
    prefix for longer.
    """
    return _held_in_parallel(request.program, len(request.input_ids))[0]


def _held_in_parallel(
    program: Sequence[SerialStage | ParallelStage], context: int
) -> tuple[float, int]:
    """Tokens x steps of a program behind `context` own tokens, and its own tokens at the end."""
    held = 0.0
    for stage in program:
        if isinstance(stage, SerialStage):
            held += stage.max_tokens * (context + (stage.max_tokens - 1) / 2)
            context += stage.max_tokens
            continue
        held += context * max(critical_tokens(branch.program) for branch in stage.branches)
        for branch in stage.branches:
            own, end = _held_in_parallel(branch.program, len(branch.header_ids))
            held += own
            context += end
        context += len(stage.join_ids)
    return held, context


# --------------------------------------------------------------------------- the linear program

Kinds = tuple[FloatArray, FloatArray, FloatArray]


def step_kinds(deployment: Deployment, demand: Demand) -> Kinds:
    """Widths n, prefill tokens m and seconds t of the steps that can happen.

    Step times are linear between measured widths and numbers of rows, so the ends of every such
    piece do. (Between two widths and two numbers of rows they are bilinear.)
    """
    profile, scheduler = deployment.truth, deployment.scheduler
    most, budget = scheduler.max_batch_size, scheduler.max_prefill_tokens
    ends = {p.width for p in profile.decode} | {p.width for p in profile.prefill} | {most}
    for bucket in profile.width_buckets or ():
        ends |= {bucket, bucket + 1}
    rows = {p.width + p.num_tokens for p in profile.prefill} if demand.prefill_tokens else set()
    times = StepTimes(profile, deployment.engine.max_batch_size)
    disturbance = deployment.engine.disturbance
    kinds = []
    for width in sorted(w for w in ends if 1 <= w <= most):
        decode_ms = times.decode_ms(width, demand.context_tokens * disturbance.context_scale)
        kinds.append((width, 0, decode_ms))
        chunks = {count - width for count in rows if 0 < count - width < budget}
        for chunk in sorted(chunks | {budget} if rows else ()):
            load = PrefillLoad(1, chunk, chunk * demand.prefill_context)
            kinds.append((width, chunk, decode_ms + times.prefill_ms(width, load)))
    widths, tokens, step_ms = np.array(kinds, dtype=np.float64).T
    step_ms = step_ms * disturbance.step_scale + disturbance.host_overhead_ms
    return widths, tokens, step_ms / 1e3


def largest_rate(
    kinds: Kinds, demand: Demand, tau_s: float, num_kv_tokens: float, num_slots: float
) -> float:
    """The bound in requests per second; see the module's docstring.

    Args:
        kinds: Of `step_kinds`.
        demand: Of a request.
        tau_s: Objective of the time per token.
        num_kv_tokens: K.
        num_slots: R.
    """

    def longest_step_s(rate: float) -> float:
        return min(
            demand.pace * tau_s,
            num_kv_tokens / (rate * demand.kv_token_steps),
            num_slots / (rate * demand.critical_steps),
        )

    widths, tokens, times = kinds
    prices = _PRICES if demand.prefill_tokens else (0.0,)
    hulls = [_upper_hull(times, widths + price * tokens) for price in prices]
    asked = [demand.decode_tokens + price * demand.prefill_tokens for price in prices]

    def served(step_s: float) -> float:
        """Requests per second that steps of mean length `step_s` or shorter can serve."""
        return min(_best_yield(*h, step_s) / a for h, a in zip(hulls, asked, strict=True))

    low, high = 0.0, served(float(times.max()))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if served(longest_step_s(middle)) >= middle:
            low = middle
        else:
            high = middle
    return high


def _upper_hull(times: FloatArray, gains: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Times and gains of the kinds that mixtures of the most gain consist of, by time."""
    hull: list[tuple[float, float]] = []
    for time, gain in sorted(zip(times.tolist(), gains.tolist(), strict=True)):
        while hull and hull[-1][0] == time:
            hull.pop()
        while len(hull) > 1 and _is_below(hull[-1], hull[-2], (time, gain)):
            hull.pop()
        hull.append((time, gain))
    columns = np.array(hull)
    return columns[:, 0], columns[:, 1]


def _is_below(
    point: tuple[float, float], left: tuple[float, float], right: tuple[float, float]
) -> bool:
    """It does not rise above the line from left to right."""
    (x, y), (x0, y0), (x1, y1) = point, left, right
    return (y - y0) * (x1 - x0) <= (y1 - y0) * (x - x0)


def _best_yield(times: FloatArray, gains: FloatArray, step_s: float) -> float:
    """The most gain per second of a mixture of kinds of a hull whose mean time is `step_s` at most.

    Along the hull gain per second is highest at a kind, or at the end.
    """
    if times[0] > step_s:
        return 0.0
    is_short = times <= step_s
    best = float((gains[is_short] / times[is_short]).max())
    if is_short.all():
        return best
    return max(best, float(np.interp(step_s, times, gains)) / step_s)
