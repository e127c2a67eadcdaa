"""Stopping on request: SIGTERM and Ctrl-C become an exception at the next safe place.

A signal only leaves a note. Long work calls ``check`` between two tokens, passes or files; it raises there, never in
the middle of an optimiser step or a write, so the state on disk and in memory is that of the last finished step.
Work in a thread of its own can be called off besides, by whoever started it, and what goes wrong there can be raised by
``check`` in the thread that waits for it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from distill.errors import StoppedError

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}

_received: signal.Signals | None = None
_deferred = False


class _Here(threading.local):
    """What ends the work of this thread alone."""

    called_off: threading.Event | None = None
    watch: Callable[[], None] | None = None


_here = _Here()


class CalledOffError(Exception):
    """The work of this thread is not wanted any more. Whoever called it off knows, and nobody else hears of it."""


def check() -> None:
    """Raise StoppedError if a signal asked this process to stop, CalledOffError if this thread's work is not wanted.

    Within a ``watching`` block also what its watch raises.
    """
    if _here.called_off is not None and _here.called_off.is_set():
        raise CalledOffError
    if _deferred:
        return
    if _received is not None:
        raise stopped(_received)
    if _here.watch is not None:
        _here.watch()


def received() -> signal.Signals | None:
    """The signal that ``check`` would raise for, if there is one."""
    return None if _deferred else _received


def stopped(by: signal.Signals) -> StoppedError:
    """What a process that was asked to stop raises."""
    return StoppedError(f"stopped by {by.name}", exit_code=EXIT_CODES[by])


@contextmanager
def until(called_off: threading.Event) -> Iterator[None]:
    """Within the block ``check`` raises CalledOffError in this thread once the event is set."""
    _here.called_off = called_off
    try:
        yield
    finally:
        _here.called_off = None


@contextmanager
def watching(watch: Callable[[], None]) -> Iterator[None]:
    """Within the block ``check`` calls ``watch`` in this thread, which raises what has gone wrong elsewhere.

    An inner block's stands in for the outer one's.
    """
    outer, _here.watch = _here.watch, watch
    try:
        yield
    finally:
        _here.watch = outer


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block no ``check`` raises: work that has begun to change something is done whole."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT are noted for ``check``; a second Ctrl-C interrupts at once."""
    global _received

    def note(number: int, frame: FrameType | None) -> None:
        global _received
        if _received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        _received = signal.Signals(number)

    previous = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received = None
