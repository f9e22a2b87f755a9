"""What a request gives back: streamed tokens by branch, then one final output with its timings.

Outputs are named tuples because several are made and sent between processes in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from taper_trtllm.request import JoinMode

FinishReason = Literal["stop", "length", "fork", "completed", "cancelled", "error"]


class BranchOutput(NamedTuple):
    """New tokens of one branch, or what happened to it.

    Events are outputs of requests that ask for them, in order among the others. Their tokens were
    given, not decoded: ``stage_started`` (a parallel stage; none), ``branch_started`` (its header),
    ``branch_finished`` (none), ``joined`` (the join text), ``fork_refused:`` and why (none).

    Attributes:
        branch_path: Which branch: alternating stage and branch index from the root, joined by dots.
            `""` is the request itself, `"1.0"` branch 0 of the parallel stage 1, `"1.0.2.3"`
            branch 3 of the parallel stage 2 of that branch.
        stage_index: The stage of that branch's program in which the tokens were decoded.
        token_ids: New tokens, in order.
        finish_reason: Why this stage of this branch ended with these tokens (``stop``, ``length``,
            or ``fork`` where the model wrote one); None while it goes on. Of ``branch_finished``:
            why the branch ended.
        event: What happened; empty for new tokens.
    """

    branch_path: str
    stage_index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    event: str = ""


class StepProgress(NamedTuple):
    """How a request stood after a step, for those who watch.

    Attributes:
        step_ms: Duration of the step.
        slack_ms: Time to the request's next deadline; None if it has none.
        width: Its branches that advanced.
        batch_width: Branches of all requests that did.
    """

    step_ms: float
    slack_ms: float | None
    width: int
    batch_width: int


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Timings and accounting of one finished request; `_ns` are wall-clock epoch times.

    Attributes:
        num_prompt_tokens: Prompt length.
        num_output_tokens: Generated tokens over all branches.
        arrival_time_ns: When the request was submitted.
        first_scheduled_time_ns: When its first iteration started; None if it never ran.
        first_token_time_ns: Completion of the iteration of its first token.
        last_token_time_ns: Completion of the iteration of its last token.
        ttft_ms: Arrival to first token.
        tpot_ms: (last - first token) / (n - 1) over all output tokens; None below two tokens.
        serial_tpot_ms: The serial clock's time over its intervals; None without any.
        join_wait_ms: Time spent in prefilling joins, summed.
        num_forks: Parallel stages that were forked.
        num_reused_tokens: Prefix tokens that branches took over by reference instead of computing.
        num_reused_blocks: KV blocks that branches share by reference, summed over branches.
        num_recomputed_tokens: Tokens computed again after a preemption.
        num_joined_tokens: Tokens prefilled at joins: branch texts at their new position, unless
            their KV was merged, and join texts.
        num_deferred_branch_steps: Ready branches left out of a step, summed over steps.
        mean_width: Branches advanced per decode step of the request.
        join_mode: How joins were made (`ForkJoinRequest.join_mode`).
        join_is_as_trained: Whether models of the request's fork format were trained with such
            joins; None without a format.
        slo_met: Whether it completed and met its objective.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    arrival_time_ns: int
    first_scheduled_time_ns: int | None
    first_token_time_ns: int | None
    last_token_time_ns: int | None
    ttft_ms: float | None
    tpot_ms: float | None
    serial_tpot_ms: float | None
    join_wait_ms: float
    num_forks: int
    num_reused_tokens: int
    num_reused_blocks: int
    num_recomputed_tokens: int
    num_joined_tokens: int
    num_deferred_branch_steps: int
    mean_width: float
    join_mode: JoinMode
    join_is_as_trained: bool | None
    slo_met: bool


class RequestOutput(NamedTuple):
    """What one step added to one request.

    Attributes:
        request_id: The client's id.
        branches: New tokens of all its branches.
        finish_reason: Set on the last output of the request only.
        error: Message to the client when `finish_reason` is ``error``.
        metrics: On the last output only.
        progress: Of requests that ask for events.
    """

    request_id: str
    branches: tuple[BranchOutput, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None
    progress: StepProgress | None = None

    @property
    def finished(self) -> bool:
        """No output follows."""
        return self.finish_reason is not None
