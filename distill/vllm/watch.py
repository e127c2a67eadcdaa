"""Run a command and end it with its parent: the first process of a server's session, started as a script.

    python watch.py PARENT_PID GRACE_SECONDS COMMAND...

The parent holds the other end of this process's standard input. When that closes, on purpose or because the parent is
gone (SIGKILL included), or when the command ends by itself, the whole process group is ended: TERM, at most
GRACE_SECONDS for all of it to go, then KILL, which also ends this process. Nothing the command started stays behind
as long as it stays in the group. What a process holds beside its own memory (vLLM's workers speak through queues in
/dev/shm) it gives back itself where it has the time, and nobody else does. Imports nothing but the standard library: it
runs before and beside everything else.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.2
ENDED = "watch: the server ended by itself with exit code"
"""How the log's line begins that says so; the code itself is lost with this process, which is killed last."""


def main() -> None:
    parent, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    # A handler and not SIG_IGN, which the command would inherit: this process outlives its own TERM to the group.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    # The parent's process id is asked for too: a copy of the pipe's end may live on in a child that the parent forked.
    while server.poll() is None and os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if readable and not os.read(0, 1024):
            break
    if server.poll() is not None:
        print(ENDED, server.returncode, flush=True)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (server.poll() is None or others()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
    os.killpg(0, signal.SIGKILL)


def others() -> bool:
    """Whether somebody else of this process's group still runs. False where the system has no /proc to tell."""
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    state, _, group = file.read().rpartition(b")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            # One that has ended and waits for its parent to take note does not run.
            if int(group) == os.getpgrp() and state != b"Z":
                return True
    return False


if __name__ == "__main__":
    main()
