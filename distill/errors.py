"""The project's exceptions and the exit code each one means.

A message says what is wrong, what was found, and the way out. The command line prints that sentence and leaves with
``exit_code``; Python callers catch the class. Exit codes: 1 failed; 2 usage or configuration, never worth a retry;
75 stopped cleanly with a resumable checkpoint (BSD's EX_TEMPFAIL); 130 interrupted by the keyboard.
"""

from __future__ import annotations


class DistillError(Exception):
    """Something failed that is no fault of the configuration (exit code 1)."""

    exit_code = 1
    place: str | None = None
    """Where in a run it happened, once that was said of it."""


class UserError(DistillError, ValueError):
    """The usage, the configuration or the input is wrong; the same call will fail again (exit code 2)."""

    exit_code = 2


class NonFiniteError(DistillError):
    """A loss or gradient is NaN or infinite; raised before the optimiser step (exit code 1)."""


class GuardError(DistillError):
    """A guard found that the training goes wrong; a checkpoint of the last step was written (exit code 1)."""


class GoneError(DistillError):
    """Who should answer will not any more: asking again, or for less, is of no use (exit code 1)."""


class StoppedError(DistillError):
    """A signal asked the run to stop; a resumable checkpoint was written (75 for SIGTERM, 130 for Ctrl-C)."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerError(DistillError):
    """Another process of the same run failed; that one says why, this one only ends with it."""


def name_place(error: Exception, place: str) -> None:
    """Says of an error where in a run it happened, once: who caught it first knows best.

    What is no DistillError is a bug or a device that failed: it keeps its own words, and a note goes with it.
    """
    if not isinstance(error, DistillError):
        if not getattr(error, "__notes__", None):
            error.add_note(f"in {place}")
    elif error.place is None:
        error.place, error.args = place, (f"{place}: {error}",)
