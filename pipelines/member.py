"""A run in a process of its own: ``distill run`` on a configuration, followed to its end.

It runs under a keeper (``pipelines.keeper``), as a job's does: when it has ended, or this process is gone, SIGKILL
included, nothing that it started is left. Ctrl-C in the terminal reaches it through this process alone.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path

from distill.config import RunConfig
from distill.errors import DistillError, StoppedError, UserError
from distill.interrupt import EXIT_CODES
from distill.journal import write_atomically
from distill.progress import say
from distill.recipe import dump_yaml
from pipelines.attempt import Attempt
from pipelines.processes import own_command

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0  # a run that was asked to stop finishes its step and writes a checkpoint


def run_member(config: RunConfig, folder: Path, stopping: threading.Event, *, threads: int) -> None:
    """Run ``config`` in ``folder`` until it has finished; its log and its recipe stand beside the folder.

    Once ``stopping`` is set the run is asked to stop. Raises StoppedError for one that was stopped, and with the last
    words of one that failed DistillError, or UserError where its configuration was at fault.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = folder.parent / f"{folder.name}.yaml", folder.parent / f"{folder.name}.log"
    write_atomically(recipe, dump_yaml(config))
    shown = f"{folder.parent.name}/{folder.name}"
    say(f"{shown}: begins, log in {log}")
    started = time.monotonic()
    code = _follow(own_command(["run", "--recipe", str(recipe), "--out", str(folder)]), log, stopping, threads)
    if code == 0:
        say(f"{shown}: finished after {time.monotonic() - started:.0f} s")
        return
    if stopping.is_set() or code in EXIT_CODES.values():
        raise StoppedError(f"{folder} was stopped (exit code {code}); the same command goes on with it", exit_code=75)
    said = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    kind = UserError if code == 2 else DistillError
    ended = "was killed" if code is None else f"failed with exit code {code}"
    raise kind(f"the run {folder} {ended}; the last lines of {log}: {said}")


def _follow(command: list[str], log: Path, stopping: threading.Event, threads: int) -> int | None:
    """The command's exit code; None where its keeper was killed."""
    exit_file = log.with_suffix(".exit")
    exit_file.unlink(missing_ok=True)
    attempt = Attempt(uuid.uuid4().hex, exit_file, log)
    attempt.start(
        command, cwd=Path.cwd(), environment=os.environ | {"OMP_NUM_THREADS": str(threads)}, grace=_GRACE_SECONDS
    )
    try:
        attempt.go()
        is_asked = False
        while not attempt.has_ended():
            if stopping.wait(_POLL_SECONDS) and not is_asked:
                attempt.ask_to_stop()
                is_asked = True
            if is_asked:
                time.sleep(_POLL_SECONDS)
        return attempt.code
    finally:
        attempt.abandon()
        exit_file.unlink(missing_ok=True)
