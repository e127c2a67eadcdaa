"""The queue: jobs, in the order in which they came, and what was tried for each.

    FOLDER/queue.db      jobs, attempts and schedules
    FOLDER/jobs/N/       what job N runs with: recipes, a copy of its prompts, a log of each attempt

Left out on purpose: deleting jobs, and priorities.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from pipelines.clock import iso
from pipelines.database import Database
from pipelines.job import JobSpec
from pipelines.verdict import ACTIVE, Asked, State


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


class Queue(Database):
    """The jobs of a folder, as their users see them; workers take them with ``pipelines.claims``."""

    def job_folder(self, job: int) -> Path:
        return self.folder / "jobs" / str(job)

    def log_file(self, job: int, number: int) -> Path:
        return self.job_folder(job) / f"attempt-{number}.log"

    def add(self, spec: JobSpec) -> Job:
        """Put a job at the end."""
        with self.transaction() as connection:
            return self.job(insert_job(connection, spec, self.clock.now()))

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
        """Have a job run again from where it stands, with all its retries. Raises UserError where it needs none, and
        where one of its schedule is not finished and the policy forbids a second."""
        with self.transaction() as connection:
            job = self.job(id_)
            if job.state in ACTIVE or job.state == "done":
                raise UserError(f"job {id_} is {job.state}; a job that failed or was left out is what can be retried")
            if job.schedule is not None and job.spec.settings.concurrency_policy == "forbid":
                for active in self.jobs(states=ACTIVE, schedule=job.schedule, last=1):
                    raise UserError(
                        f"job {active.id} of {job.schedule} is {active.state}, and its concurrency_policy is forbid; "
                        f"wait for it, or distill queue cancel {active.id}"
                    )
            connection.execute(
                "UPDATE jobs SET state = 'queued', not_before = ?, failures = 0, stops = 0, seconds = 0, stop = NULL, "
                "finished = NULL, exit_code = NULL, reason = NULL WHERE id = ?",
                (self.clock.now(), id_),
            )
            return self.job(id_)


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


def _job(row: sqlite3.Row) -> Job:
    fields = {key: row[key] for key in row.keys()}  # noqa: SIM118
    data = fields.pop("data")
    return Job(
        **{**fields, "spec": JobSpec.from_text(fields["spec"]), "data": None if data is None else json.loads(data)}
    )
