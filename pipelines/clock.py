"""The time as schedules and workers see it: what the wall says, what has passed, and waiting.

What the wall says may jump; due times are of it. Leases and time limits count what has passed since the machine
started, which never goes back and is the same in all of its processes. Tests bring clocks of their own.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since 1970 by the wall."""

    def passed(self) -> float:
        """Seconds since the machine started."""

    def wait(self, seconds: float) -> None:
        """Let real time pass."""


class SystemClock:
    """The machine's own."""

    def now(self) -> float:
        return time.time()

    def passed(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


def iso(moment: float | None) -> str | None:
    """``2026-03-29T01:00:00Z``: how a moment is written in documents."""
    return None if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
