"""Runs whose vLLM servers are killed, stopped or taken away: nothing is lost, doubled or left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest
from test_service import alive, wait_until_gone

from distill.checkpoint import open_checkpoint
from distill.errors import GoneError
from distill.family import resolve
from distill.vllm.launch import Launch, Role
from distill.vllm.served import is_healthy
from distill.vllm.service import Service

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_PROMPTS, NUM_STEPS = 600, 12
SETTINGS = (
    "teacher.backend=vllm",
    f"stages.off_policy.num_prompts={NUM_PROMPTS}",
    "stages.off_policy.epochs=1",
    f"stages.on_policy.steps={NUM_STEPS}",
    "stages.on_policy.prompts_per_step=16",
    "evaluation.num_questions=8",
    "checkpoint_every=2",
    # A dozen steps begin in the middle of what the student learns.
    "guards.truncation=null",
)


def start(root: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process of its own; it writes root/run, root/store and root/err."""
    command = [sys.executable, "-m", "distill.cli", "run", "--json", "--out", str(root / "run")]
    command += [part for assignment in SETTINGS for part in ("--set", assignment)]
    environment = {**os.environ, "DISTILL_STORE": str(root / "store")}
    with (root / "err").open("a") as errors:
        return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def finish(process: subprocess.Popen[str], root: Path, code: int = 0) -> str:
    stdout, _ = process.communicate(timeout=900)
    assert process.returncode == code, (root / "err").read_text()[-3000:]
    return stdout


def stored(root: Path) -> list[tuple[str, list[int]]]:
    """Key and token ids of every row of the store."""
    rows = []
    for shard in (root / "store").glob("*/part-*.parquet"):
        table = pyarrow.parquet.read_table(shard).to_pydict()
        rows += list(zip(table["key"], table["response_ids"], strict=True))
    return rows


def steps(root: Path, stage: str) -> list[dict[str, Any]]:
    path = root / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["stage"] == stage]


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)
    raise AssertionError("it took too long")


def servers(process: subprocess.Popen[str]) -> list[int]:
    """The groups of the run's vLLM servers: its children that lead one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if os.getpgid(pid) == pid]


def kill_server(process: subprocess.Popen[str], *, spare_watcher: bool) -> int:
    (group,) = servers(process)
    for pid in alive(group):
        if pid != group or not spare_watcher:
            os.kill(pid, signal.SIGKILL)
    return group


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start(root), root)
    return root


def check_store(root: Path, undisturbed: Path, *, before: list[tuple[str, list[int]]]) -> None:
    keys = [key for key, _ in stored(root)]
    assert len(keys) > NUM_PROMPTS / 2 and sorted(keys) == sorted({key for key, _ in stored(undisturbed)})
    assert dict(before).items() <= dict(stored(root)).items()


def test_kill_9_of_the_server_while_it_speaks_and_while_it_judges(tmp_path: Path, undisturbed: Path) -> None:
    process = start(tmp_path)
    before = until(lambda: stored(tmp_path), process)
    groups = [kill_server(process, spare_watcher=True)]
    assert len(before) < len(stored(undisturbed)), "the server was killed after its work"
    until(lambda: steps(tmp_path, "on_policy"), process)
    groups.append(kill_server(process, spare_watcher=False))
    assert len(steps(tmp_path, "on_policy")) < NUM_STEPS, "the server was killed after its work"
    summary = json.loads(finish(process, tmp_path))
    check_store(tmp_path, undisturbed, before=before)
    assert len(steps(tmp_path, "on_policy")) == NUM_STEPS
    assert "starting it again" in (tmp_path / "err").read_text()
    expected = json.loads((undisturbed / "run" / "summary.json").read_text())["costs"]["teacher_generate"]["tokens"]
    assert summary["costs"]["teacher_generate"]["tokens"] == pytest.approx(expected, rel=0.05)
    for group in groups:
        assert alive(group) == []


def test_kill_9_of_the_run_leaves_no_engine_and_the_same_command_resumes(tmp_path: Path, undisturbed: Path) -> None:
    process = start(tmp_path)
    before = until(lambda: stored(tmp_path), process)
    for until_then in (lambda: True, lambda: steps(tmp_path, "on_policy")):
        until(until_then, process)
        (group,) = servers(process)
        process.kill()
        process.communicate()
        wait_until_gone(group, 60)
        process = start(tmp_path)
    finish(process, tmp_path)
    check_store(tmp_path, undisturbed, before=before)
    assert [line["step"] for line in steps(tmp_path, "on_policy")] == list(range(NUM_STEPS))


def foreign(role: Role, log: Path, port: int | None = None) -> Service:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    service = Service(Launch(teacher, role, dtype="float32", max_model_len=512, on_gpu=False, port=port), log=log)
    service.start()
    service.wait()
    return service


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = foreign("generate", tmp_path_factory.mktemp("speaker") / "log")
    yield service
    service.stop()


def test_a_foreign_server_that_is_gone_stops_the_run_which_resumes_when_it_is_back(
    tmp_path: Path, undisturbed: Path, speaker: Service
) -> None:
    scorer = foreign("score", tmp_path / "log")
    urls = ("--teacher-url", scorer.url, "--teacher-url", speaker.url, "--set", "teacher.patience_seconds=3")
    try:
        process = start(tmp_path, *urls)
        until(lambda: steps(tmp_path, "on_policy"), process)
        assert servers(process) == []
        scorer.stop()
        finish(process, tmp_path, code=75)
        done = len(steps(tmp_path, "on_policy"))
        assert 0 < done < NUM_STEPS
        assert "the same command" in (tmp_path / "err").read_text()
        scorer = foreign("score", tmp_path / "log", port=scorer.port)
        finish(start(tmp_path, *urls), tmp_path)
    finally:
        scorer.stop()
    check_store(tmp_path, undisturbed, before=[])
    assert [line["step"] for line in steps(tmp_path, "on_policy")] == list(range(NUM_STEPS))


def test_an_engine_that_is_stopped_is_noticed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.service.PROBE_SECONDS", 1.0)
    monkeypatch.setattr("distill.vllm.service.STALL_SECONDS", 20.0)
    scorer = foreign("score", tmp_path / "log")
    try:
        first = scorer.group
        time.sleep(25)  # at rest for longer than that: the supervisor's own question keeps it alive
        assert scorer.group == first and is_healthy(scorer.url)
        engines = [pid for pid in alive(first) if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::Engine")]
        assert engines
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        assert is_healthy(scorer.url)  # vLLM itself does not notice
        wait_until_gone(first, 60)
        deadline = time.monotonic() + 200
        while not is_healthy(scorer.url) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert is_healthy(scorer.url) and scorer.group != first
        assert httpx.post(f"{scorer.url}/pooling", json={"model": "tiny", "input": [[1, 2]]}, timeout=60).is_success
    finally:
        scorer.stop()


def test_an_engine_that_is_killed_alone_is_noticed_though_a_request_waits_for_it(tmp_path: Path) -> None:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    launch = Launch(teacher, "generate", dtype="float32", max_model_len=512, on_gpu=False, max_restarts=0)
    launch = replace(launch, variables=(("VLLM_SERVER_DEV_MODE", "1"),))
    with Service(launch, log=tmp_path / "log") as service, ThreadPoolExecutor(1) as aside:
        service.wait()
        (engine,) = (
            pid for pid in alive(service.group) if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::Engine")
        )
        os.kill(engine, signal.SIGSTOP)
        # vLLM fails what it has to generate when its engine dies. This it waits for, and with it the whole server.
        waiting = aside.submit(httpx.post, f"{service.url}/reset_prefix_cache", timeout=None)
        time.sleep(1)
        os.kill(engine, signal.SIGKILL)
        wait_until_gone(service.group, 15)
        assert isinstance(waiting.exception(5), httpx.TransportError)
        time.sleep(0.5)
        with pytest.raises(
            GoneError, match=r"\(generate\) ended unexpectedly: it takes no connections any more; the last"
        ):
            service.check()
