"""Ctrl-C at random moments of the commands that work for long: no process is left, and what can go on goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shapes import assert_document

from pipelines.phases import reproducible

SMALL = (
    "stages.off_policy.num_prompts=32",
    "stages.off_policy.batch_size=16",
    "stages.on_policy.steps=4",
    "stages.on_policy.prompts_per_step=8",
    "evaluation.num_questions=4",
    "checkpoint_every=2",
)
RUN = ["run", *(word for text in SMALL for word in ("--set", text))]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell has what it runs in the background ignore Ctrl-C, and that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(words: list[str], mark: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and standard error of a command whose terminal got a Ctrl-C after so many seconds."""
    command = [sys.executable, "-m", "distill.cli", *words]
    environment = {**os.environ, **mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells all that run in its foreground
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def left(mark: dict[str, str]) -> list[int]:
    """Processes that have ``mark`` in their environment, after two seconds to end in."""
    ((name, value),) = mark.items()
    wanted = f"{name}={value}".encode()
    deadline = time.monotonic() + 2
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_goes_on_after_any_number_of_them(tmp_path: Path, processes: str) -> None:
    """Its numbers are those of a run that nobody disturbed."""
    mark, chance = {"DISTILL_MARK": str(tmp_path)}, random.Random(0)

    def words(name: str) -> list[str]:
        places = ["--out", str(tmp_path / name), "--store", str(tmp_path / f"{name}-store")]
        return [*RUN, *places, "--processes", processes]

    began = time.monotonic()
    code, stderr = interrupted(words("reference"), mark, 250)
    assert code == 0, stderr
    whole = time.monotonic() - began
    codes: Counter[int] = Counter()
    for number in range(12):
        code, stderr = interrupted(words("run"), mark, chance.uniform(0.1, 0.7 * whole))
        codes[code] += 1
        assert code in (0, 130, -signal.SIGINT), stderr
        # What Python itself says of an import that was interrupted is not ours.
        assert code == -signal.SIGINT or "Traceback" not in stderr, stderr
        assert not left(mark), f"round {number}: a process is left"
    code, stderr = interrupted(words("run"), mark, 250)
    assert code == 0, stderr
    print(codes)
    assert codes[130] > 0
    ours, theirs = (
        [reproducible(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "reference")
    )
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["eval", "tiny", "--questions", "2000"],
        ["plan", "--calibrate"],
        ["doctor"],
        ["preview", "--first", "2000"],
        ["run", "--recipe", "table21", "--quick"],
    ],
    ids=lambda words: words[0],
)
def test_nothing_is_left_of_a_command(words: list[str], tmp_path: Path) -> None:
    mark, chance = {"DISTILL_MARK": str(tmp_path)}, random.Random(1)
    store = f"common.store={tmp_path / 'store'}"
    out = ["--out", str(tmp_path / "out"), "--set", store] if words[0] == "run" else []
    codes: Counter[int] = Counter()
    for number in range(8):
        code, stderr = interrupted([*words, *out], mark, chance.uniform(0.1, 8.0))
        codes[code] += 1
        assert code in (0, 1, 130, -signal.SIGINT) and (code != 1 or words[0] == "doctor"), stderr
        assert code == -signal.SIGINT or "Traceback" not in stderr, stderr
        assert not left(mark), f"round {number}: a process is left"
    print(codes)


SERVE = ["teacher", "serve", "--teacher", "tiny", "--role", "score", "--json"]
TURNS = 3


@pytest.mark.server
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_no_server_of_a_teacher_is_left(number: signal.Signals, tmp_path: Path) -> None:
    """Asked to stop once it answers, then at random moments of its start; to be stopped is how it ends: exit code 0."""
    mark, chance = {"DISTILL_MARK": str(tmp_path)}, random.Random(number)
    command = [sys.executable, "-m", "distill.cli", *SERVE, "--log", str(tmp_path / "teacher.log")]
    codes: Counter[int] = Counter()
    whole = 0.0
    for turn in range(TURNS):
        process = subprocess.Popen(
            command,
            env={**os.environ, **mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            began = time.monotonic()
            if not whole:
                assert_document("teacher serve", process.stdout.readline())
                whole = time.monotonic() - began
                assert len(left(mark)) >= 4  # the command, the watcher, the API server, the engine
            else:
                time.sleep(whole * (turn - chance.random()) / (TURNS - 1))  # one in each stretch of its start
            # A terminal tells all that run in its foreground, whoever ends a service that process alone.
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        codes[process.returncode] += 1
        # Before its own modules are loaded it ends as every program does.
        early = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (-signal.SIGTERM,)}[number]
        assert process.returncode in (0, *(early if turn else ())), stderr
        assert process.returncode == -signal.SIGINT or "Traceback" not in stderr, stderr
        if stdout:
            assert_document("teacher serve", stdout)
        assert not left(mark), f"turn {turn}: a process is left"
    print(codes, f"{whole:.1f} s to start")
    assert codes[0] > 1
