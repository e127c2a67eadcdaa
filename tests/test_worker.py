"""Workers, keepers and jobs as real processes: exit codes, retries, stops, kills, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import DistillError, UserError
from distill.jobs import ScheduleSettings
from pipelines.attempt import Attempt, Identity, boot_id, end_leftovers
from pipelines.claims import Claim, Claims
from pipelines.job import JobSpec, RunSpec
from pipelines.queue import Job, Queue
from pipelines.verdict import ACTIVE, judge
from pipelines.worker import Worker, exit_code, slots_here

# What a job does is in the name of its run: one word an attempt, the last one again and again.
JOB = """
import json, os, signal, subprocess, sys, time
folder = sys.argv[1]
out = json.load(open(folder + "/job.json"))["runs"][0]["out"]
os.makedirs(out, exist_ok=True)
words = open(folder + "/words").read().split()
with open(out + "/attempts", "a") as file:
    file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "-") + "\\n")
word = words[min(len(open(out + "/attempts").readlines()), len(words)) - 1]
print("this attempt:", word, flush=True)
def stop(number, frame):
    open(out + "/checkpoint", "w").write("there")
    sys.exit(75)
if word == "wait":
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.Popen(["sleep", "1000"])
    signal.signal(signal.SIGTERM, stop)
    open(out + "/ready", "w")
    time.sleep(1000)
if word == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(out + "/ready", "w")
    time.sleep(1000)
if word == "slow":
    time.sleep(0.4)
    sys.exit(0)
if word.startswith("kill"):
    os.kill(os.getpid(), int(word[4:]))
sys.exit(int(word))
"""

WORKER = """
import sys
from pathlib import Path
from pipelines.queue import Queue
from pipelines.worker import Worker
queue, job = Queue(Path(sys.argv[1])), sys.argv[2]
command = lambda folder: [sys.executable, "-I", job, str(folder)]
worker = Worker(queue, slots=sys.argv[3].split(","), command=command, poll_seconds=0.05, lease_seconds=1.0)
print("imported", flush=True)
worker.work()
"""


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    (tmp_path / "job.py").write_text(JOB)
    return Queue(tmp_path / "queue")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Stands in the environment of whatever a test starts; nothing of it outlives the test."""
    monkeypatch.setenv("DISTILL_TEST", str(tmp_path))
    yield f"DISTILL_TEST={tmp_path}"
    left = marked(f"DISTILL_TEST={tmp_path}")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes are left"


def marked(mark: str) -> list[int]:
    """Processes with a mark in their environment, this one and zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def add(queue: Queue, words: str, **settings: Any) -> Job:
    """A job that does ``words``, one an attempt."""
    settings = {"backoff_seconds": 0.05, "termination_grace_period_seconds": 10.0, **settings}
    out = queue.folder.parent / "out"
    config = {"name": "job", "prompts": {"kind": "embedded"}, "student": {"model": "nano"}}
    spec = JobSpec("job", queue.folder.parent, out, ScheduleSettings(**settings), (RunSpec("", config),), False)
    job = queue.add(spec)
    queue.job_folder(job.id).mkdir(parents=True)
    (queue.job_folder(job.id) / "words").write_text(words)
    return job


def worker(queue: Queue, **more: Any) -> Worker:
    job = queue.folder.parent / "job.py"
    return Worker(
        queue, command=lambda folder: [sys.executable, "-I", str(job), str(folder)], poll_seconds=0.02, **more
    )


def run_all(queue: Queue, **more: Any) -> list[str]:
    """Let a worker look until nothing is active."""
    deadline = time.monotonic() + 30
    while queue.jobs(states=ACTIVE) and time.monotonic() < deadline:
        worker(queue, **more).work(once=True)
        time.sleep(0.02)
    return [job.state for job in queue.jobs()]


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def start(queue: Queue, slots: str = "0") -> subprocess.Popen[bytes]:
    """A worker process, when it has been imported."""
    command = [sys.executable, "-c", WORKER, str(queue.folder), str(queue.folder.parent / "job.py"), slots]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


@pytest.mark.parametrize(
    ("words", "state", "num_attempts"),
    [
        ("0", "done", 1),
        ("2 0", "failed", 1),
        ("75 75 75 75 0", "done", 5),
        ("1 1 0", "done", 3),
        ("1", "failed", 3),
        ("kill9 0", "done", 2),
        ("1 75 130 75 kill15", "failed", 5),
    ],
)
def test_exit_codes_decide_what_is_tried_again(
    queue: Queue, mark: str, words: str, state: str, num_attempts: int
) -> None:
    job = add(queue, words, backoff_limit=2)
    assert run_all(queue) == [state]
    attempts = queue.attempts(job.id)
    assert len(attempts) == num_attempts
    assert f"this attempt: {words.split()[0]}" in Path(attempts[0]["log"]).read_text()


def test_the_wait_before_a_retry_doubles_up_to_its_cap() -> None:
    settings = ScheduleSettings(backoff_seconds=10, backoff_cap_seconds=60, backoff_limit=5000)
    delays = [judge(1, asked=None, failures=n, stops=0, settings=settings).delay for n in (0, 1, 2, 3, 4, 4000)]
    assert delays == [10, 20, 40, 60, 60, 60]
    assert judge(75, asked=None, failures=0, stops=9999, settings=settings).state == "waiting"
    killed = judge(None, asked=None, failures=9999, stops=0, settings=settings, keeper=-9)
    assert (killed.state, killed.delay, killed.is_failure) == ("interrupted", 0.0, False)
    failed = judge(None, asked=None, failures=1, stops=0, settings=settings, keeper=1)
    assert (failed.state, failed.delay, failed.is_failure) == ("waiting", 20, True)
    assert judge(None, asked="stop", failures=0, stops=0, settings=settings, keeper=1).state == "interrupted"


def test_a_command_that_cannot_start_is_a_failure_with_a_sentence(queue: Queue, mark: str) -> None:
    job = add(queue, "0", backoff_limit=0)
    Worker(queue, command=lambda folder: ["/nowhere/distill"], poll_seconds=0.02).work(once=True)
    found = queue.job(job.id)
    assert (found.state, found.exit_code) == ("failed", 1)
    assert "could not be started" in Path(queue.attempts(job.id)[0]["log"]).read_text()


def test_one_after_the_other_and_none_overtakes_for_want_of_slots(queue: Queue) -> None:
    for slots in (1, 3, 2, 1):
        add(queue, "0", gpu_slots=slots)
    here = ["0", "1"]

    def claim() -> Claim | None:
        return Claims(queue).take("worker", here, 60)

    first = claim()
    # Job 2 wants three slots, which this worker never has: another worker's.
    assert first is not None and (first.job.id, first.slots) == (1, ("0",))
    # Job 3 wants both, one is free: job 4 would fit, and waits its turn.
    assert claim() is None
    Claims(queue).settle(first, code=0, asked=None, seconds=1.0)
    third = claim()
    assert third is not None and (third.job.id, third.slots) == (3, ("0", "1"))
    assert claim() is None
    Claims(queue).settle(third, code=0, asked=None, seconds=1.0)
    fourth = claim()
    assert fourth is not None and fourth.job.id == 4
    large = Claims(queue).take("large", ["0", "1", "2", "3"], 60)
    # Slots are the machine's: what one worker holds no other takes.
    assert large is not None and (large.job.id, large.slots) == (2, ("1", "2", "3"))


def test_a_job_sees_the_gpus_that_it_has(queue: Queue, mark: str) -> None:
    job = add(queue, "0", gpu_slots=2)
    worker(queue, slots=("4", "5", "7"), on_gpu=True).work(once=True)
    assert (job.out / "attempts").read_text() == "4,5\n"


def driver_files(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Has this machine look as if its drivers had put these files into /dev, and no others."""
    entries = [Path("/dev") / name for name in names]
    monkeypatch.setattr(Path, "glob", lambda *_: [entry for entry in entries if entry.name.startswith("nvidia")])
    monkeypatch.setattr(Path, "exists", lambda path: path in entries)


def test_slots_are_those_named_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_files(monkeypatch, "nvidia0", "nvidia1", "nvidiactl")
    assert slots_here(["1", "0"], None) == (("1", "0"), True)
    assert slots_here(["GPU-8932f937", "MIG-GPU-8932f937/1/0"], None)[1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert slots_here(None, None) == (("2", "5"), True)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert slots_here(None, None) == (("0",), False)
        assert slots_here(None, 3) == (("0", "1", "2"), False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slots_here(None, None) == (("0", "1"), True)
    driver_files(monkeypatch)
    assert slots_here(None, None) == (("0",), False)
    driver_files(monkeypatch, "dxg")
    assert slots_here(["3"], None) == (("3",), True)  # how many there are cannot be seen


@pytest.mark.parametrize(
    ("gpus", "num", "visible", "sentence"),
    [
        (["0"], 2, "", "--gpus names some; give one of them"),
        (None, 2, "2,5", "this one has 2,5; leave it out"),
        (["-1"], None, "", "--gpus '-1' names no GPU"),
        (["a"], None, "", "--gpus 'a' names no GPU"),
        (["0", "1 2"], None, "", "--gpus '0,1 2' names no GPU"),
        (["0", "0"], None, "", "or one twice"),
        (["0", "2"], None, "", "there is no GPU 2 here; they are numbered from 0 to 1"),
        (["9" * 5000], None, "", "names no GPU"),
        (None, None, "0,,1", "CUDA_VISIBLE_DEVICES '0,,1' names no GPU"),
        (None, None, "a", "CUDA_VISIBLE_DEVICES 'a' names no GPU"),
    ],
)
def test_slots_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str] | None, num: int | None, visible: str, sentence: str
) -> None:
    driver_files(monkeypatch, "nvidia0", "nvidia1", "nvidiactl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=sentence):
        slots_here(gpus, num)


def test_gpus_are_not_named_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_files(monkeypatch)
    for name in ("0", "GPU-8932f937"):
        with pytest.raises(UserError, match="this machine has none"):
            slots_here([name], None)


def test_two_workers_never_take_one_job(queue: Queue, mark: str, tmp_path: Path) -> None:
    """Twenty-four jobs, three real workers: each job is begun once."""
    # They wait before there is a job, and a job takes longer than to look for one. Each has a slot that the one before
    # it has not: whoever finds a slot free takes the next job at once, and would do them all.
    processes = [start(queue, slots=f"{number},{number + 1}") for number in range(3)]
    jobs = [add(queue, "slow") for _ in range(24)]
    try:
        wait_for(lambda: not queue.jobs(states=ACTIVE), 120)
    finally:
        for process in processes:
            process.terminate()
        # One that has not read its modules yet ends by the signal itself.
        assert {process.wait(20) for process in processes} <= {0, -signal.SIGTERM}
    assert all(job.state == "done" for job in queue.jobs())
    assert [len(queue.attempts(job.id)) for job in jobs] == [1] * 24
    assert all((job.out / "attempts").read_text() == "-\n" for job in jobs)
    assert len({attempt["worker"] for job in jobs for attempt in queue.attempts(job.id)}) > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_stop_has_its_jobs_checkpoint(
    queue: Queue, mark: str, number: signal.Signals
) -> None:
    job = add(queue, "wait 0")
    process = start(queue)
    wait_for((job.out / "ready").exists)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert marked(mark) == []
    assert (job.out / "checkpoint").read_text() == "there"
    assert queue.job(job.id).state == "interrupted"
    # The next worker goes on with it.
    assert run_all(queue) == ["done"]


def test_a_job_that_does_not_stop_is_killed_after_its_grace(queue: Queue, mark: str) -> None:
    job = add(queue, "deaf", termination_grace_period_seconds=0.3)
    process = start(queue)
    wait_for((job.out / "ready").exists)
    process.terminate()
    assert process.wait(20) == 0
    assert queue.job(job.id).state == "interrupted"


def test_a_second_ctrl_c_does_not_wait(queue: Queue, mark: str) -> None:
    job = add(queue, "deaf", termination_grace_period_seconds=600.0)
    process = start(queue)
    wait_for((job.out / "ready").exists)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(20) != 0
    assert marked(mark) == []
    assert queue.job(job.id).state == "interrupted"


def test_a_killed_worker_leaves_no_process_and_the_next_one_resumes(queue: Queue, mark: str) -> None:
    job = add(queue, "wait 0")
    process = start(queue)
    wait_for((job.out / "ready").exists)
    process.kill()
    process.wait()
    wait_for(lambda: marked(mark) == [])
    # The keeper had the job write its checkpoint, and told how it ended.
    assert (job.out / "checkpoint").read_text() == "there"
    assert queue.job(job.id).state == "running"
    time.sleep(1.1)
    assert run_all(queue) == ["done"]
    assert [attempt["exit_code"] for attempt in queue.attempts(job.id)] == [75, 0]


def test_a_killed_keeper_takes_the_job_with_it(queue: Queue, mark: str) -> None:
    job = add(queue, "wait 0")
    process = start(queue)
    wait_for((job.out / "ready").exists)
    (row,) = queue.rows("SELECT pid FROM attempts")
    os.kill(row["pid"], signal.SIGKILL)
    wait_for(lambda: queue.job(job.id).state == "done")
    process.terminate()
    assert process.wait(20) == 0
    assert [attempt["state"] for attempt in queue.attempts(job.id)] == ["interrupted", "done"]


def test_a_keeper_that_fails_by_itself_is_a_failure_and_not_tried_for_ever(queue: Queue, mark: str) -> None:
    """It cannot write how the job ended: where the file would be written there is a folder."""
    job = add(queue, "0", backoff_limit=1)
    for number in range(1, 20):
        (queue.job_folder(job.id) / f"attempt-{number}.exit.tmp").mkdir()
    assert run_all(queue) == ["failed"]
    assert [attempt["state"] for attempt in queue.attempts(job.id)] == ["waiting", "failed"]
    assert "its keeper failed (exit code 1)" in (queue.job(job.id).reason or "")


def test_worker_and_keeper_killed_at_once_leave_what_the_next_worker_ends(queue: Queue, mark: str) -> None:
    job = add(queue, "wait 0")
    process = start(queue)
    wait_for((job.out / "ready").exists)
    (row,) = queue.rows("SELECT pid FROM attempts")
    process.kill()
    os.kill(row["pid"], signal.SIGKILL)
    process.wait()
    # What the job started in a session of its own is nobody's now.
    wait_for(lambda: len(marked(mark)) == 2)
    time.sleep(1.1)
    assert run_all(queue) == ["done"]
    assert marked(mark) == []


def test_a_worker_that_stands_still_keeps_its_job(queue: Queue, mark: str) -> None:
    """Its lease runs out, and its job is alive: nobody starts a second one."""
    job = add(queue, "wait 0")
    process = start(queue)
    wait_for((job.out / "ready").exists)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    other = start(queue)
    time.sleep(0.8)
    assert (job.out / "attempts").read_text() == "-\n"
    process.send_signal(signal.SIGCONT)
    for one in (process, other):
        one.terminate()
        assert one.wait(20) == 0
    assert queue.job(job.id).state in ("interrupted", "done")


def test_a_claim_that_was_lost_before_it_began_never_begins(queue: Queue, mark: str) -> None:
    """A worker that was asleep between taking a job and starting it finds that another one has it."""
    job = add(queue, "wait")
    slow = Claims(queue).take("slow", ["0"], 0.0)
    assert slow is not None
    time.sleep(0.01)
    (lapsed,) = Claims(queue).lapsed()
    assert Claims(queue).settle_lapsed(lapsed) is not None
    attempt = Attempt(slow.token, Claims(queue).exit_file(slow), queue.log_file(job.id, slow.number))
    process = attempt.start(["touch", str(job.spec.out)], cwd=Path("/"), environment=os.environ, grace=1)
    assert not Claims(queue).register(slow, process)
    attempt.abandon()
    wait_for(attempt.has_ended)
    assert attempt.code is None and not job.spec.out.exists()
    assert Claims(queue).settle(slow, code=0, asked=None, seconds=1.0) is None
    assert queue.job(job.id).state == "interrupted"


def test_a_process_is_known_by_more_than_its_number() -> None:
    sleeper = subprocess.Popen(["sleep", "1000"])
    ticks = int(Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19])
    assert Identity(boot_id(), sleeper.pid, ticks).is_alive
    assert not Identity(boot_id(), sleeper.pid, ticks + 1).is_alive
    assert not Identity("another boot", sleeper.pid, ticks).is_alive
    sleeper.kill()
    # Dead and not yet buried.
    wait_for(lambda: not Identity(boot_id(), sleeper.pid, ticks).is_alive)
    sleeper.wait()


def test_leftovers_are_found_by_their_token() -> None:
    environment = {**os.environ, "DISTILL_ATTEMPT": "a-token"}
    sleepers = [subprocess.Popen(["sleep", "1000"], env=environment, start_new_session=True) for _ in range(2)]
    bystander = subprocess.Popen(["sleep", "1000"], env={**os.environ, "DISTILL_ATTEMPT": "a-token-2"})
    buried = threading.Thread(target=lambda: [sleeper.wait() for sleeper in sleepers])
    buried.start()
    assert end_leftovers("a-token")
    buried.join()
    assert [sleeper.returncode for sleeper in sleepers] == [-signal.SIGKILL] * 2
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_cancelling_and_retrying(queue: Queue, mark: str) -> None:
    waiting, running = add(queue, "0"), add(queue, "wait 0")
    assert queue.cancel(waiting.id).state == "cancelled"
    process = start(queue)
    wait_for((running.out / "ready").exists)
    assert queue.cancel(running.id).state == "running"
    wait_for(lambda: queue.job(running.id).state == "cancelled")
    assert (running.out / "checkpoint").exists()
    with pytest.raises(UserError, match="nothing to cancel"):
        queue.cancel(running.id)
    queue.retry(running.id)
    wait_for(lambda: queue.job(running.id).state == "done")
    with pytest.raises(UserError, match="is done"):
        queue.retry(running.id)
    process.terminate()
    assert process.wait(20) == 0


def test_a_cancelled_job_stays_cancelled_when_its_worker_dies(queue: Queue, mark: str) -> None:
    job = add(queue, "deaf", termination_grace_period_seconds=0.5)
    process = start(queue)
    wait_for((job.out / "ready").exists)
    queue.cancel(job.id)
    process.kill()
    process.wait()
    time.sleep(1.1)
    assert run_all(queue) == ["cancelled"]
    assert len(queue.attempts(job.id)) == 1


def test_the_time_limit_counts_over_attempts(queue: Queue, mark: str) -> None:
    job = add(queue, "wait", active_deadline_seconds=1)
    with queue.transaction() as connection:
        connection.execute("UPDATE jobs SET seconds = 0.8")
    begin = time.monotonic()
    assert run_all(queue) == ["failed"]
    assert time.monotonic() - begin < 10
    found = queue.job(job.id)
    assert "active_deadline_seconds" in (found.reason or "") and found.seconds > 1


def test_a_full_disk_is_a_sentence_and_changes_nothing(queue: Queue) -> None:
    """SQLite's own refusal: the file may not grow."""
    (pages,) = queue.rows("PRAGMA page_count")[0]
    queue.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DistillError, match="could not be changed: database or disk is full; nothing was"):
        for _ in range(1000):
            add(queue, "0")
    added = len(queue.jobs())
    assert added < 1000
    queue.rows("PRAGMA max_page_count = 100000")
    add(queue, "0")
    assert len(queue.jobs()) == added + 1


def test_once_says_how_it_ended(queue: Queue, mark: str) -> None:
    add(queue, "0")
    assert exit_code(worker(queue).work(once=True)) == 0
    add(queue, "75", backoff_seconds=60.0)
    add(queue, "2")
    assert exit_code(worker(queue).work(once=True)) == 75
    add(queue, "2")
    assert exit_code(worker(queue).work(once=True)) == 1
    assert exit_code(worker(queue).work(once=True)) == 0


def test_a_job_that_is_too_large_is_said_once_and_left(
    queue: Queue, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(queue, "wait 0", active_deadline_seconds=1)
    large = add(queue, "0", gpu_slots=2)
    jobs = worker(queue).work(once=True)
    assert [(job.id, job.state) for job in jobs] == [(1, "failed"), (large.id, "queued")]
    assert exit_code(jobs) == 75
    assert capsys.readouterr().err.count("job 2 (job) waits for another worker: gpu_slots is 2, here 1") == 1
    assert exit_code(worker(queue, slots=("0", "1")).work(once=True)) == 0


@pytest.mark.parametrize("lost", ["before it begins", "while it runs", "before it is settled"])
def test_a_claim_that_was_lost_counts_as_one_to_go_on_with(
    queue: Queue, mark: str, lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(queue, "deaf" if lost == "while it runs" else "0")
    looks = worker(queue, lease_seconds=0.4)
    method = {"before it begins": "register", "while it runs": "beat", "before it is settled": "settle"}[lost]
    own = getattr(Claims, method)

    def beaten(claims: Claims, claim: Claim, *rest: Any, **more: Any) -> Any:
        """Another worker has the job since just now."""
        with queue.transaction() as connection:
            connection.execute("UPDATE attempts SET finished = 1, state = 'interrupted'")
        return own(claims, claim, *rest, **more)

    monkeypatch.setattr(Claims, method, beaten)
    jobs = looks.work(once=True)
    assert [job.id for job in jobs] == [1] and exit_code(jobs) == 75
    assert "another worker has taken it over" in capsys.readouterr().err


def test_prompts_are_copied_when_the_job_begins_and_stay(queue: Queue, mark: str, tmp_path: Path) -> None:
    """A run that is resumed refuses prompts that grew meanwhile."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1="}\n')
    config = {"name": "job", "prompts": {"kind": "file", "path": "prompts.jsonl"}, "student": {"model": "nano"}}
    spec = JobSpec(
        "job", tmp_path, tmp_path / "out", ScheduleSettings(backoff_seconds=0.01), (RunSpec("", config),), False
    )
    job = queue.add(spec)
    folder = queue.job_folder(job.id)
    folder.mkdir(parents=True)
    (folder / "words").write_text("75 0")
    worker(queue).work(once=True)
    prompts.write_text("")
    assert run_all(queue) == ["done"]
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    assert Path(recipe["prompts"]["path"]).read_text() == '{"prompt": "1+1="}\n'
    prompts.unlink()
    gone = queue.add(spec)
    worker(queue).work(once=True)
    assert queue.job(gone.id).state == "failed" and queue.job(gone.id).exit_code == 2
    assert json.dumps(queue.job(gone.id).to_json())
