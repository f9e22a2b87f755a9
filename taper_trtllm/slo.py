"""Clocks of one request against its objective: slack, savability, and the final verdict.

All times are seconds on one monotonic clock, passed in. The all-token clock starts at the first
token and grants one (1 - m) tau per token. The serial clock runs only inside the request's serial
stages, from a stage's first token to its last, one (1 - m) tau per interval, carried over stages:
lead earned in a wide parallel stage does not pay for a slow serial stage.
"""

from __future__ import annotations

from taper_trtllm.request import SloTarget


class SlackTracker:
    """Follows the tokens of one request.

    Args:
        slo: The request's objective.
        arrival_s: When it was submitted.
        margin: m, the share of tau that deadlines hold back.
    """

    def __init__(self, slo: SloTarget, arrival_s: float, margin: float) -> None:
        self.slo = slo
        self._arrival_s = arrival_s
        self._ttft_slo_s = slo.ttft_ms / 1e3
        self._tau_s = slo.tpot_ms / 1e3
        self._step_tau_s = (1 - margin) * self._tau_s
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.num_tokens = 0
        # Serial stages that have ended.
        self._serial_s = 0.0
        self._serial_intervals = 0
        # The serial stage that is running.
        self._stage_first_s: float | None = None
        self._stage_last_s = 0.0
        self._stage_tokens = 0

    # ---------------------------------------------------------------------------- observing

    def record_tokens(self, now_s: float, num_tokens: int, serial: bool) -> None:
        """New tokens at a step's completion; `serial` if they belong to a serial stage."""
        if num_tokens < 1:
            return
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.num_tokens += num_tokens
        if serial:
            if self._stage_first_s is None:
                self._stage_first_s = now_s
            self._stage_last_s = now_s
            self._stage_tokens += num_tokens

    def end_serial_stage(self) -> None:
        """The running serial stage is over; its lead or lag is carried to the next."""
        if self._stage_first_s is None:
            return
        self._serial_s += self._stage_last_s - self._stage_first_s
        self._serial_intervals += self._stage_tokens - 1
        self._stage_first_s = None
        self._stage_tokens = 0

    # ----------------------------------------------------------------------------- planning

    def slack_s(self, now_s: float) -> float:
        """Time to the earlier of the two next deadlines; infinite before the first token."""
        if self.first_token_s is None:
            return float("inf")
        slack = self.first_token_s + self.num_tokens * self._step_tau_s - now_s
        if self._stage_first_s is not None:
            allowed = (self._serial_intervals + self._stage_tokens) * self._step_tau_s
            spent = self._serial_s + now_s - self._stage_first_s
            slack = min(slack, allowed - spent)
        return slack

    def ttft_left_ms(self, now_s: float) -> float:
        """Time to the first token's objective; negative once it is missed."""
        return self.slo.ttft_ms - (now_s - self._arrival_s) * 1e3

    def is_savable(
        self,
        now_s: float,
        step_s: float,
        num_remaining_tokens: int,
        num_remaining_steps: int,
        num_remaining_serial_tokens: int,
    ) -> bool:
        """Whether the objective can still be met if every further step took `step_s`.

        Before the first token, the clocks are taken to start with it and the whole program to be
        ahead.

        Args:
            now_s: Now.
            step_s: Latency of the steps to come.
            num_remaining_tokens: Tokens the request may still decode, all branches together.
            num_remaining_steps: Steps they take.
            num_remaining_serial_tokens: Those of them that are in serial stages.
        """
        has_begun = self.first_token_s is not None
        first_s = now_s if self.first_token_s is None else self.first_token_s
        if first_s - self._arrival_s > self._ttft_slo_s:
            return False
        all_tokens = self.num_tokens + num_remaining_tokens - 1
        num_steps = num_remaining_steps if has_begun else num_remaining_steps - 1
        if now_s - first_s + num_steps * step_s > all_tokens * self._tau_s:
            return False
        spent_s = self._serial_s
        intervals = self._serial_intervals + num_remaining_serial_tokens
        if self._stage_first_s is not None:
            spent_s += now_s - self._stage_first_s
            intervals += self._stage_tokens - 1
        return spent_s + num_remaining_serial_tokens * step_s <= intervals * self._tau_s

    # ------------------------------------------------------------------------------ verdict

    @property
    def ttft_ms(self) -> float | None:
        """Arrival to first token."""
        if self.first_token_s is None:
            return None
        return (self.first_token_s - self._arrival_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token over all tokens; None below two."""
        if self.first_token_s is None or self.last_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) * 1e3 / (self.num_tokens - 1)

    @property
    def serial_tpot_ms(self) -> float | None:
        """The serial clock's time over its intervals, of ended stages; None without any."""
        if self._serial_intervals < 1:
            return None
        return self._serial_s * 1e3 / self._serial_intervals

    def is_met(self, num_critical_tokens: int) -> bool:
        """The verdict on a finished request; a condition without a value holds vacuously.

        Args:
            num_critical_tokens: Decoded tokens on the request's longest path, for the stretch.
        """
        ttft_ms = self.ttft_ms
        if ttft_ms is None or self.last_token_s is None or ttft_ms > self.slo.ttft_ms:
            return False
        if any(
            value is not None and value > self.slo.tpot_ms
            for value in (self.tpot_ms, self.serial_tpot_ms)
        ):
            return False
        if self.slo.stretch is None:
            return True
        e2el_ms = (self.last_token_s - self._arrival_s) * 1e3
        return e2el_ms <= self.slo.stretch * num_critical_tokens * self.slo.tpot_ms
