"""A sweep: its runs one after the other, one store, one teacher; how it stops, goes on and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import RunConfig
from distill.interrupt import deferred_signals
from distill.recipe import dump_yaml
from pipelines import sweep
from pipelines.job import is_teacher_ours, resolve_job
from pipelines.preparation import distill_run, prepare
from pipelines.queue import Queue
from pipelines.resolution import resolve_recipe
from pipelines.worker import Worker

TINY = """
extends: embedded
store: {store}
stages:
  off_policy: {{num_prompts: 16, batch_size: 8, epochs: 1}}
  on_policy: {{steps: 2, prompts_per_step: 4}}
evaluation: {{num_questions: 4, references: false}}
checkpoint_every: 1
"""


def laid_down(folder: Path, num: int) -> Path:
    """A sweep's job.json, of runs that nobody will really run."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_yaml(resolve_recipe({"extends": "embedded"}, where="here")))
    runs = [{"recipe": str(recipe), "out": str(folder / str(number))} for number in range(num)]
    file = folder / "job.json"
    file.write_text(json.dumps({"runs": runs, "share_teacher": True}))
    return file


ENDING = "import os, sys; code = int(sys.argv[1]); os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"


def exiting(*codes: int, begun: list[str]) -> Callable[[dict[str, str]], list[str]]:
    """Runs that do nothing but end, each with its code."""

    def command(entry: dict[str, str]) -> list[str]:
        begun.append(Path(entry["out"]).name)
        return [sys.executable, "-c", ENDING, str(codes[int(begun[-1])])]

    return command


@pytest.mark.parametrize(
    ("codes", "expected", "num_begun"),
    [
        ((0, 0, 0), 0, 3),
        # One that fails does not keep the others from running; what a retry may help counts for the whole.
        ((2, 0, 0), 2, 3),
        ((1, 2, 0), 1, 3),
        ((120, 0, 0), 1, 3),
        ((2, -9, 0), 1, 3),
        ((0, 75, 0), 75, 2),
        ((130, 0, 0), 130, 1),
    ],
)
def test_the_exit_code_of_a_sweep(tmp_path: Path, codes: tuple[int, ...], expected: int, num_begun: int) -> None:
    begun: list[str] = []
    assert sweep.run_sweep(laid_down(tmp_path, 3), exiting(*codes, begun=begun)) == expected
    assert begun == ["0", "1", "2"][:num_begun]


def test_what_is_done_is_passed_over(tmp_path: Path) -> None:
    file, begun = laid_down(tmp_path, 3), list[str]()
    for number in (0, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text("{}")
    assert sweep.run_sweep(file, exiting(0, 0, 0, begun=begun)) == 0
    assert begun == ["1"]


def test_a_signal_goes_on_to_the_run(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); open(sys.argv[1], 'w'); time.sleep(60)"
    )
    ready = tmp_path / "ready"

    def terminate() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with deferred_signals():
        code = sweep.run_sweep(laid_down(tmp_path, 2), lambda entry: [sys.executable, "-c", script, str(ready)])
    assert code == 75


def test_whose_the_teacher_is() -> None:
    def is_ours(**teacher: Any) -> bool:
        return is_teacher_ours(RunConfig.model_validate({"teacher": teacher}))

    assert is_ours(backend="vllm") and not is_ours(backend="local")
    assert not is_ours(backend="vllm", urls={"generate": ["http://a"], "score": ["http://b"]})


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/summary.json")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_shares_one_store_and_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = TINY.format(store=tmp_path / "store")
    text += "sweep: {runs: [{student: {model: nano}}, {student: {model: nano-moe}}]}\n"
    queue = Queue(tmp_path / "queue")
    job = queue.add(resolve_job(written(tmp_path / "sizes.yaml", text)))
    prepare(queue, job, last=None)
    # Killed in its second run.
    process = subprocess.Popen(distill_run(queue.job_folder(job.id)), start_new_session=True)
    second = job.out / "tiny-to-nano-moe"
    while not (second / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert set(summaries(job.out)) == {"tiny-to-nano"}
    Worker(queue, poll_seconds=0.1).work(once=True)
    assert queue.job(job.id).state == "done"
    found = summaries(job.out)
    first, other = (found[name]["costs"]["teacher_generate"] for name in ("tiny-to-nano", "tiny-to-nano-moe"))
    assert first["tokens"] > 0 and other["tokens"] == 0 and other["reused_tokens"] == first["tokens"]


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1500)
def test_a_sweep_shares_one_teachers_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = TINY.format(store=tmp_path / "store")
    text += "teacher: {backend: vllm}\nsweep: {runs: [{name: a}, {name: b, seed: 1}]}\n"
    queue = Queue(tmp_path / "queue")
    job = queue.add(resolve_job(written(tmp_path / "seeds.yaml", text)))
    Worker(queue, poll_seconds=0.2).work(once=True)
    log = Path(queue.attempts(job.id)[0]["log"]).read_text()
    assert queue.job(job.id).state == "done", log
    assert set(summaries(job.out)) == {"a", "b"}
    # Each role was started once, for both runs, and by none of them.
    assert log.count("starting vLLM to generate") == 1 == log.count("starting vLLM to score")
    servers = job.out / "servers"
    assert sorted(path.name for path in servers.iterdir()) == ["generate.log", "score.log"]
    assert not any((job.out / name / "servers").exists() for name in ("a", "b"))
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in left.splitlines() if "vllm" in line and str(tmp_path) in line]
