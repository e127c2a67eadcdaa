"""Claims: jobs in the hands of workers. Here they are taken, kept and settled.

Two workers cannot take one job, because taking it is a transaction that finds it free; and who comes late to register,
renew or settle a claim finds that it is somebody else's by now.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.attempt import Identity, boot_id, read_code
from pipelines.queue import Job, Queue, finish
from pipelines.verdict import ACTIVE, WAITING, Asked, judge


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in the hands of a worker: attempt ``number`` at it, with these slots of the machine, until ``lease``."""

    job: Job
    number: int
    token: str
    slots: tuple[str, ...]
    worker: str
    began: float
    lease: float
    process: Identity | None


class Claims:
    """The claims on a queue's jobs."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def exit_file(self, claim: Claim) -> Path:
        """Where the keeper of a claim leaves its exit code."""
        return self.queue.job_folder(claim.job.id) / f"attempt-{claim.number}.exit"

    def take(self, worker: str, slots: Sequence[str], lease_seconds: float) -> Claim | None:
        """Take the next job that may run and that the free ones of ``slots`` suffice for.

        Nothing overtakes a job for want of slots, so a large one is not starved by small ones; one that ``slots`` as a
        whole are too few for is left for another worker (``too_large``).
        """
        now, passed = self.queue.clock.now(), self.queue.clock.passed()
        if not self.queue.jobs(states=WAITING, last=1):
            return None
        with self.queue.transaction() as connection:
            busy = {
                slot
                for row in connection.execute("SELECT slots FROM attempts WHERE finished IS NULL")
                for slot in json.loads(row["slots"])
            }
            free = [slot for slot in slots if slot not in busy]
            for job in self.queue.jobs(states=WAITING):
                settings = job.spec.settings
                deadline = settings.starting_deadline_seconds
                # A retry moves not_before: somebody wants the job however late it is.
                is_fresh = job.started is None and job.not_before == job.created
                if job.due is not None and is_fresh and deadline and now > job.due + deadline:
                    reason = f"it had not started {deadline} s after it came due (starting_deadline_seconds)"
                    finish(connection, job.id, "missed", now, reason)
                elif _waits(connection, job, now) or settings.gpu_slots > len(slots):
                    continue
                elif settings.gpu_slots > len(free):
                    return None
                else:
                    held = tuple(free[: settings.gpu_slots])
                    claim = Claim(job, 0, uuid.uuid4().hex, held, worker, passed, passed + lease_seconds, None)
                    return self._write(connection, claim)
        return None

    def too_large(self, num_slots: int) -> list[Job]:
        """Jobs that wait for a worker with more slots than that."""
        return [job for job in self.queue.jobs(states=WAITING) if job.spec.settings.gpu_slots > num_slots]

    def _write(self, connection: sqlite3.Connection, claim: Claim) -> Claim:
        now, job = self.queue.clock.now(), claim.job.id
        (number,) = connection.execute(
            "SELECT coalesce(max(number), 0) + 1 FROM attempts WHERE job = ?", (job,)
        ).fetchone()
        connection.execute(
            "INSERT INTO attempts (job, number, token, worker, slots, boot, lease, began, beat, started) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(job, number, claim.token, claim.worker, json.dumps(claim.slots), boot_id()),
                *(claim.lease, claim.began, claim.began, now),
            ),
        )
        connection.execute(
            "UPDATE jobs SET state = 'running', reason = NULL, started = coalesce(started, ?) WHERE id = ?", (now, job)
        )
        return replace(claim, job=self.queue.job(job), number=number)

    def register(self, claim: Claim, process: Identity) -> bool:
        """Write down who works on a claim; False where the claim is somebody else's by now."""
        with self.queue.transaction() as connection:
            changed = connection.execute(
                "UPDATE attempts SET pid = ?, ticks = ? WHERE job = ? AND number = ? AND finished IS NULL",
                (process.pid, process.ticks, claim.job.id, claim.number),
            )
            return changed.rowcount == 1

    def beat(self, claim: Claim, lease_seconds: float) -> bool:
        """Renew a lease; False where the claim is somebody else's by now."""
        passed = self.queue.clock.passed()
        with self.queue.transaction() as connection:
            changed = connection.execute(
                "UPDATE attempts SET lease = ?, beat = ? WHERE job = ? AND number = ? AND finished IS NULL",
                (passed + lease_seconds, passed, claim.job.id, claim.number),
            )
            return changed.rowcount == 1

    def stop_wanted(self, job: int) -> Asked | None:
        """Why a running job should end, if somebody asked for it."""
        stop: Asked | None = self.queue.rows("SELECT stop FROM jobs WHERE id = ?", job)[0]["stop"]
        return stop

    def lapsed(self) -> list[Claim]:
        """Claims whose lease is over, or is of an earlier boot: their worker is gone, or stands still."""
        rows = self.queue.rows(
            "SELECT * FROM attempts WHERE finished IS NULL AND (lease < ? OR boot != ?)",
            *(self.queue.clock.passed(), boot_id()),
        )
        return [
            Claim(
                self.queue.job(row["job"]),
                row["number"],
                row["token"],
                tuple(json.loads(row["slots"])),
                row["worker"],
                row["began"],
                row["lease"],
                None if row["pid"] is None else Identity(row["boot"], row["pid"], row["ticks"]),
            )
            for row in rows
        ]

    def settle(
        self,
        claim: Claim,
        *,
        code: int | None,
        asked: Asked | None,
        seconds: float | None = None,
        keeper: int | None = None,
    ) -> Job | None:
        """An attempt has ended: what becomes of the job. None where somebody else has settled it.

        ``seconds`` is how long it worked; None takes the time to its last heartbeat. ``keeper`` is the keeper's own
        exit code where it is known.
        """
        now = self.queue.clock.now()
        with self.queue.transaction() as connection:
            row = connection.execute(
                "SELECT beat - began AS seconds FROM attempts WHERE job = ? AND number = ? AND finished IS NULL "
                "AND (? IS NOT NULL OR lease <= ?)",
                # Who finds a claim lapsed must find it so still.
                (claim.job.id, claim.number, seconds, claim.lease),
            ).fetchone()
            if row is None:
                return None
            job = self.queue.job(claim.job.id)
            verdict = judge(
                code,
                asked=job.stop or asked,
                failures=job.failures,
                stops=job.stops,
                settings=job.spec.settings,
                keeper=keeper,
            )
            connection.execute(
                "UPDATE attempts SET finished = ?, state = ?, exit_code = ?, reason = ? WHERE job = ? AND number = ?",
                (now, verdict.state, code, verdict.reason, job.id, claim.number),
            )
            connection.execute(
                "UPDATE jobs SET state = ?, reason = ?, exit_code = ?, not_before = ?, finished = ?, "
                "seconds = seconds + ?, failures = failures + ?, stops = stops + ? WHERE id = ?",
                (
                    *(verdict.state, verdict.reason, code, now + verdict.delay),
                    None if verdict.state in ACTIVE else now,
                    row["seconds"] if seconds is None else seconds,
                    verdict.is_failure,
                    verdict.state == "waiting" and not verdict.is_failure,
                    job.id,
                ),
            )
            return self.queue.job(job.id)

    def settle_lapsed(self, claim: Claim) -> Job | None:
        """``settle`` for a claim whose worker is gone, with the exit code that the keeper may have left.

        The keeper asks a job to stop when its worker is gone, so a stop or a signal is no failure of the job's.
        """
        return self.settle(claim, code=read_code(self.exit_file(claim)), asked="stop")


def _waits(connection: sqlite3.Connection, job: Job, now: float) -> bool:
    """Whether the job's wait before a retry is not over, or it replaces one of its schedule that is about to stop."""
    settings = job.spec.settings
    # A wait that is longer than any is one that a clock which was set back has made.
    if job.state == "waiting" and now < job.not_before <= now + settings.backoff_cap_seconds:
        return True
    if job.schedule is None or job.spec.settings.concurrency_policy != "replace":
        return False
    query = "SELECT 1 FROM jobs WHERE schedule = ? AND state = 'running' LIMIT 1"
    return connection.execute(query, (job.schedule,)).fetchone() is not None
