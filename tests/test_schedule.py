"""What is made of due times: policies, missed windows, pauses, clocks that jump. The clock is the test's."""

from __future__ import annotations

import random
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.jobs import ScheduleSettings
from pipelines.claims import Claims
from pipelines.clock import iso
from pipelines.job import JobSpec, RunSpec
from pipelines.queue import Job, Queue
from pipelines.schedule import FAR_BACK_SECONDS, ON_TIME_SECONDS, Schedules
from pipelines.verdict import State

BEGIN = datetime(2026, 3, 2, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


class SetClock:
    """Stands where the test puts it."""

    def __init__(self) -> None:
        self.moment = BEGIN

    def now(self) -> float:
        return self.moment

    def passed(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        self.moment += seconds


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def schedules(tmp_path: Path, clock: SetClock) -> Schedules:
    return Schedules(Queue(tmp_path / "queue", clock))


def add(
    schedules: Schedules, cron: str = "0 * * * *", prompts: Path | None = None, replace: bool = False, **settings: Any
) -> None:
    source = {"kind": "embedded"} if prompts is None else {"kind": "file", "path": str(prompts)}
    config = {"name": "job", "prompts": source, "student": {"model": "nano"}}
    folder = schedules.queue.folder
    schedule = ScheduleSettings(cron=cron, **settings)
    schedules.add(JobSpec("job", folder, folder / "out", schedule, (RunSpec("", config),), False), replace=replace)


def end(schedules: Schedules, job: Job, state: State = "done") -> None:
    with schedules.queue.transaction() as connection:
        connection.execute(
            "UPDATE jobs SET state = ?, finished = ? WHERE id = ?", (state, schedules.queue.clock.now(), job.id)
        )


def due(jobs: list[Job]) -> list[str | None]:
    return [iso(job.due) for job in jobs]


def reasons(schedules: Schedules) -> list[tuple[str, str, int, str]]:
    return [(one["first"][11:16], one["last"][11:16], one["num"], one["reason"]) for one in schedules.missed("job")]


def test_a_due_time_makes_one_job_whoever_looks(schedules: Schedules, clock: SetClock, tmp_path: Path) -> None:
    add(schedules)
    other = Schedules(Queue(tmp_path / "queue", clock))
    clock.moment = BEGIN + HOUR - 1
    assert schedules.consider() == [] == other.consider()
    clock.moment = BEGIN + HOUR
    assert due(schedules.consider()) == ["2026-03-02T13:00:00Z"]
    assert other.consider() == [] == schedules.consider()
    assert schedules.missed("job") == []


def test_windows_that_nobody_saw_are_caught_up_with_once(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    clock.moment = BEGIN + 5.5 * HOUR
    assert due(schedules.consider()) == ["2026-03-02T17:00:00Z"]
    assert reasons(schedules) == [("13:00", "16:00", 4, "no worker looked; a later one is the latest (catch_up)")]


def test_windows_that_nobody_saw_are_left_out(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, catch_up="none")
    clock.moment = BEGIN + 5.5 * HOUR
    assert schedules.consider() == []
    assert [(first, last, num) for first, last, num, _ in reasons(schedules)] == [
        ("13:00", "16:00", 4),
        ("17:00", "17:00", 1),
    ]
    clock.moment = BEGIN + 6 * HOUR + ON_TIME_SECONDS
    assert due(schedules.consider()) == ["2026-03-02T18:00:00Z"]


@pytest.mark.parametrize(("late", "is_made"), [(600, True), (601, False)])
def test_a_starting_deadline_bounds_the_catching_up(
    schedules: Schedules, clock: SetClock, late: int, is_made: bool
) -> None:
    add(schedules, starting_deadline_seconds=600)
    clock.moment = BEGIN + HOUR + late
    assert len(schedules.consider()) == is_made
    assert len(schedules.missed("job")) == (not is_made)


def test_a_starting_deadline_bounds_the_wait_for_a_slot(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, starting_deadline_seconds=600)
    clock.moment = BEGIN + HOUR
    (job,) = schedules.consider()
    clock.moment += 601
    assert Claims(schedules.queue).take("worker", ["0"], 60) is None
    found = schedules.queue.job(job.id)
    assert found.state == "missed" and "starting_deadline_seconds" in (found.reason or "")
    # Retried, it is wanted however late it is, and has not started before it runs.
    assert schedules.queue.retry(job.id).started is None
    assert Claims(schedules.queue).take("worker", ["0"], 60) is not None


def test_forbid_leaves_the_new_one_out(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    clock.moment = BEGIN + HOUR
    (job,) = schedules.consider()
    clock.moment += HOUR
    assert schedules.consider() == []
    assert reasons(schedules) == [("14:00", "14:00", 1, f"job {job.id} was queued (concurrency_policy forbid)")]
    end(schedules, job)
    clock.moment += HOUR
    assert due(schedules.consider()) == ["2026-03-02T15:00:00Z"]


def test_a_retry_follows_the_policy_too(schedules: Schedules, clock: SetClock) -> None:
    """Two jobs of a schedule that forbids it would run at once."""
    add(schedules)
    clock.moment = BEGIN + HOUR
    (first,) = schedules.consider()
    end(schedules, first, "failed")
    clock.moment += HOUR
    (second,) = schedules.consider()
    with pytest.raises(UserError, match=r"job 2 of job is queued, and its concurrency_policy is forbid; wait for it"):
        schedules.queue.retry(first.id)
    end(schedules, second)
    assert schedules.queue.retry(first.id).state == "queued"
    add(schedules, replace=True, concurrency_policy="allow")
    clock.moment += HOUR
    (third,) = schedules.consider()
    end(schedules, third, "failed")
    assert schedules.queue.retry(third.id).state == "queued"


def test_the_last_one_that_was_done_is_the_one_that_ended_last(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, concurrency_policy="allow")
    assert schedules.last_done("job") is None
    first, second = schedules.run_now("job"), schedules.run_now("job")
    for job in (second, first):
        clock.moment += 1
        end(schedules, job)
        last = schedules.last_done("job")
        assert last is not None and last.id == job.id


def test_allow_makes_both(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, concurrency_policy="allow")
    for hours in (1, 2):
        clock.moment = BEGIN + hours * HOUR
        assert len(schedules.consider()) == 1
    claims = [Claims(schedules.queue).take("worker", ["0", "1"], 60) for _ in range(3)]
    assert [claim.job.id for claim in claims if claim] == [1, 2]


def test_replace_ends_the_old_one_before_the_new_one_starts(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, concurrency_policy="replace")
    clock.moment = BEGIN + HOUR
    (first,) = schedules.consider()
    claim = Claims(schedules.queue).take("worker", ["0", "1"], 60)
    assert claim is not None
    clock.moment += HOUR
    (second,) = schedules.consider()
    assert Claims(schedules.queue).stop_wanted(first.id) == "replace"
    # A slot is free, and still the new one waits until the old one has ended.
    assert Claims(schedules.queue).take("worker", ["0", "1"], 60) is None
    assert Claims(schedules.queue).settle(claim, code=75, asked="replace", seconds=1.0) is not None
    assert schedules.queue.job(first.id).state == "replaced"
    after = Claims(schedules.queue).take("worker", ["0", "1"], 60)
    assert after is not None and after.job.id == second.id
    # One that has not begun is replaced at once.
    end(schedules, second, "queued")
    clock.moment += HOUR
    schedules.consider()
    assert [job.state for job in schedules.queue.jobs()] == ["replaced", "replaced", "queued"]


def test_what_comes_due_while_it_is_paused_is_missed(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    clock.moment = BEGIN + HOUR + 30
    # Due before the pause, seen by nobody yet: it is not the pause that it is missed for.
    assert schedules.pause("job", paused=True).paused
    assert due(schedules.queue.jobs()) == ["2026-03-02T13:00:00Z"]
    end(schedules, schedules.queue.job(1))
    for hours in (2, 3, 4):
        clock.moment = BEGIN + hours * HOUR
        assert schedules.consider() == []
    clock.moment = BEGIN + 5.5 * HOUR
    assert not schedules.pause("job", paused=False).paused
    assert schedules.consider() == []
    assert reasons(schedules) == [("14:00", "17:00", 4, "paused")]
    clock.moment = BEGIN + 6 * HOUR
    assert due(schedules.consider()) == ["2026-03-02T18:00:00Z"]


def test_a_clock_that_is_set_back_makes_nothing_due_again(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    for hours in (1, 2, 0, 0.5, 1, 1.5, 2, 2.5, 3):
        clock.moment = BEGIN + hours * HOUR
        for job in schedules.consider():
            end(schedules, job)
    assert due(schedules.queue.jobs()) == [f"2026-03-02T{hour}:00:00Z" for hour in (13, 14, 15)]
    assert schedules.missed("job") == []


def test_what_came_due_before_another_definition_is_accounted_for(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, concurrency_policy="allow")
    clock.moment = BEGIN + 3.5 * HOUR
    add(schedules, cron="30 * * * *", replace=True, concurrency_policy="allow")
    assert due(schedules.queue.jobs()) == ["2026-03-02T15:00:00Z"]
    assert [row[:3] for row in reasons(schedules)] == [("13:00", "14:00", 2)]
    clock.moment = BEGIN + 4.5 * HOUR
    assert due(schedules.consider()) == ["2026-03-02T16:30:00Z"]
    # Set back, and defined anew: what had come due does not come due again.
    clock.moment = BEGIN + 3.25 * HOUR
    add(schedules, cron="*/30 * * * *", replace=True, concurrency_policy="allow")
    clock.moment = BEGIN + 5 * HOUR
    assert due(schedules.consider()) == ["2026-03-02T17:00:00Z"]
    assert [row[:3] for row in reasons(schedules)] == [("13:00", "14:00", 2)]


def test_a_clock_that_was_a_year_ahead_does_not_silence_a_schedule(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    clock.moment = BEGIN + HOUR
    end(schedules, schedules.consider()[0])
    clock.moment = BEGIN + timedelta(days=365).total_seconds()
    (ahead,) = schedules.consider()
    end(schedules, ahead)
    clock.moment = BEGIN + 3.5 * HOUR
    assert schedules.consider() == []
    clock.moment = BEGIN + 4 * HOUR
    assert due(schedules.consider()) == ["2026-03-02T16:00:00Z"]
    # Of the year ahead only what has come by now is missed.
    assert [(first, last, num) for first, last, num, _ in reasons(schedules)] == [("14:00", "15:00", 2)]


def test_a_year_without_a_worker_is_one_record_and_one_job(schedules: Schedules, clock: SetClock) -> None:
    add(schedules, cron="* * * * *")
    clock.moment = BEGIN + timedelta(days=365).total_seconds()
    begin = time.monotonic()
    assert due(schedules.consider()) == ["2027-03-02T12:00:00Z"]
    assert time.monotonic() - begin < 5
    assert [one["num"] for one in schedules.missed("job")] == [None]


def test_new_data_is_a_file_that_grew_since_the_last_run_that_was_done(
    schedules: Schedules, clock: SetClock, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "a.jsonl").write_text('{"prompt": "1+1="}\n')
    add(schedules, prompts=prompts, when="new_data")

    def made_after(state: State = "done") -> bool:
        clock.moment += HOUR
        jobs = schedules.consider()
        for job in jobs:
            end(schedules, job, state)
        return len(jobs) == 1

    assert made_after("failed") and made_after() and not made_after()
    (prompts / "a.jsonl").touch()
    assert not made_after()
    (prompts / "b.jsonl").write_text('{"prompt": "1+2="}\n')
    assert made_after() and not made_after()
    with (prompts / "a.jsonl").open("a") as file:
        file.write('{"prompt": "1+3="}\n')
    assert made_after("failed") and made_after() and not made_after()
    assert all("had not grown since job" in reason for *_, reason in reasons(schedules))


@pytest.mark.parametrize("has_run", [True, False])
def test_prompts_that_are_gone_are_the_reason(
    schedules: Schedules, clock: SetClock, tmp_path: Path, has_run: bool
) -> None:
    prompts = tmp_path / "data" / "prompts"
    prompts.mkdir(parents=True)
    (prompts / "a.jsonl").write_text('{"prompt": "1+1="}\n')
    add(schedules, prompts=prompts, when="new_data")
    if has_run:
        clock.moment += HOUR
        end(schedules, schedules.consider()[0])
    (prompts / "a.jsonl").unlink()
    prompts.rmdir()
    clock.moment += HOUR
    assert schedules.consider() == []
    assert [reason for *_, reason in reasons(schedules)] == [f"there is no file {prompts}; check the spelling"]
    with pytest.raises(UserError, match="there is no file"):
        schedules.run_now("job")
    # When they are back it goes on.
    prompts.mkdir()
    (prompts / "b.jsonl").write_text('{"prompt": "1+1="}\n')
    clock.moment += HOUR
    assert len(schedules.consider()) == 1


def test_random_histories_account_for_every_due_time(tmp_path: Path) -> None:
    """Whatever is done to a schedule, each due time up to the last one considered has one job or one record."""
    for seed in range(30):
        chance, clock = random.Random(seed), SetClock()
        schedules = Schedules(Queue(tmp_path / str(seed), clock))
        policy = chance.choice(("forbid", "allow", "replace"))
        deadline = chance.choice((None, 100, 4000))
        cron = chance.choice(("*/10 * * * *", "0 * * * *", "30 2 * * *"))
        catch_up = chance.choice(("latest", "none"))
        zone = "Europe/Berlin"
        add(
            schedules,
            cron,
            timezone=zone,
            concurrency_policy=policy,
            starting_deadline_seconds=deadline,
            catch_up=catch_up,
        )
        begin = schedules.get("job").considered
        for _ in range(60):
            clock.moment += chance.choice((1, 30, 599, 3599, 7200, 100_000, -1800, -FAR_BACK_SECONDS / 2))
            # A clock that is set back further is another test's.
            clock.moment = max(clock.moment, schedules.get("job").considered - FAR_BACK_SECONDS + 1)
            match chance.choice(("look", "look", "look", "pause", "resume", "end", "end")):
                case "look":
                    schedules.consider()
                case "end":
                    for job in schedules.queue.jobs(states=("queued",))[:2]:
                        end(schedules, job, chance.choice(("done", "failed")))
                case word:
                    schedules.pause("job", paused=word == "pause")
        schedule = schedules.get("job")
        all_times = list(takewhile(schedule.considered.__ge__, schedule.timetable.after(begin)))
        missed: list[int] = []
        for row in schedules.queue.rows("SELECT * FROM missed"):
            within = [due for due in all_times if row["first"] <= due <= row["last"]]
            assert len(within) == row["num"]
            missed += within
        assert Counter([*missed, *(job.due for job in schedules.queue.jobs())]) == Counter(all_times), seed


def test_a_schedule_is_replaced_only_on_request(schedules: Schedules, clock: SetClock) -> None:
    add(schedules)
    with pytest.raises(UserError, match="--replace"):
        add(schedules)
    with pytest.raises(UserError, match="there is no schedule other; known: job"):
        schedules.get("other")
    clock.moment = BEGIN + HOUR
    schedules.consider()
    with pytest.raises(UserError, match="concurrency_policy is forbid"):
        schedules.run_now("job")
    assert [job.id for job in schedules.remove("job")] == [1]
    assert schedules.all() == []
