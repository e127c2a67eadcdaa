"""Whether two expressions are equal as mathematics, decided in worker processes with time and memory limits.

The library that decides simplifies what a model wrote, which can take for ever; what takes too long is not equal, and
its process is replaced. Importing this module starts nothing; the first comparison does.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import selectors
import subprocess
import sys
from pathlib import Path

from distill.errors import DistillError

WORKERS = min(4, os.cpu_count() or 1)
"""Processes that compare; as many threads may call ``equal`` at once without waiting."""

COMPARE_SECONDS = 5
"""Computing time of one comparison; what takes longer is not equal."""

_PATIENCE = 12
"""Seconds by the wall for each of these: a machine that is busy with the training gives the process a part of them."""

_START_SECONDS = 120


def equal(reference: str, candidate: str) -> bool:
    """Whether two LaTeX expressions are equal; False for what cannot be read or decided in time."""
    worker = _idle.get()
    try:
        return worker.same(reference, candidate)
    finally:
        _idle.put(worker)


class _Worker:
    """One comparing process, started when first needed and replaced when it dies or does not answer in time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def same(self, reference: str, candidate: str) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None
        verdict = b""
        try:
            process.stdin.write(json.dumps([reference, candidate]).encode() + b"\n")
            process.stdin.flush()
            verdict = _line(process, _PATIENCE * COMPARE_SECONDS)
        except BrokenPipeError:
            pass
        finally:
            # Also where a Ctrl-C cuts in: what the process says later must not answer the next question.
            if not verdict:
                self.stop()
        return verdict == b"1"

    def _start(self) -> subprocess.Popen[bytes]:
        program = Path(__file__).with_name("math_worker.py")
        process = subprocess.Popen(
            # -P: this folder's statistics.py must not stand in for the standard library's.
            [sys.executable, "-P", str(program), str(COMPARE_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        if _line(process, _START_SECONDS) != b"ready":
            process.kill()
            complaint = process.communicate()[1].decode(errors="replace").strip().splitlines() or ["no message"]
            raise DistillError(f"the process that compares mathematics did not start: {complaint[-1]}")
        self._process = process
        return process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the process' output without its end; empty if it ended or none came in time."""
    assert process.stdout is not None
    # Not select(), which refuses file numbers from 1,024 on: a server's client has a connection a response.
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if selector.select(seconds) else b""


_idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
_workers = [_Worker() for _ in range(WORKERS)]
for _worker in _workers:
    _idle.put(_worker)


@atexit.register
def _stop_workers() -> None:
    for worker in _workers:
        worker.stop()
