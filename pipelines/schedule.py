"""Schedules: which jobs are made when, and what is recorded of those that are not.

Every due time of a schedule ends as exactly one job or in exactly one record of what was missed, with the reason. A
schedule remembers the last due time that it has considered, so a clock that is set back makes nothing due again.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError
from distill.jobs import ScheduleSettings
from distill.prompt_files import prompt_files
from pipelines.clock import iso
from pipelines.job import JobSpec
from pipelines.queue import Job, Queue, ask_to_end, insert_job
from pipelines.timetable import Timetable, Window
from pipelines.verdict import ACTIVE

ON_TIME_SECONDS = 60.0
"""With ``catch_up: none``, how late a worker may find a due time that nobody has missed."""
FAR_BACK_SECONDS = 86400.0
"""A clock that has gone back by more than this was wrong before: what it made of the time ahead is taken back."""
NUM_UPCOMING = 3


@dataclass(frozen=True, slots=True)
class Schedule:
    """A job that comes due again and again. ``considered`` is the last due time that something was made of."""

    name: str
    spec: JobSpec
    paused: bool
    considered: int
    next_due: int | None
    created: float

    @property
    def timetable(self) -> Timetable:
        settings = self.spec.settings
        assert settings.cron is not None, "a schedule without cron is refused when it is added"
        return Timetable(settings.cron, settings.zone)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "paused": self.paused,
            "next_due": None if self.paused else iso(self.next_due),
            "created": iso(self.created),
            "cwd": str(self.spec.cwd),
            "out": str(self.spec.out),
            "schedule": self.spec.settings.model_dump(mode="json"),
            "runs": [run.folder or run.config["name"] for run in self.spec.runs],
        }


def timetable_of(spec: JobSpec) -> Timetable:
    """When a job comes due. Raises UserError where it does not say."""
    if spec.settings.cron is None:
        raise UserError(
            f"{spec.name} says nothing of when it runs; give --cron '0 2 * * *', or schedule.cron in the file. "
            "distill queue add runs a job once"
        )
    return Timetable(spec.settings.cron, spec.settings.zone)


class Schedules:
    """The schedules of a queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.clock = queue, queue.clock

    def add(self, spec: JobSpec, *, replace: bool = False) -> Schedule:
        """A new schedule, or a new definition of one. Raises UserError where that is not what was said."""
        timetable = timetable_of(spec)
        if replace:
            # What came due before is settled by what it was before.
            self.consider(spec.name)
        with self.queue.transaction() as connection:
            now, known = int(self.clock.now()), self._find(spec.name)
            if known is not None and not replace:
                raise UserError(f"there is a schedule {spec.name} already; give --replace, or another --name")
            # A clock that has been set back makes nothing due again, by another definition either.
            considered = now if known is None else max(now, known.considered)
            connection.execute(
                "INSERT OR REPLACE INTO schedules (name, spec, paused, considered, next_due, created) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    *(spec.name, spec.to_text(), False if known is None else known.paused),
                    *(considered, timetable.next_after(considered), now if known is None else known.created),
                ),
            )
        return self.get(spec.name)

    def get(self, name: str) -> Schedule:
        """Raises UserError where there is none."""
        found = self._find(name)
        if found is None:
            known = ", ".join(one.name for one in self.all()) or "none"
            raise UserError(f"there is no schedule {name}; known: {known}")
        return found

    def _find(self, name: str) -> Schedule | None:
        return next((one for one in self.all() if one.name == name), None)

    def all(self) -> list[Schedule]:
        return [_schedule(row) for row in self.queue.rows("SELECT * FROM schedules ORDER BY name")]

    def missed(self, name: str) -> list[dict[str, Any]]:
        """The due times that no job was made for, as documents: from ``first`` to ``last``, and why."""
        return [
            {"first": iso(row["first"]), "last": iso(row["last"]), "num": row["num"], "reason": row["reason"]}
            for row in self.queue.rows("SELECT * FROM missed WHERE schedule = ? ORDER BY first", name)
        ]

    def upcoming(self, schedule: Schedule) -> list[str | None]:
        """The next due times."""
        if schedule.paused:
            return []
        times = schedule.timetable.after(max(self.clock.now(), schedule.considered))
        return [iso(due) for _, due in zip(range(NUM_UPCOMING), times, strict=False)]

    def pause(self, name: str, *, paused: bool) -> Schedule:
        """Stop or go on making jobs; what comes due while it is paused is missed."""
        # What came due before is settled by what it was before.
        self.consider(name)
        self.get(name)
        with self.queue.transaction() as connection:
            connection.execute("UPDATE schedules SET paused = ? WHERE name = ?", (paused, name))
        return self.get(name)

    def remove(self, name: str) -> list[Job]:
        """Forget a schedule; its jobs, which stay, and may still be about to run."""
        self.get(name)
        with self.queue.transaction() as connection:
            connection.execute("DELETE FROM schedules WHERE name = ?", (name,))
            connection.execute("DELETE FROM missed WHERE schedule = ?", (name,))
        return self.queue.jobs(states=ACTIVE, schedule=name)

    def run_now(self, name: str) -> Job:
        """A job of the schedule at once. Raises UserError where one is not finished and the policy forbids a second."""
        schedule = self.get(name)
        with self.queue.transaction() as connection:
            active = self.queue.jobs(states=ACTIVE, schedule=name)
            policy = schedule.spec.settings.concurrency_policy
            if active and policy == "forbid":
                raise UserError(
                    f"job {active[0].id} of {name} is {active[0].state}, and its concurrency_policy is forbid; wait "
                    f"for it, or distill queue cancel {active[0].id}"
                )
            if policy == "replace":
                self._end(connection, active)
            job = insert_job(connection, schedule.spec, self.clock.now(), schedule=name, data=_sizes(schedule.spec))
        return self.queue.job(job)

    def consider(self, name: str | None = None) -> list[Job]:
        """Make something of every due time that has come: the jobs that were made."""
        now, made = self.clock.now(), []
        for row in self.queue.rows(
            "SELECT * FROM schedules WHERE (next_due <= ? OR considered > ?) AND (? IS NULL OR name = ?)",
            *(now, now + FAR_BACK_SECONDS, name, name),
        ):
            if row["considered"] > now + FAR_BACK_SECONDS:
                self._take_back(_schedule(row), now)
            else:
                made += self._consider(row["name"], now)
        return [self.queue.job(job) for job in made]

    def _consider(self, name: str, now: float) -> list[int]:
        with self.queue.transaction() as connection:
            # Another worker may have considered it since it was read, or somebody removed it.
            schedule = self._find(name)
            window = None if schedule is None else schedule.timetable.window(schedule.considered, now)
            if schedule is None or window is None:
                return []
            connection.execute(
                "UPDATE schedules SET considered = ?, next_due = ? WHERE name = ?",
                (window.last, schedule.timetable.next_after(window.last), name),
            )
            if window.before_last is not None:
                reason = "paused" if schedule.paused else "no worker looked; a later one is the latest (catch_up)"
                earlier = None if window.num is None else window.num - 1
                _record(connection, name, Window(window.first, window.before_last, None, earlier), reason)
            if _is_known(connection, name, window.last):
                return []
            active = self.queue.jobs(states=ACTIVE, schedule=name)
            data, reason_against = None, self._reason_against(schedule, window.last, now, active)
            if reason_against is None:
                data, reason_against = self._data(schedule)
            if reason_against is not None:
                _record(connection, name, Window(window.last, window.last, None, 1), reason_against)
                return []
            if schedule.spec.settings.concurrency_policy == "replace":
                self._end(connection, active)
            return [insert_job(connection, schedule.spec, now, schedule=name, due=window.last, data=data)]

    def _reason_against(self, schedule: Schedule, due: int, now: float, active: list[Job]) -> str | None:
        """Why no job is made for the last due time."""
        settings: ScheduleSettings = schedule.spec.settings
        late, deadline = now - due, settings.starting_deadline_seconds
        if schedule.paused:
            return "paused"
        if settings.catch_up == "none" and late > ON_TIME_SECONDS:
            return "no worker looked, and catch_up is none"
        if deadline is not None and late > deadline:
            return f"no worker looked for {deadline} s after it came due (starting_deadline_seconds)"
        if active and settings.concurrency_policy == "forbid":
            return f"job {active[0].id} was {active[0].state} (concurrency_policy forbid)"
        return None

    def _data(self, schedule: Schedule) -> tuple[dict[str, int] | None, str | None]:
        """The sizes of the prompts where they matter, and why no job is made of them."""
        try:
            data = _sizes(schedule.spec)
        except UserError as error:
            return None, str(error)
        last = self.last_done(schedule.name)
        if data is not None and last is not None and last.data is not None and not _grew(last.data, data):
            return data, f"the prompts had not grown since job {last.id} (when: new_data)"
        return data, None

    def last_done(self, name: str) -> Job | None:
        """The job of a schedule that was done last."""
        # Not the newest: an older one may have been retried since, or have taken longer.
        found = self.queue.rows(
            "SELECT id FROM jobs WHERE schedule = ? AND state = 'done' ORDER BY finished DESC, id DESC LIMIT 1", name
        )
        return self.queue.job(found[0]["id"]) if found else None

    def _end(self, connection: sqlite3.Connection, active: list[Job]) -> None:
        for job in active:
            ask_to_end(connection, job, "replace", self.clock.now(), "a newer run of its schedule took its place")

    def _take_back(self, schedule: Schedule, now: float) -> None:
        """The clock was far ahead: nothing that it made of the time still to come has been missed."""
        whole = int(now)
        with self.queue.transaction() as connection:
            connection.execute("DELETE FROM missed WHERE schedule = ? AND first > ?", (schedule.name, whole))
            # A record that reaches from before now beyond it is cut; how many it still holds is counted anew.
            for row in connection.execute(
                "SELECT rowid, first FROM missed WHERE schedule = ? AND last > ?", (schedule.name, whole)
            ).fetchall():
                left = schedule.timetable.window(row["first"] - 1, now)
                assert left is not None, "its first due time is not after now"
                connection.execute(
                    "UPDATE missed SET last = ?, num = ? WHERE rowid = ?", (left.last, left.num, row["rowid"])
                )
            connection.execute(
                "UPDATE schedules SET considered = ?, next_due = ? WHERE name = ?",
                (whole, schedule.timetable.next_after(whole), schedule.name),
            )


def _schedule(row: sqlite3.Row) -> Schedule:
    return Schedule(
        name=row["name"],
        spec=JobSpec.from_text(row["spec"]),
        paused=bool(row["paused"]),
        considered=row["considered"],
        next_due=row["next_due"],
        created=row["created"],
    )


def _is_known(connection: sqlite3.Connection, name: str, due: int) -> bool:
    """Whether a clock that was ahead has had a job made for this due time."""
    query = "SELECT 1 FROM jobs WHERE schedule = ? AND due = ?"
    return connection.execute(query, (name, due)).fetchone() is not None


def _record(connection: sqlite3.Connection, name: str, window: Window, reason: str) -> None:
    """Note due times as missed; one more for the same reason as those just before lengthens their record."""
    before = connection.execute(
        "SELECT rowid, * FROM missed WHERE schedule = ? ORDER BY last DESC LIMIT 1", (name,)
    ).fetchone()
    num_jobs = connection.execute(
        "SELECT count(*) FROM jobs WHERE schedule = ? AND due > ?", (name, -1 if before is None else before["last"])
    ).fetchone()[0]
    if before is not None and before["reason"] == reason and num_jobs == 0:
        num = None if None in (before["num"], window.num) else before["num"] + window.num
        connection.execute("UPDATE missed SET last = ?, num = ? WHERE rowid = ?", (window.last, num, before["rowid"]))
        return
    connection.execute(
        "INSERT INTO missed (schedule, first, last, num, reason) VALUES (?, ?, ?, ?, ?)",
        (name, window.first, window.last, window.num, reason),
    )


def _sizes(spec: JobSpec) -> dict[str, int] | None:
    """The size of every file that the job's prompts come from; None where it does not matter.

    Raises UserError where some are not there: that is no reason to say that they have not grown.
    """
    if spec.settings.when != "new_data":
        return None
    found: dict[str, int] = {}
    for run in spec.runs:
        if run.prompts is not None:
            place = spec.cwd / run.prompts
            try:
                found |= {str(file): file.stat().st_size for file in prompt_files(place)}
            except OSError as error:
                raise UserError(f"the prompts {place} cannot be read: {error.strerror}") from None
    return found


def _grew(before: dict[str, int], now: dict[str, int]) -> bool:
    return any(size > before.get(file, -1) for file, size in now.items())
