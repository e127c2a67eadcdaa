"""From one command to the processes of a run: how many, how they hold the student, and how they end together.

``distill run --processes N`` starts N copies of itself and waits. A signal that reaches it goes on to all of them; they
stop at the same place, and the main one writes the checkpoint. When one fails, the others learn of it where they meet
or lose the connection; who has not ended ``GRACE_SECONDS`` later is ended. Under torchrun, srun or Kubernetes the
processes are there already, and each just joins. Where nothing but machines is there, each of them starts its own
(``Machines``), and the exit code says how they ended, which torchrun's does not.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

import torch

from distill.config import RunConfig
from distill.errors import UserError
from distill.family import Shape
from distill.interrupt import EXIT_CODES
from distill.memory import hold_student
from distill.progress import say
from students.parallel import Engine
from students.ranks import Ranks, place_in

GRACE_SECONDS = 20.0
"""What a process whose peer has failed gets to end by itself."""

POLL_SECONDS = 0.1

CLEAN_STOPS = (0, *EXIT_CODES.values())


@dataclass(frozen=True, slots=True)
class Machines:
    """``count`` machines with equally many processes of one run; this one is number ``number``, and processes of all
    meet at ``host``, which is number 0, and ``port``."""

    count: int
    number: int
    host: str
    port: int = 29500

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise UserError(f"--node-rank is {self.number}, and of {self.count} machines the last is {self.count - 1}")


def processes_to_start(
    wanted: int | None, environment: Mapping[str, str] = os.environ, *, num_machines: int = 1
) -> int:
    """How many processes this one should start here; 1 if it is to do the work itself, as one of several or alone.

    Raises UserError for more of them than the environment says that there are, or than there are GPUs.
    """
    place = place_in(environment)
    if place is not None:
        if wanted is not None and wanted * num_machines != place[1]:
            raise UserError(f"--processes is {wanted}, and this is already one of {place[1]} processes; leave it out")
        return 1
    if "RANK" in environment and (wanted or 1) * num_machines > 1:
        asked = f"--processes is {wanted}" if num_machines == 1 else f"--nodes is {num_machines}"
        raise UserError(
            f"{asked}, and by its environment this process is the only one of its run (RANK is {environment['RANK']} "
            f"and WORLD_SIZE is {environment['WORLD_SIZE']}); unset both, or leave the option out"
        )
    if wanted is None:
        # A launcher that started a single process has decided.
        return max(1, torch.cuda.device_count()) if "RANK" not in environment else 1
    if torch.cuda.is_available() and wanted > torch.cuda.device_count():
        raise UserError(f"--processes is {wanted}, and this machine has {torch.cuda.device_count()} GPUs")
    return wanted


def run_processes(command: Sequence[str], count: int, machines: Machines | None = None) -> int:
    """Run ``command`` ``count`` times as one run, or as this one of ``machines``; the code that says how it ended."""
    if machines is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            machines = Machines(1, 0, "127.0.0.1", free.getsockname()[1])
    first = machines.number * count
    environment = {
        **os.environ,
        "WORLD_SIZE": str(machines.count * count),
        "MASTER_ADDR": machines.host,
        "MASTER_PORT": str(machines.port),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes: list[subprocess.Popen[bytes]] = []
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asked, pass_on if asked != signal.SIGHUP else lambda *_: pass_on(signal.SIGTERM, None))
    for number in range(count):
        own = {"RANK": str(first + number), "LOCAL_RANK": str(number)}
        # Sessions of their own: a Ctrl-C in the terminal reaches them through this process, once.
        processes.append(subprocess.Popen(command, env={**environment, **own}, start_new_session=True))
    if passed_on:
        pass_on(passed_on[-1], None)  # to those that were started after it
    try:
        return _wait(processes, passed_on)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def _wait(processes: Sequence[subprocess.Popen[bytes]], passed_on: Sequence[int]) -> int:
    """The exit code of the run: the gravest of its processes'.

    ``passed_on`` grows by the signals that they are sent. A process that was still being loaded is ended by one without
    having heard it; it had begun nothing.
    """
    deadline: float | None = None
    while any(process.poll() is None for process in processes):
        failed = [number for number, process in enumerate(processes) if process.poll() not in (None, *CLEAN_STOPS)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    codes = [process.poll() for process in processes]
    if passed_on and all(code is None or code in CLEAN_STOPS or -code in passed_on for code in codes):
        asked = signal.SIGINT if signal.SIGINT in passed_on else signal.SIGTERM
        return EXIT_CODES[asked] if any(code != 0 for code in codes) else 0
    killed = [(number, -code) for number, code in enumerate(codes) if code is not None and code < 0]
    for number, by in killed:
        why = "; the machine may have run out of memory" if by == signal.SIGKILL else ""
        say(f"distill: process {number} was ended by {signal.Signals(by).name}{why}")
    # Killed ones, ones that had to be killed, and codes that mean nothing here (120, say, of an output that was lost).
    has_failed = any(code not in (0, 2, *CLEAN_STOPS) for code in codes)
    return next(code for code in (2, 1, 130, 75, 0) if code in codes or (code == 1 and has_failed))


def own_command(arguments: Sequence[str]) -> list[str]:
    """This program again."""
    return [sys.executable, "-m", "distill.cli", *arguments]


def choose_engine(config: RunConfig, student: Shape, ranks: Ranks, teacher: Shape) -> Engine:
    """How the processes hold the student. Raises UserError for settings that no engine has."""
    settings = config.student
    kind = settings.parallel
    on_gpu = ranks.device.type == "cuda"
    if settings.cpu_offload:
        if not on_gpu or ranks.count == 1:
            have = "one process" if on_gpu else "no GPU to offload from"
            raise UserError(f"student.cpu_offload is for students sharded over GPUs, and there is {have}; leave it out")
        kind = "sharded"
    if ranks.count == 1:
        return "alone"
    if kind == "auto" and on_gpu:
        has = torch.cuda.get_device_properties(ranks.device).total_memory
        held = hold_student(config, student, teacher, gpu_bytes=has, processes=ranks.count)
        kind = "replicated" if held.fits and held.engine == "replicated" else "sharded"
    if kind != "sharded":
        return "replicated"
    for key, is_set in (("lora", settings.lora is not None), ("adamw=8bit", settings.adamw == "8bit")):
        if is_set:
            raise UserError(
                f"student.{key} wants a student that every process holds whole, and this one is sharded; set "
                "student.parallel=replicated, or leave it out"
            )
    return "sharded"
