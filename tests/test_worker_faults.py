"""A week in minutes, with workers and jobs killed at random: what comes due is done once, or missed for a reason.

The worker, the queue, the keeper and the processes are the real ones; the clock is a fast one and, in the simulated
week, the command of a job is a script that checkpoints as a run does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from distill.jobs import ScheduleSettings
from pipelines.job import JobSpec, RunSpec
from pipelines.queue import Queue
from pipelines.schedule import Schedules
from pipelines.timetable import Timetable
from pipelines.verdict import ACTIVE

BERLIN = ZoneInfo("Europe/Berlin")
WEEK = timedelta(days=7).total_seconds()
BEGIN = datetime(2026, 3, 25, tzinfo=BERLIN).timestamp()  # the clocks go forward on the 29th

WORKER = """
import sys, time
from pathlib import Path
from pipelines.queue import Queue
from pipelines.worker import Worker

class FastClock:
    def __init__(self, begin, zero, factor):
        self.begin, self.zero, self.factor = begin, zero, factor
    def now(self):
        # When the week is over, time passes as it does: what is left is done, and little comes due.
        real, week = time.monotonic() - self.zero, 7 * 86400
        return self.begin + min(real * self.factor, week + real - week / self.factor)
    def passed(self):
        return time.monotonic()
    def wait(self, seconds):
        time.sleep(seconds)

folder, job, begin, zero, factor = Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:])
queue = Queue(folder, FastClock(begin, zero, factor))
command = lambda folder: [sys.executable, "-I", job, str(folder)]
Worker(queue, slots=("0", "1"), command=command, poll_seconds=0.05, lease_seconds=1.0).work()
"""

# A run in miniature: it holds its directory's lock, starts a process in a session of its own, keeps each response
# durably as it comes, writes a checkpoint on TERM, and finds its place again.
JOB = """
import fcntl, json, os, signal, subprocess, sys, time
entry = json.load(open(sys.argv[1] + "/job.json"))["runs"][0]
out = entry["out"]
os.makedirs(out, exist_ok=True)
lock = open(out + "/.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    open(out + "/TWICE", "w")
    sys.exit(1)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if os.path.exists(out + "/summary"):
    sys.exit(0)
if hash(out) % 3 == 0:
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open(out + "/responses", "a+b") as file:
    file.seek(0)
    whole = file.read().split(b"\\n")[:-1]
    file.truncate(sum(len(line) + 1 for line in whole))
    for step in range(len(whole), 8):
        file.write(b"response %d\\n" % step)
        file.flush()
        os.fsync(file.fileno())
        time.sleep(0.04)
        if stopped:
            sys.exit(75)
with open(out + "/done", "a") as file:
    file.write("done\\n")
os.rename(out + "/done", out + "/summary")
"""


def spec(name: str, out: Path, cron: str, timezone: str = "UTC", **settings: Any) -> JobSpec:
    schedule = ScheduleSettings(cron=cron, timezone=timezone, **settings)
    config = {"name": name, "prompts": {"kind": "embedded"}, "student": {"model": "nano"}}
    return JobSpec(name, out, out / name, schedule, (RunSpec("", config),), share_teacher=False)


def marked(mark: str) -> list[int]:
    """Processes with a mark in their environment, zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float = 15) -> bool:
    """Whether no process with a mark is left soon."""
    deadline = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(mark)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class FixedClock:
    """Stands where it is put."""

    def __init__(self, now: float) -> None:
        self.moment = now

    def now(self) -> float:
        return self.moment

    def passed(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


def due_times(hours: Mapping[str, Any], begin: float, end: float) -> set[int]:
    """What should come due, minute by minute, without a line of the code under test: ``every`` so many minutes, or at
    ``hour`` and ``minute`` in Berlin, a skipped time right after the gap."""
    if "every" in hours:
        first = int(begin) + 60 - int(begin) % 60
        return {moment for moment in range(first, int(end) + 1, 60) if moment // 60 % hours["every"] == 0}
    found = set()
    day = datetime.fromtimestamp(begin, BERLIN).date()
    while True:
        wall = datetime(day.year, day.month, day.day, hours["hour"], hours["minute"], tzinfo=BERLIN)
        while wall.astimezone(UTC).astimezone(BERLIN) != wall:
            wall += timedelta(minutes=1)
        if wall.timestamp() > end:
            return found
        if wall.timestamp() > begin:
            found.add(int(wall.timestamp()))
        day += timedelta(days=1)


@contextmanager
def workers(start: Callable[[], Any], num: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``num`` worker processes; the list is the caller's to change."""
    running = [start() for _ in range(num)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def assert_each_due_time_is_accounted_for(schedules: Schedules, expected: dict[str, set[int]]) -> Counter[str]:
    """Every due time has one job or stands in one record of what was missed; how the jobs ended."""
    states: Counter[str] = Counter()
    for name, times in expected.items():
        jobs = schedules.queue.jobs(schedule=name)
        made = [job.due for job in jobs]
        schedule = schedules.get(name)
        missed: list[int] = []
        for row in schedules.queue.rows("SELECT * FROM missed WHERE schedule = ?", name):
            table = Timetable(schedule.spec.settings.cron or "", schedule.spec.settings.zone)
            within = list(takewhile(row["last"].__ge__, table.after(row["first"] - 1)))
            assert len(within) == row["num"] and row["reason"]
            missed += within
        assert Counter([*made, *missed]) == Counter(times), name
        states.update(job.state for job in jobs)
    return states


def kill_at_random(
    chance: random.Random, queue: Queue, running: list[subprocess.Popen[bytes]], start: Callable[[], Any], mark: str
) -> str:
    """Kill a worker (another one takes its place), the keeper of a job, a process of one, or a worker and a keeper."""
    keepers = queue.rows("SELECT pid FROM attempts WHERE finished IS NULL AND pid IS NOT NULL")
    kind = chance.choice(("worker", "keeper", "job", "both")) if keepers else "worker"
    keeper = chance.choice(keepers)["pid"] if keepers else 0
    if kind in ("worker", "both"):
        place = chance.randrange(len(running))
        running[place].kill()
        running[place].wait()
        running[place] = start()
    if kind in ("keeper", "both"):
        kill(keeper)
    if kind == "job":
        kill(chance.choice([pid for pid in marked(mark) if parent_of(pid) == keeper] or [keeper]))
    return kind


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_week_with_two_hundred_kills(tmp_path: Path) -> None:
    chance, num_kills, factor = random.Random(0), 200, 2500.0
    (tmp_path / "job.py").write_text(JOB)
    schedules = Schedules(Queue(tmp_path / "queue", FixedClock(BEGIN)))
    common = {"backoff_limit": 10_000, "backoff_seconds": 1.0, "termination_grace_period_seconds": 5.0}
    schedules.add(spec("hourly", tmp_path, "0 * * * *", **common))
    schedules.add(spec("even", tmp_path, "0 */2 * * *", concurrency_policy="allow", catch_up="none", **common))
    schedules.add(spec("nightly", tmp_path, "30 2 * * *", "Europe/Berlin", concurrency_policy="replace", **common))
    mark = f"DISTILL_WEEK={tmp_path}"
    zero = time.monotonic()
    command = [sys.executable, "-c", WORKER, str(tmp_path / "queue"), str(tmp_path / "job.py")]
    command += [str(BEGIN), str(zero), str(factor)]
    start = partial(
        subprocess.Popen, command, env={**os.environ, "DISTILL_WEEK": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    killed: Counter[str] = Counter()
    queue = schedules.queue
    with workers(start, 2) as running:
        every = WEEK / factor / num_kills
        for number in range(num_kills):
            time.sleep(max(0.0, zero + every * (number + chance.random()) - time.monotonic()))
            killed[kill_at_random(chance, queue, running, start, mark)] += 1
        until = zero + WEEK / factor
        while time.monotonic() < until or queue.jobs(states=ACTIVE, last=1):
            assert time.monotonic() < until + 120, queue.jobs(states=ACTIVE)
            time.sleep(0.2)
        for process in running:
            process.terminate()
            assert process.wait(30) == 0
    assert gone(mark), "a process of a job or worker is left"
    considered = {one.name: one.considered for one in schedules.all()}
    assert min(considered["hourly"], considered["even"]) > BEGIN + WEEK - 7201
    expected = {
        "hourly": due_times({"every": 60}, BEGIN, considered["hourly"]),
        "even": due_times({"every": 120}, BEGIN, considered["even"]),
        "nightly": due_times({"hour": 2, "minute": 30}, BEGIN, considered["nightly"]),
    }
    states = assert_each_due_time_is_accounted_for(schedules, expected)
    # What came due after the last look at the week may be interrupted by its end.
    assert set(states) <= {"done", "replaced", "interrupted", "queued"} and states["done"] > 50
    for job in queue.jobs():
        assert not (job.out / "TWICE").exists(), f"two processes were at job {job.id}"
        if job.state == "done":
            assert (job.out / "summary").read_text() == "done\n"
            said = (job.out / "responses").read_text().splitlines()
            assert said == [f"response {step}" for step in range(8)]
    print(json.dumps({"killed": killed, "states": states, "attempts": len(queue.rows("SELECT 1 FROM attempts"))}))


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0
