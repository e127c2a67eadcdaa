"""A worker: makes the jobs that come due, runs them, and takes up what other workers left behind.

It looks again and again at the queue. Whatever it does there is one transaction, and whatever it starts ends with it
(``pipelines.keeper``), so it may be killed at any moment: the next worker finds a job whose lease is over and whose
processes are gone, and gives the same command again, which resumes the run.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill import interrupt
from distill.errors import DistillError, UserError
from distill.interrupt import deferred_signals
from distill.progress import say
from pipelines.attempt import Attempt, Identity, end_leftovers
from pipelines.claims import Claim, Claims
from pipelines.preparation import distill_run, prepare
from pipelines.queue import Job, Queue
from pipelines.schedule import Schedules
from pipelines.verdict import ACTIVE, Asked

POLL_SECONDS = 0.5
LEASE_SECONDS = 60.0
BEATS = 4
"""Heartbeats in the time of a lease."""

_GPU = re.compile(r"0|[1-9][0-9]{0,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,100}")
"""What CUDA_VISIBLE_DEVICES takes for one of them."""
_UNCOUNTED = ("/dev/dxg", "/dev/kfd")
"""Drivers, Windows' and AMD's, that show one file for all GPUs."""

Command = Callable[[Path], Sequence[str]]
"""From the folder of a prepared job to the command that does it."""


@dataclass(slots=True)
class _Running:
    """A claim with its processes."""

    claim: Claim
    attempt: Attempt
    began: float
    next_beat: float
    asked: Asked | None = None
    is_lost: bool = False


def slots_here(gpus: Sequence[str] | None, num: int | None) -> tuple[tuple[str, ...], bool]:
    """This machine's slots and whether they are GPUs: those named, or all there are; without any, ``num`` slots.

    Raises UserError for names that are none, and for ``num`` where there are GPUs: jobs would not be told which.
    """
    if gpus is not None and num is not None:
        raise UserError("--slots is for a machine without GPUs, and --gpus names some; give one of them")
    found = _visible_gpus() if gpus is None else _named(gpus)
    if found and num is not None:
        raise UserError(
            f"--slots is for a machine without GPUs, and this one has {','.join(found)}; leave it out, or hide them "
            "with CUDA_VISIBLE_DEVICES=''"
        )
    if found:
        return found, True
    return tuple(str(number) for number in range(1 if num is None else num)), False


def _named(gpus: Sequence[str]) -> tuple[str, ...]:
    """Those of --gpus, each of which has to be here: a job on one that is not would run on the CPU, and not say so."""
    found = _checked(gpus, "--gpus", "0,1")
    num = _num_gpus()
    if not num and any(Path(driver).exists() for driver in _UNCOUNTED):
        return found
    if not num:
        raise UserError(
            f"--gpus {','.join(found)!r} names GPUs, and this machine has none (no /dev/nvidia0); leave it "
            "out: --slots is how many jobs run at a time without GPUs"
        )
    if beyond := [name for name in found if name.isdigit() and int(name) >= num]:
        raise UserError(
            f"--gpus {','.join(found)!r}: there is no GPU {beyond[0]} here; they are numbered from 0 to {num - 1}"
        )
    return found


def _visible_gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(number) for number in range(_num_gpus()))
    # How one hides all of them from CUDA.
    if visible.strip() in ("", "-1"):
        return ()
    return _checked(visible.split(","), "CUDA_VISIBLE_DEVICES", "0,1, or '' for none")


def _num_gpus() -> int:
    nodes = [entry.name.removeprefix("nvidia") for entry in Path("/dev").glob("nvidia*")]
    return sum(number.isdigit() for number in nodes)


def _checked(names: Sequence[str], source: str, example: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in names)
    if not all(_GPU.fullmatch(name) for name in found) or len(set(found)) < len(found):
        raise UserError(
            f"{source} {','.join(names)!r} names no GPU, or one twice; write {source} {example}: numbers, or names "
            "that nvidia-smi -L shows, such as GPU-8932f937"
        )
    return found


def exit_code(jobs: Sequence[Job]) -> int:
    """What ``--once`` ends with: 0 where all is done, 75 where something can go on, 1 where something failed."""
    states = {job.state for job in jobs}
    if states & set(ACTIVE):
        return 75
    return 1 if "failed" in states else 0


class Worker:
    """One process that works on a queue. ``command`` is what a job's command is; tests bring one of their own."""

    def __init__(
        self,
        queue: Queue,
        *,
        slots: Sequence[str] = ("0",),
        on_gpu: bool = False,
        command: Command = distill_run,
        poll_seconds: float = POLL_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.queue, self.claims, self.schedules, self.clock = queue, Claims(queue), Schedules(queue), queue.clock
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._slots, self._on_gpu, self._command = tuple(slots), on_gpu, command
        self._poll_seconds, self._lease_seconds = poll_seconds, lease_seconds
        self._running: list[_Running] = []
        # By number, those that were in hand, and those that are too large to be.
        self._seen: set[int] = set()
        self._too_large: set[int] = set()

    def work(self, *, once: bool = False) -> list[Job]:
        """Work until a signal asks to stop; with ``once``, until nothing is left that can run now.

        The jobs it had in hand, lost ones too, and those that are too large for its slots, as they stand. Jobs that run
        when it is asked to stop write a checkpoint and are marked interrupted; a second Ctrl-C kills them instead.
        Whichever way it ends, none of their processes is left.
        """
        with deferred_signals():
            try:
                while interrupt.received() is None:
                    self._look()
                    if once and not self._running:
                        break
                    self.clock.wait(self._poll_seconds)
                self._stop()
            except KeyboardInterrupt:
                # No third Ctrl-C: what is left to do is short, and is what the second one asks for.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                self._end(kill=True)
                raise
            except BaseException:
                self._end(kill=False)
                raise
        return [self.queue.job(job) for job in sorted(self._seen | self._too_large)]

    def _look(self) -> None:
        """One look at the queue."""
        for job in self.schedules.consider():
            say(f"job {job.id} ({job.name}) came due")
        self._take_over()
        self._attend()
        while (claim := self.claims.take(self.name, self._slots, self._lease_seconds)) is not None:
            self._begin(claim)
        self._say_what_is_too_large()

    def _say_what_is_too_large(self) -> None:
        for job in self.claims.too_large(len(self._slots)):
            if job.id not in self._too_large:
                self._too_large.add(job.id)
                need = job.spec.settings.gpu_slots
                say(f"job {job.id} ({job.name}) waits for another worker: gpu_slots is {need}, here {len(self._slots)}")

    def _begin(self, claim: Claim) -> None:
        attempt = Attempt(claim.token, self.claims.exit_file(claim), self.queue.log_file(claim.job.id, claim.number))
        try:
            process = self._start(claim, attempt)
        except (DistillError, OSError) as error:
            self._refuse(claim, error, attempt.log)
            return
        now = self.clock.passed()
        self._running.append(_Running(claim, attempt, now, now + self._lease_seconds / BEATS))
        if self.claims.register(claim, process):
            attempt.go()
            say(f"job {claim.job.id} ({claim.job.name}): attempt {claim.number} began, log in {attempt.log}")
        else:
            # It took so long that another worker has the job by now. Without `go`, nothing has begun.
            attempt.abandon()
            self._running[-1].is_lost = True

    def _start(self, claim: Claim, attempt: Attempt) -> Identity:
        job, folder = claim.job, self.queue.job_folder(claim.job.id)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(self.queue, job, last=None if job.schedule is None else self.schedules.last_done(job.schedule))
        return attempt.start(
            self._command(folder),
            cwd=job.spec.cwd,
            environment={**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(claim.slots)} if self._on_gpu else {})},
            grace=job.spec.settings.termination_grace_period_seconds,
        )

    def _refuse(self, claim: Claim, error: DistillError | OSError, log: Path) -> None:
        """Settle a claim that could not even begin."""
        why = f"job {claim.job.id} ({claim.job.name}) could not be started: {error}"
        say(why)
        # The disk may be what is wrong.
        with suppress(OSError):
            log.write_text(f"distill: {why}\n", encoding="utf-8")
        code = error.exit_code if isinstance(error, UserError) else 1
        self._note_own(claim.job, self.claims.settle(claim, code=code, asked=None, seconds=0.0))

    def _attend(self) -> None:
        """Look after the jobs in hand."""
        for running in list(self._running):
            if running.attempt.has_ended():
                self._settle(running)
                continue
            now = self.clock.passed()
            if now >= running.next_beat:
                running.next_beat = now + self._lease_seconds / BEATS
                if not running.is_lost and not self.claims.beat(running.claim, self._lease_seconds):
                    running.is_lost = True
                    running.attempt.kill()
            if running.asked is None and (asked := self._reason_to_end(running, now)) is not None:
                running.asked = asked
                running.attempt.ask_to_stop()

    def _reason_to_end(self, running: _Running, now: float) -> Asked | None:
        limit = running.claim.job.spec.settings.active_deadline_seconds
        if limit is not None and running.claim.job.seconds + now - running.began > limit:
            return "time_limit"
        return self.claims.stop_wanted(running.claim.job.id)

    def _settle(self, running: _Running) -> None:
        self._running.remove(running)
        seconds = self.clock.passed() - running.began
        settled = None
        if not running.is_lost:
            code, keeper = running.attempt.code, running.attempt.keeper_code
            settled = self.claims.settle(running.claim, code=code, asked=running.asked, seconds=seconds, keeper=keeper)
        self._note_own(running.claim.job, settled)

    def _note_own(self, job: Job, settled: Job | None) -> None:
        """A job that this worker had in hand; what was not settled here is somebody else's by now."""
        self._seen.add(job.id)
        if settled is None:
            say(f"job {job.id} ({job.name}): another worker has taken it over")
        self._note(settled)

    def _note(self, job: Job | None) -> None:
        if job is not None:
            self._seen.add(job.id)
            say(f"job {job.id} ({job.name}): {job.state}" + (f", {job.reason}" if job.reason else ""))

    def _take_over(self) -> None:
        """Mark what other workers lost. A job of which a process is alive is not lost, whatever its lease says."""
        own = {running.claim.token for running in self._running}
        for claim in self.claims.lapsed():
            if claim.token in own or (claim.process is not None and claim.process.is_alive):
                continue
            if end_leftovers(claim.token):
                self._note(self.claims.settle_lapsed(claim))

    def _stop(self) -> None:
        """Have all jobs in hand stop with a checkpoint, and wait for it."""
        for running in self._running:
            if running.asked is None:
                running.asked = "stop"
                running.attempt.ask_to_stop()
                say(f"job {running.claim.job.id}: asked to stop with a checkpoint")
        while self._running:
            self._attend()
            self.clock.wait(self._poll_seconds / 5)

    def _end(self, *, kill: bool) -> None:
        """End all jobs in hand without the queue, which may be what has failed; it is told afterwards."""
        for running in self._running:
            running.asked = running.asked or "stop"
            if kill:
                running.attempt.kill()
            else:
                running.attempt.ask_to_stop()
        while any(not running.attempt.has_ended() for running in self._running):
            time.sleep(self._poll_seconds / 5)
        for running in list(self._running):
            self._settle(running)
