"""A week in minutes, with workers and jobs killed at random: what comes due is done once, or missed for a reason.

The worker, the queue, the keeper and the processes are the real ones; the clock is a fast one and, in the simulated
week, the command of a job is a script that checkpoints as a run does.
"""

from __future__ import annotations

import json
import os
import random
import select
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
from pyarrow import parquet
from test_worker import marked

from distill.jobs import ScheduleSettings
from distill.journal import read_json
from pipelines.job import JobSpec, RunSpec, resolve_job
from pipelines.phases import reproducible
from pipelines.queue import Queue
from pipelines.schedule import Schedules
from pipelines.timetable import Timetable
from pipelines.verdict import ACTIVE
from teachers.store import ResponseStore

BERLIN = ZoneInfo("Europe/Berlin")
WEEK = timedelta(days=7).total_seconds()
BEGIN = datetime(2026, 3, 25, tzinfo=BERLIN).timestamp()  # the clocks go forward on the 29th

WORKER = """
import sys, time
from pathlib import Path
from pipelines.preparation import distill_run
from pipelines.queue import Queue
from pipelines.worker import Worker

class FastClock:
    def __init__(self, begin, zero, factor, span):
        self.begin, self.zero, self.factor, self.span = begin, zero, factor, span
    def now(self):
        # When the time is over, it passes as it does: what is left is done, and little comes due.
        real = time.monotonic() - self.zero
        return self.begin + min(real * self.factor, self.span + real - self.span / self.factor)
    def passed(self):
        return time.monotonic()
    def wait(self, seconds):
        time.sleep(seconds)

folder, job, times = Path(sys.argv[1]), sys.argv[2], map(float, sys.argv[3:])
queue = Queue(folder, FastClock(*times))
command = (lambda folder: [sys.executable, "-I", job, str(folder)]) if job else distill_run
worker = Worker(queue, slots=("0", "1"), command=command, poll_seconds=0.05, lease_seconds=1.0)
print("imported", flush=True)
worker.work()
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


def begin(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker, when it has been imported: on a busy machine the next kill would else come first, every time."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


class World:
    """A queue with two workers on a fast clock, from ``begin`` for ``span`` seconds; ``job`` is the jobs' script, empty
    for real runs."""

    def __init__(self, folder: Path, job: str, *, begin: float, span: float, factor: float, workers: int) -> None:
        self.schedules = Schedules(Queue(folder / "queue", FixedClock(begin)))
        self.queue = self.schedules.queue
        self.mark = f"DISTILL_WORLD={folder}"
        self.killed: Counter[str] = Counter()
        self._folder, self._job, self._begin, self._span, self._factor = folder, job, begin, span, factor
        self._num_workers = workers

    def live(self, chance: random.Random, num_kills: int, *, patience: float, at_work: bool = False) -> None:
        """Let the time pass with kills spread over it, then let what is left be done, and end the workers.

        With ``at_work`` a kill waits for a job that runs, and comes up to 12 seconds into it.
        """
        zero = time.monotonic()
        command = [sys.executable, "-c", WORKER, str(self.queue.folder), self._job]
        command += [str(number) for number in (self._begin, zero, self._factor, self._span)]
        environment = {**os.environ, "DISTILL_WORLD": str(self._folder), "DISTILL_STORE": str(self._folder / "store")}
        start = partial(begin, command, environment)
        real = self._span / self._factor
        with workers(start, self._num_workers) as running:
            for number in range(num_kills):
                time.sleep(max(0.0, zero + real / num_kills * (number + chance.random()) - time.monotonic()))
                if at_work:
                    self._wait_for_work()
                    time.sleep(chance.uniform(0.0, 12.0))
                self.killed[kill_at_random(chance, self.queue, running, start, self.mark)] += 1
            while time.monotonic() < zero + real or self.queue.jobs(states=ACTIVE, last=1):
                assert time.monotonic() < zero + real + patience, self.queue.jobs(states=ACTIVE)
                time.sleep(0.2)
            for process in running:
                process.terminate()
                assert process.wait(60) == 0
        assert gone(self.mark), "a process of a job or worker is left"

    def _wait_for_work(self) -> None:
        deadline = time.monotonic() + 120
        while not self.queue.rows("SELECT 1 FROM attempts WHERE finished IS NULL AND pid IS NOT NULL"):
            assert time.monotonic() < deadline, "no job runs"
            time.sleep(0.1)

    def report(self) -> str:
        attempts = Counter(row["state"] for row in self.queue.rows("SELECT state FROM attempts"))
        return json.dumps({"killed": self.killed, "attempts": attempts})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_week_with_two_hundred_kills(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    world = World(tmp_path, str(tmp_path / "job.py"), begin=BEGIN, span=WEEK, factor=2500.0, workers=2)
    schedules = world.schedules
    common = {"backoff_limit": 10_000, "backoff_seconds": 1.0, "termination_grace_period_seconds": 5.0}
    schedules.add(spec("hourly", tmp_path, "0 * * * *", **common))
    schedules.add(spec("even", tmp_path, "0 */2 * * *", concurrency_policy="allow", catch_up="none", **common))
    schedules.add(spec("nightly", tmp_path, "30 2 * * *", "Europe/Berlin", concurrency_policy="replace", **common))
    world.live(random.Random(0), 200, patience=120)
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
    for job in world.queue.jobs():
        assert not (job.out / "TWICE").exists(), f"two processes were at job {job.id}"
        if job.state == "done":
            assert (job.out / "summary").read_text() == "done\n"
            said = (job.out / "responses").read_text().splitlines()
            assert said == [f"response {step}" for step in range(8)]
    print(world.report(), states)


TINY = """
extends: embedded
stages:
  off_policy: {num_prompts: 32, batch_size: 8, epochs: 1}
  on_policy: {steps: 6, prompts_per_step: 4}
evaluation: {num_questions: 4, references: false}
checkpoint_every: 1
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_real_runs_with_twenty_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some due times, one run each: killed as they may be, all end in the numbers of a run that nobody disturbed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(TINY)
    reference = tmp_path / "reference"
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(tmp_path / "tiny.yaml"), "--json"]
    command += ["--out", str(reference), "--store", str(tmp_path / "own-store")]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    span = timedelta(hours=6).total_seconds()
    world = World(tmp_path, "", begin=BEGIN, span=span, factor=span / 360, workers=2)
    monkeypatch.chdir(tmp_path)
    common = {"backoff_limit": 100, "backoff_seconds": 60.0, "concurrency_policy": "allow", "cron": "0 * * * *"}
    world.schedules.add(resolve_job(tmp_path / "tiny.yaml", schedule=common))
    world.live(random.Random(0), 20, patience=1200, at_work=True)
    print(world.report())
    jobs = world.queue.jobs()
    considered = world.schedules.get("tiny").considered
    assert_each_due_time_is_accounted_for(world.schedules, {"tiny": due_times({"every": 60}, BEGIN, considered)})
    assert len(jobs) >= 6 and all(job.state == "done" for job in jobs)
    assert world.killed.total() == 20 and len(world.queue.rows("SELECT 1 FROM attempts")) > len(jobs)
    for job in jobs:
        assert numbers(job.out) == numbers(reference), f"job {job.id}"
    # Every response that the teacher gave is kept once, and each run trained on the same ones.
    for root in (tmp_path / "own-store", tmp_path / "store"):
        store = ResponseStore(root)
        keys = [key for collection in store.collections() for key, _ in collection.walk([])]
        shards = [row for folder in store.collections() for shard in folder.shards() for row in rows_of(shard)]
        assert sorted(keys) == sorted(shards), "a response is there twice, or cannot be read"
    used = {json.dumps(read_json(out / "manifest.json")["stages"]["off_policy"]) for out in (reference, jobs[0].out)}
    assert len(used) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_at_any_moment_leaves_no_process_and_a_job_that_goes_on(tmp_path: Path) -> None:
    """Once or twice, from the first instruction of a worker on; the exit leaves nothing, and no step is done twice."""
    # A shell has what it runs in the background ignore Ctrl-C, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(0)
    (tmp_path / "job.py").write_text(JOB)
    queue = Queue(tmp_path / "queue")
    mark = f"DISTILL_WORLD={tmp_path}"
    now = str(time.time())
    command = [sys.executable, "-c", WORKER, str(tmp_path / "queue"), str(tmp_path / "job.py")]
    command += [now, str(time.monotonic()), "1", "0"]
    environment = {**os.environ, "DISTILL_WORLD": str(tmp_path)}
    codes: Counter[int] = Counter()
    for number in range(40):
        if not queue.jobs(states=ACTIVE):
            queue.add(spec("once", tmp_path, "0 0 1 1 *", backoff_limit=100, backoff_seconds=0.1))
        worker = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert worker.stdout is not None
        if number % 4:
            # From where it begins to work; else from where Python does.
            select.select([worker.stdout], [], [], 30)
        time.sleep(chance.uniform(0.0, 1.2))
        is_at_work = bool(select.select([worker.stdout], [], [], 0)[0])
        worker.send_signal(signal.SIGINT)
        if number % 3 == 0:
            time.sleep(chance.uniform(0.0, 0.3))
            worker.send_signal(signal.SIGINT)
        try:
            codes[worker.wait(20)] += 1
        except subprocess.TimeoutExpired:
            # While Python imports, it can lose a KeyboardInterrupt (in a callback, where nothing may be raised).
            worker.send_signal(signal.SIGINT)
            codes[worker.wait(20)] += 1
            assert not is_at_work
            codes[-1] += 1
        worker.stdout.close()
        # A keeper that was given no job yet ends when it finds its worker gone.
        assert gone(mark, 2.0), f"round {number}: a process is left"
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while queue.jobs(states=ACTIVE) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker.terminate()
    worker.wait(30)
    signal.signal(signal.SIGINT, before)
    jobs = queue.jobs()
    assert all(job.state == "done" for job in jobs) and len(queue.rows("SELECT 1 FROM attempts")) > len(jobs)
    for job in jobs:
        assert not (job.out / "TWICE").exists()
        assert (job.out / "responses").read_text().splitlines() == [f"response {step}" for step in range(8)]
    print(codes, len(jobs))


def numbers(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, times aside."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [reproducible(json.loads(line)) for line in lines]


def rows_of(shard: Path) -> list[str]:
    return [str(key) for key in parquet.read_table(shard, columns=["key"]).column("key").to_pylist()]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0
