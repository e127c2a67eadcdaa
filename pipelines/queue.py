"""The queue: jobs, the attempts at them and the schedules that make them, in one SQLite file.

    FOLDER/queue.db      write-ahead logged; one writer at a time, and every change is one transaction
    FOLDER/jobs/N/       what job N runs with: recipes, a copy of its prompts, a log of each attempt

The queue is one machine's, shared by all of its workers; write-ahead logging wants a local disk. A job is taken, kept
and settled here: two workers cannot take one job, because taking it is a transaction that finds it free.
Left out on purpose: deleting jobs, and priorities; a job is taken in the order in which it came.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.errors import DistillError, UserError
from pipelines.attempt import Identity, boot_id, read_code
from pipelines.clock import Clock, SystemClock, iso
from pipelines.job import JobSpec
from pipelines.verdict import ACTIVE, WAITING, Asked, State, judge

VARIABLE = "DISTILL_QUEUE"

_VERSION = 1
_BUSY_SECONDS = 60.0

_SCHEMA = """
CREATE TABLE schedules (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, paused INTEGER NOT NULL, considered INTEGER NOT NULL, next_due INTEGER,
    created REAL NOT NULL
);
CREATE TABLE missed (
    schedule TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, num INTEGER, reason TEXT NOT NULL
);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, schedule TEXT, due INTEGER, state TEXT NOT NULL,
    spec TEXT NOT NULL, data TEXT, not_before REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
    stops INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL,
    finished REAL, exit_code INTEGER, reason TEXT, stop TEXT, UNIQUE (schedule, due)
);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE attempts (
    job INTEGER NOT NULL REFERENCES jobs, number INTEGER NOT NULL, token TEXT NOT NULL, worker TEXT NOT NULL,
    slots TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER, ticks INTEGER, lease REAL NOT NULL, began REAL NOT NULL,
    beat REAL NOT NULL, started REAL NOT NULL, finished REAL, state TEXT, exit_code INTEGER, reason TEXT,
    PRIMARY KEY (job, number)
);
CREATE INDEX attempts_under_way ON attempts (job) WHERE finished IS NULL;
"""


def default_folder() -> Path:
    """The folder that DISTILL_QUEUE names, else ``strong-to-weak/queue`` under the user's state."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG rules say that a relative path is to be ignored.
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "strong-to-weak" / "queue"


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the queue has it. ``due`` is None for one that somebody asked for."""

    id: int
    name: str
    schedule: str | None
    due: int | None
    state: State
    spec: JobSpec
    data: dict[str, int] | None
    not_before: float
    failures: int
    stops: int
    seconds: float
    created: float
    started: float | None
    finished: float | None
    exit_code: int | None
    reason: str | None
    stop: Asked | None

    @property
    def out(self) -> Path:
        """The folder of its run, or of its runs' folders."""
        stamp = (iso(self.created if self.due is None else self.due) or "").replace("-", "").replace(":", "")
        return self.spec.out / f"{stamp}-{self.id}"

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "schedule": self.schedule,
            "due": iso(self.due),
            "state": self.state,
            "reason": self.reason,
            "exit_code": self.exit_code,
            "failures": self.failures,
            "seconds": round(self.seconds, 3),
            "created": iso(self.created),
            "not_before": iso(self.not_before),
            "started": iso(self.started),
            "finished": iso(self.finished),
            "gpu_slots": self.spec.settings.gpu_slots,
            "runs": [str(self.out / run.folder) for run in self.spec.runs],
        }


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


class Queue:
    """The queue in a folder, made if need be. Raises UserError where the folder cannot be one."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self.folder = folder
        self.clock: Clock = SystemClock() if clock is None else clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"the queue's folder {folder} cannot be had: {error.strerror}; name another with --queue or {VARIABLE}"
            ) from None
        with lock:
            # Turning the log on wants the file for oneself, and does not wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._connection = self._open(folder / "queue.db")

    def _open(self, file: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            # What a transaction has changed outlives the machine's power too.
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise UserError(f"{file} cannot be used as a queue: {error}; name another folder with --queue") from None
        if version not in (0, _VERSION):
            raise UserError(
                f"{file} is a queue of another version ({version}, this is {_VERSION}); name another folder"
            )
        return connection

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it, with nobody between. Raises DistillError where the disk refuses."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise DistillError(
                f"{self.folder / 'queue.db'} could not be changed: {error}; nothing was. Make room, or mend the folder"
            ) from error

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """What a query finds."""
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            raise DistillError(f"{self.folder / 'queue.db'} could not be read: {error}") from error

    def job_folder(self, job: int) -> Path:
        return self.folder / "jobs" / str(job)

    def exit_file(self, claim: Claim) -> Path:
        return self.job_folder(claim.job.id) / f"attempt-{claim.number}.exit"

    def log_file(self, job: int, number: int) -> Path:
        return self.job_folder(job) / f"attempt-{number}.log"

    # --- what users do

    def add(self, spec: JobSpec, *, schedule: str | None = None) -> Job:
        """Put a job at the end."""
        with self.transaction() as connection:
            return self.job(insert_job(connection, spec, self.clock.now(), schedule=schedule))

    def job(self, id_: int) -> Job:
        """Raises UserError where there is none."""
        rows = self.rows("SELECT * FROM jobs WHERE id = ?", id_)
        if not rows:
            raise UserError(f"there is no job {id_}; distill queue list shows what there is")
        return _job(rows[0])

    def jobs(self, *, states: Sequence[State] = (), schedule: str | None = None, last: int | None = None) -> list[Job]:
        """Jobs in the order in which they came; the ``last`` ones of those in any of ``states`` and of ``schedule``."""
        marks = ", ".join("?" * len(states)) or "state"
        rows = self.rows(
            f"SELECT * FROM jobs WHERE state IN ({marks}) AND (? IS NULL OR schedule = ?) ORDER BY id DESC LIMIT ?",
            *(*states, schedule, schedule, -1 if last is None else last),
        )
        return [_job(row) for row in reversed(rows)]

    def attempts(self, job: int) -> list[dict[str, Any]]:
        """What was tried for a job, as documents."""
        rows = self.rows("SELECT * FROM attempts WHERE job = ? ORDER BY number", job)
        return [
            {
                "number": row["number"],
                "worker": row["worker"],
                "slots": json.loads(row["slots"]),
                "started": iso(row["started"]),
                "finished": iso(row["finished"]),
                "state": row["state"] or "running",
                "exit_code": row["exit_code"],
                "reason": row["reason"],
                "log": str(self.log_file(job, row["number"])),
            }
            for row in rows
        ]

    def cancel(self, id_: int) -> Job:
        """Take a job out; one that runs is asked to stop with a checkpoint. Raises UserError for a finished one."""
        with self.transaction() as connection:
            job = self.job(id_)
            if job.state not in ACTIVE:
                raise UserError(f"job {id_} is {job.state}; there is nothing to cancel")
            ask_to_end(connection, job, "cancel", self.clock.now(), "cancelled before it ran")
            return self.job(id_)

    def retry(self, id_: int) -> Job:
        """Have a job run again from where it stands, with all its retries. Raises UserError where it needs none."""
        with self.transaction() as connection:
            job = self.job(id_)
            if job.state in ACTIVE or job.state == "done":
                raise UserError(f"job {id_} is {job.state}; a job that failed or was left out is what can be retried")
            connection.execute(
                "UPDATE jobs SET state = 'queued', not_before = ?, failures = 0, stops = 0, seconds = 0, stop = NULL, "
                "finished = NULL, exit_code = NULL, reason = NULL, started = NULL WHERE id = ?",
                (self.clock.now(), id_),
            )
            return self.job(id_)

    # --- what workers do

    def claim(self, worker: str, slots: Sequence[str], lease_seconds: float) -> Claim | None:
        """Take the next job that may run and that the free ones of ``slots`` suffice for.

        Nothing overtakes a job for want of slots, so a large one is not starved by small ones; one that ``slots`` as a
        whole are too few for is left for another worker.
        """
        now, passed = self.clock.now(), self.clock.passed()
        if not self.jobs(states=WAITING, last=1):
            return None
        with self.transaction() as connection:
            busy = {
                slot
                for row in connection.execute("SELECT slots FROM attempts WHERE finished IS NULL")
                for slot in json.loads(row["slots"])
            }
            free = [slot for slot in slots if slot not in busy]
            for job in self.jobs(states=WAITING):
                settings = job.spec.settings
                deadline = settings.starting_deadline_seconds
                if job.due is not None and job.started is None and deadline and now > job.due + deadline:
                    reason = f"it had not started {deadline} s after it came due (starting_deadline_seconds)"
                    finish(connection, job.id, "missed", now, reason)
                elif _waits(connection, job, now) or settings.gpu_slots > len(slots):
                    continue
                elif settings.gpu_slots > len(free):
                    return None
                else:
                    held = tuple(free[: settings.gpu_slots])
                    claim = Claim(job, 0, uuid.uuid4().hex, held, worker, passed, passed + lease_seconds, None)
                    return self._take(connection, claim)
        return None

    def _take(self, connection: sqlite3.Connection, claim: Claim) -> Claim:
        now, job = self.clock.now(), claim.job.id
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
        return replace(claim, job=self.job(job), number=number)

    def register(self, claim: Claim, process: Identity) -> bool:
        """Write down who works on a claim; False where the claim is somebody else's by now."""
        with self.transaction() as connection:
            changed = connection.execute(
                "UPDATE attempts SET pid = ?, ticks = ? WHERE job = ? AND number = ? AND finished IS NULL",
                (process.pid, process.ticks, claim.job.id, claim.number),
            )
            return changed.rowcount == 1

    def beat(self, claim: Claim, lease_seconds: float) -> bool:
        """Renew a lease; False where the claim is somebody else's by now."""
        passed = self.clock.passed()
        with self.transaction() as connection:
            changed = connection.execute(
                "UPDATE attempts SET lease = ?, beat = ? WHERE job = ? AND number = ? AND finished IS NULL",
                (passed + lease_seconds, passed, claim.job.id, claim.number),
            )
            return changed.rowcount == 1

    def stop_wanted(self, job: int) -> Asked | None:
        """Why a running job should end, if somebody asked for it."""
        stop: Asked | None = self.rows("SELECT stop FROM jobs WHERE id = ?", job)[0]["stop"]
        return stop

    def lapsed(self) -> list[Claim]:
        """Claims whose lease is over, or is of an earlier boot: their worker is gone, or stands still."""
        rows = self.rows(
            "SELECT * FROM attempts WHERE finished IS NULL AND (lease < ? OR boot != ?)",
            *(self.clock.passed(), boot_id()),
        )
        return [
            Claim(
                self.job(row["job"]),
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
        self, claim: Claim, *, code: int | None, asked: Asked | None, seconds: float | None = None
    ) -> Job | None:
        """An attempt has ended: what becomes of the job. None where somebody else has settled it.

        ``seconds`` is how long it worked; None takes the time to its last heartbeat.
        """
        now = self.clock.now()
        with self.transaction() as connection:
            row = connection.execute(
                "SELECT beat - began AS seconds FROM attempts WHERE job = ? AND number = ? AND finished IS NULL "
                "AND (? IS NOT NULL OR lease <= ?)",
                # Who finds a claim lapsed must find it so still.
                (claim.job.id, claim.number, seconds, claim.lease),
            ).fetchone()
            if row is None:
                return None
            job = self.job(claim.job.id)
            verdict = judge(
                code,
                asked=job.stop or asked,
                failures=job.failures,
                stops=job.stops,
                settings=job.spec.settings,
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
            return self.job(job.id)

    def settle_lapsed(self, claim: Claim) -> Job | None:
        """``settle`` for a claim whose worker is gone, with the exit code that the keeper may have left.

        The keeper asks a job to stop when its worker is gone, so a stop or a signal is no failure of the job's.
        """
        return self.settle(claim, code=read_code(self.exit_file(claim)), asked="stop")


def insert_job(
    connection: sqlite3.Connection,
    spec: JobSpec,
    now: float,
    *,
    schedule: str | None = None,
    due: int | None = None,
    data: dict[str, int] | None = None,
) -> int:
    """A new job's id."""
    inserted = connection.execute(
        "INSERT INTO jobs (name, schedule, due, state, spec, data, not_before, created) "
        "VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
        (spec.name, schedule, due, spec.to_text(), None if data is None else json.dumps(data), now, now),
    )
    assert inserted.lastrowid is not None
    return inserted.lastrowid


def finish(connection: sqlite3.Connection, job: int, state: State, now: float, reason: str) -> None:
    """End a job that does not run."""
    connection.execute(
        "UPDATE jobs SET state = ?, reason = ?, finished = ? WHERE id = ?",
        (state, reason, now, job),
    )


def ask_to_end(connection: sqlite3.Connection, job: Job, asked: Asked, now: float, reason: str) -> None:
    """End an active job: at once where it does not run, else by its worker."""
    if job.state == "running":
        connection.execute("UPDATE jobs SET stop = ? WHERE id = ?", (asked, job.id))
    else:
        finish(connection, job.id, "replaced" if asked == "replace" else "cancelled", now, reason)


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


def _job(row: sqlite3.Row) -> Job:
    fields = {key: row[key] for key in row.keys()}  # noqa: SIM118
    data = fields.pop("data")
    return Job(
        **{**fields, "spec": JobSpec.from_text(fields["spec"]), "data": None if data is None else json.loads(data)}
    )
