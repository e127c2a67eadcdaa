"""Runs a job's command for a worker, and lets nothing of it outlive either of them. Started as a script.

    python keeper.py GRACE_SECONDS EXIT_FILE COMMAND...

Standard input is a pipe whose other end the worker holds. The command starts at the byte ``g``; ``t`` asks it to stop
(TERM, after GRACE_SECONDS KILL), ``k`` kills it, and where the pipe closes because the worker is gone, SIGKILL
included, that is ``t`` too. When the command has ended, whatever it started is ended, sessions of its own or not: what
loses its parent becomes this process's child. EXIT_FILE is written last, so where it exists nothing of the job runs any
more. If this process itself is killed, the kernel kills the command.

Imports nothing but the standard library: it runs before and beside everything else. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.1
LEAVE_SECONDS = 2.0
"""What the command's own children get to leave by themselves when it has ended."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    grace, exit_file, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    # Handlers and not SIG_IGN, which the command would inherit: a signal to the group is the command's affair.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.read(0, 1) != b"g":
        return 0
    own = os.getpid()

    def die_with_keeper() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != own:
            os._exit(1)

    try:
        job = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_keeper)
    except OSError as error:
        print(f"the job could not be started: {error}", flush=True)
        code = 1
    else:
        code = follow(job.pid, grace)
    end_rest()
    with open(f"{exit_file}.tmp", "w") as file:
        file.write(str(code))
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{exit_file}.tmp", exit_file)
    return 0


def follow(pid: int, grace: float) -> int:
    """Until the command has ended: its exit code, negative where a signal ended it."""
    deadline: float | None = None
    is_open = True
    while True:
        code = reap(pid)
        if code is not None:
            return code
        if is_open and select.select([0], [], [], POLL_SECONDS)[0]:
            said = os.read(0, 1)
            is_open = said != b""
            if said == b"k":
                os.kill(pid, signal.SIGKILL)
            elif deadline is None:
                os.kill(pid, signal.SIGTERM)
                deadline = time.monotonic() + grace
        elif not is_open:
            time.sleep(POLL_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)


def reap(wanted: int | None) -> int | None:
    """Bury what has ended; the exit code of ``wanted`` if it is among it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == wanted:
            return os.waitstatus_to_exitcode(status)


def end_rest() -> None:
    """End all that the command left, and what that leaves in turn."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while children := children_of(os.getpid()):
        if time.monotonic() > deadline:
            for child in children:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        reap(None)
        time.sleep(POLL_SECONDS / 5)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    after_name = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(after_name[1]) == pid:
                found.append(int(entry))
    return found


if __name__ == "__main__":
    sys.exit(main())
