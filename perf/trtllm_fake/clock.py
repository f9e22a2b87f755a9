"""Clocks of the fake: wall time, or time that only passes when somebody lets it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds, monotonic."""

    def now_s(self) -> float:
        """The time."""

    def wait_until(self, time_s: float) -> None:
        """Lets time pass up to a point; never back."""


class WallClock:
    """Real time; waiting sleeps."""

    def now_s(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def wait_until(self, time_s: float) -> None:
        """See `Clock`."""
        time.sleep(max(0.0, time_s - self.now_s()))


class VirtualClock:
    """Starts at 0; waiting costs nothing."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        """See `Clock`."""
        return self._now_s

    def wait_until(self, time_s: float) -> None:
        """See `Clock`."""
        self._now_s = max(self._now_s, time_s)
