"""What a request took, counted while it runs and told with its last output."""

from __future__ import annotations

from dataclasses import dataclass

from taper_trtllm.fork_join import ForkJoinState
from taper_trtllm.output import RequestMetrics
from taper_trtllm.request import ForkJoinRequest
from taper_trtllm.slo import SlackTracker
from taper_trtllm.written_forks import WrittenForks


@dataclass(slots=True)
class RequestAccount:
    """Counters of one request; what they mean is said in `RequestMetrics`.

    Attributes:
        arrival_s: When it was submitted.
        first_scheduled_s: When its first iteration started; None before it.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    num_recomputed_tokens: int = 0
    num_joined_tokens: int = 0
    _num_forks: int = 0
    _num_reused_tokens: int = 0
    _num_reused_blocks: int = 0
    _join_began_s: float | None = None
    _join_wait_s: float = 0.0
    _num_deferred: int = 0
    _num_decode_steps: int = 0
    _num_advanced: int = 0

    def count_fork(self, num_children: int, num_shared_tokens: int, tokens_per_block: int) -> None:
        """Branches began, each on the same prefix."""
        self._num_forks += 1
        self._num_reused_tokens += num_shared_tokens * num_children
        self._num_reused_blocks += num_shared_tokens // tokens_per_block * num_children

    def begin_join(self, now_s: float) -> None:
        """The root waits for its join's prefill from now on."""
        self._join_began_s = now_s

    def end_join(self, now_s: float) -> None:
        """A token came: whatever join was waited for is over."""
        if self._join_began_s is not None:
            self._join_wait_s += now_s - self._join_began_s
            self._join_began_s = None

    def count_decode_step(self, num_ready: int, num_advanced: int) -> None:
        """One step in which the request was in decode."""
        self._num_decode_steps += 1
        self._num_advanced += num_advanced
        self._num_deferred += num_ready - num_advanced

    def metrics(
        self,
        request: ForkJoinRequest,
        state: ForkJoinState,
        tracker: SlackTracker,
        written: WrittenForks | None,
        epoch_s: float,
    ) -> RequestMetrics:
        """The final accounting; `epoch_s` turns the monotonic clock into wall-clock time."""

        def wall_ns(time_s: float | None) -> int | None:
            return None if time_s is None else int((epoch_s + time_s) * 1e9)

        join_mode = request.join_mode
        return RequestMetrics(
            num_prompt_tokens=len(request.input_ids),
            num_output_tokens=state.num_output_tokens,
            arrival_time_ns=int((epoch_s + self.arrival_s) * 1e9),
            first_scheduled_time_ns=wall_ns(self.first_scheduled_s),
            first_token_time_ns=wall_ns(tracker.first_token_s),
            last_token_time_ns=wall_ns(tracker.last_token_s),
            ttft_ms=tracker.ttft_ms,
            tpot_ms=tracker.tpot_ms,
            serial_tpot_ms=tracker.serial_tpot_ms,
            join_wait_ms=self._join_wait_s * 1e3,
            num_forks=self._num_forks,
            num_reused_tokens=self._num_reused_tokens,
            num_reused_blocks=self._num_reused_blocks,
            num_recomputed_tokens=self.num_recomputed_tokens,
            num_joined_tokens=self.num_joined_tokens,
            num_deferred_branch_steps=self._num_deferred,
            mean_width=self._num_advanced / max(1, self._num_decode_steps),
            join_mode=join_mode,
            join_is_as_trained=None if written is None else written.is_trained_with(join_mode),
            slo_met=state.is_finished and tracker.is_met(state.root.num_critical),
        )
