"""An attempt at a job: its processes, as the worker that started them holds them and as any other finds them.

The worker holds the keeper (``pipelines.keeper``), which holds the command, in a session of their own. Another worker
knows a process by its id, the tick of the clock in which it started and the boot of the machine, so that an id that is
used again is no mistake; and whatever an attempt started carries its token in its environment. Linux only: /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import keeper

TOKEN_VARIABLE = "DISTILL_ATTEMPT"
_POLL_SECONDS = 0.02
_LEFTOVER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, of all that a machine ever has."""

    boot: str
    pid: int
    ticks: int

    @property
    def is_alive(self) -> bool:
        return self.boot == boot_id() and _ticks_of(self.pid) == self.ticks


def boot_id() -> str:
    """This boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _ticks_of(pid: int) -> int | None:
    """When a process started; None where there is none, or only its entry until its parent looks."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before it, in brackets, may hold anything.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _marked(token: str) -> Iterator[int]:
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                # It has ended meanwhile, or is somebody else's.
                continue
            if mark in environment.split(b"\0"):
                yield int(entry.name)


def end_leftovers(token: str) -> bool:
    """Kill what is left of an attempt whose keeper is gone; whether nothing is left now."""
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while found := list(_marked(token)):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            # One that hangs in the kernel goes when the kernel lets it.
            return False
        time.sleep(_POLL_SECONDS)
    return True


class Attempt:
    """A command under its keeper. It is started with ``start`` and begins to work with ``go``.

    Between the two the worker writes down who it is; if it dies before ``go``, nothing has begun.
    """

    def __init__(self, token: str, exit_file: Path, log: Path) -> None:
        self.token, self.exit_file, self.log = token, exit_file, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], grace: float) -> Identity:
        """Raises OSError where the system refuses."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # -I: neither the job's folder nor the user's variables change what the keeper runs.
                [sys.executable, "-I", keeper.__file__, str(grace), str(self.exit_file), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**environment, TOKEN_VARIABLE: self.token},
                start_new_session=True,
            )
        ticks = _ticks_of(self._process.pid)
        # Gone already: no process has these ticks.
        return Identity(boot_id(), self._process.pid, -1 if ticks is None else ticks)

    def go(self) -> None:
        self._say(b"g")

    def ask_to_stop(self) -> None:
        """TERM: a run writes a checkpoint; KILL after its grace."""
        self._say(b"t")

    def kill(self) -> None:
        self._say(b"k")

    def abandon(self) -> None:
        """Have the keeper end what runs, without waiting for it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _say(self, word: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        if self._process.stdin.closed:
            return
        try:
            os.write(self._process.stdin.fileno(), word)
        except BrokenPipeError:
            # The keeper is gone, which has_ended finds.
            return

    def has_ended(self) -> bool:
        """Whether nothing of the attempt runs any more."""
        assert self._process is not None and self._process.stdin is not None
        if self._process.poll() is None:
            return False
        self._process.stdin.close()
        return self.exit_file.exists() or end_leftovers(self.token)

    @property
    def code(self) -> int | None:
        """What the command ended with, once ``has_ended``; None where its keeper left no word of it."""
        return read_code(self.exit_file)

    @property
    def keeper_code(self) -> int | None:
        """What the keeper itself ended with, once ``has_ended``; negative where a signal killed it."""
        assert self._process is not None
        return self._process.returncode


def read_code(exit_file: Path) -> int | None:
    """The exit code that a keeper left; None where it left none."""
    try:
        return int(exit_file.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
