"""Jobs and schedules on a terminal, from the documents that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.jobs import ScheduleSettings
from pipelines.listing import output, table_of

Document = Mapping[str, Any]


def print_schedules(schedules: Sequence[Document]) -> None:
    """A row a schedule."""
    if not schedules:
        output().print("no schedules; distill schedule add FILE --cron '0 2 * * *' makes one")
        return
    rows = table_of("schedule", "cron", "time zone", "next due", left=4)
    for found in schedules:
        settings = found["schedule"]
        due = "paused" if found["paused"] else found["next_due"] or "never"
        rows.add_row(found["name"], settings["cron"], settings["timezone"], due)
    output().print(rows)


def print_schedule(found: Document) -> None:
    """One schedule, with the settings that are not the default."""
    settings = found["schedule"]
    output().print(
        f"{found['name']}: {settings['cron']} ({settings['timezone']}){', paused' if found['paused'] else ''}"
    )
    if found["upcoming"]:
        output().print(f"  next: {', '.join(found['upcoming'])}")
    output().print(f"  runs: {', '.join(found['runs'])}, below {found['out']}")
    default = ScheduleSettings().model_dump(mode="json")
    shown = [
        f"{key} {value}" for key, value in settings.items() if key not in ("cron", "timezone") and value != default[key]
    ]
    if shown:
        output().print(f"  {', '.join(shown)}")


def print_jobs(jobs: Sequence[Document]) -> None:
    """A row a job."""
    if not jobs:
        output().print("no jobs")
        return
    rows = table_of("job", "name", "due", "state", "at work", "why", left=6)
    # Where it is narrow the reason takes more lines: without its number a job is nobody's.
    rows.columns[-1].no_wrap = False
    for job in jobs:
        worked = f"{job['seconds']:,.0f} s" if job["seconds"] else "-"
        rows.add_row(str(job["id"]), job["name"], job["due"] or "-", job["state"], worked, job["reason"] or "")
    output().print(rows)


def print_missed(missed: Sequence[Document]) -> None:
    """A line for each stretch of due times that no job was made for."""
    for found in missed:
        num = "more than 1,000" if found["num"] is None else found["num"]
        stretch = found["first"] if found["first"] == found["last"] else f"{found['first']} to {found['last']} ({num})"
        output().print(f"missed: {stretch}: {found['reason']}")
