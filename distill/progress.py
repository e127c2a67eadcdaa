"""Progress on standard error: a bar with its rate on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Time between two plain lines."""


_silent = False


def be_silent() -> None:
    """From now on this process shows no progress: another one of the same run does."""
    global _silent
    _silent = True


def console() -> Console:
    """Standard error as rich sees it; standard output belongs to results."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line to whoever is watching."""
    if not _silent:
        complain(text)


def complain(text: str) -> None:
    """One line of what went wrong, also from a process that is silent."""
    console().print(text, markup=False, soft_wrap=True)


@dataclass
class Bar:
    """Counts what is done. ``note`` is shown beside the rate, for example the loss."""

    description: str
    total: int
    unit: str
    progress: Progress | None
    done: int = 0
    note: str = ""
    _started: float = field(default_factory=time.monotonic)
    _first: int = 0
    _last_line: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # What an earlier, interrupted run had done does not count towards this run's rate.
        self._first = self.done
        if self.progress is not None:
            self._task = self.progress.add_task(self.description, total=self.total, completed=self.done, rate="")

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if self.progress is not None:
            self.progress.update(self._task, completed=self.done, rate=self._rate_text())
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.line()

    def line(self) -> None:
        say(f"{self.description}: {self.done}/{self.total} {self._rate_text()}")

    def _rate_text(self) -> str:
        return f"{self.rate:,.1f} {self.unit}/s" + (f", {self.note}" if self.note else "")


@contextmanager
def track(description: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A progress bar over ``total`` units, ``done`` of them finished by an earlier run."""
    if _silent or not sys.stderr.isatty():
        bar = Bar(description, total, unit, None, done)
        yield bar
        bar.line()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console()) as progress:
        yield Bar(description, total, unit, progress, done)
