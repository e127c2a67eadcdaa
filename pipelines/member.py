"""A run in a process of its own: ``distill run`` on a configuration, followed to its end.

It stays in the process group of its parent: whatever ends the group ends the run too, and Ctrl-C reaches both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from distill.config import RunConfig
from distill.errors import DistillError, StoppedError, UserError
from distill.journal import write_atomically
from distill.progress import say
from distill.recipe import dump_yaml

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
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(folder)]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    code = _follow(process, stopping)
    if code == 0:
        say(f"{shown}: finished after {time.monotonic() - started:.0f} s")
        return
    if stopping.is_set() or code in (75, 130):
        raise StoppedError(f"{folder} was stopped (exit code {code}); the same command goes on with it", exit_code=75)
    said = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    kind = UserError if code == 2 else DistillError
    raise kind(f"the run {folder} failed with exit code {code}; the last lines of {log}: {said}")


def _follow(process: subprocess.Popen[bytes], stopping: threading.Event) -> int:
    while process.poll() is None:
        if stopping.wait(_POLL_SECONDS):
            process.send_signal(signal.SIGTERM)
            try:
                return process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()
    return process.returncode
