"""What becomes of a job when an attempt at it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.jobs import ScheduleSettings

State = Literal["queued", "running", "interrupted", "waiting", "done", "failed", "cancelled", "replaced", "missed"]

WAITING: tuple[State, ...] = ("queued", "interrupted", "waiting")
"""A worker will take it up: for the first time, after an interruption, or after a wait."""
ACTIVE: tuple[State, ...] = (*WAITING, "running")
"""It is not finished."""
FINISHED: tuple[State, ...] = ("done", "failed", "cancelled", "replaced", "missed")

Asked = Literal["stop", "cancel", "replace", "time_limit"]
"""Why a job was asked to end: its worker stops; somebody cancelled it; a newer run replaces it; its time is over."""

NEVER_RETRIED, ALWAYS_RETRIED = 2, 75


@dataclass(frozen=True, slots=True)
class Verdict:
    """The job's next state, why, and how long it waits before it may be taken up again."""

    state: State
    reason: str | None = None
    delay: float = 0.0
    is_failure: bool = False


def judge(
    code: int | None,
    *,
    asked: Asked | None,
    failures: int,
    stops: int,
    settings: ScheduleSettings,
    keeper: int | None = None,
) -> Verdict:
    """What an attempt's exit code means. None: its keeper left none, and ended with ``keeper`` itself, where that is
    known.

    A keeper that was killed is no failure of the job's; one that failed by itself, on a full disk for example, would do
    so again at once, so the job waits and it is counted. ``failures`` and ``stops`` count the job's earlier attempts
    that failed, and that stopped by themselves with 75.
    """
    if code == 0:
        return Verdict("done")
    if asked == "cancel":
        return Verdict("cancelled", "cancelled while it ran")
    if asked == "replace":
        return Verdict("replaced", "a newer run of its schedule took its place")
    if asked == "time_limit":
        return Verdict("failed", f"stopped after {settings.active_deadline_seconds} s (active_deadline_seconds)")
    return _judge_unasked(code, keeper, worker_stops=asked == "stop", failures=failures, stops=stops, settings=settings)


def _judge_unasked(
    code: int | None, keeper: int | None, *, worker_stops: bool, failures: int, stops: int, settings: ScheduleSettings
) -> Verdict:
    if code == NEVER_RETRIED:
        return Verdict("failed", "its configuration or input is wrong (exit code 2); the log says what")
    if worker_stops or (code is None and (keeper is None or keeper < 0)):
        return Verdict("interrupted", "its worker stopped" if worker_stops else "its keeper was killed")
    if code == ALWAYS_RETRIED:
        return Verdict("waiting", "it stopped with a checkpoint (exit code 75)", _backoff(stops, settings))
    if code is None:
        how = f"its keeper failed (exit code {keeper}) and left no exit code of the job"
    else:
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if failures >= settings.backoff_limit:
        after = f" after {failures} retries" if failures else ""
        return Verdict("failed", f"{how}{after}; the log says what", is_failure=True)
    return Verdict("waiting", how, _backoff(failures, settings), is_failure=True)


def _backoff(earlier: int, settings: ScheduleSettings) -> float:
    # The exponent is bounded before it is used: 2.0**2000 is no number.
    return min(settings.backoff_seconds * 2.0 ** min(earlier, 60), settings.backoff_cap_seconds)
