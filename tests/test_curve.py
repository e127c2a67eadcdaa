"""Learning curves: apart from the final questions, deterministic under resume, and what ends a stage early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import UserError
from eval.tasks import load_task
from pipelines.curve import _validation_task, best_point
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run

SMALL = [
    "stages.off_policy.num_prompts=48",
    "stages.off_policy.batch_size=16",
    "stages.on_policy.steps=6",
    "stages.on_policy.prompts_per_step=8",
    "evaluation.num_questions=8",
    "evaluation.curve={every: 2, num_questions: 8}",
    "checkpoint_every=2",
]


def points(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points(out)]


def test_validation_questions_are_no_final_questions() -> None:
    config = resolve_run(assignments=["evaluation.curve={num_questions: 300}"])
    final = load_task("embedded", num_questions=1000)
    validation = _validation_task(config, [final])
    assert len(validation.prompts) == 300
    assert not {prompt.id for prompt in validation.prompts} & {prompt.id for prompt in final.prompts}


def test_a_task_that_shares_questions_with_the_final_one_is_refused() -> None:
    config = resolve_run(assignments=["evaluation.curve={task: embedded, num_questions: 20}"])
    with pytest.raises(UserError, match=r"shares 20 questions with the task 'embedded'"):
        _validation_task(config, [load_task("embedded", num_questions=20)])


def test_stop_needs_a_stage_and_a_curve() -> None:
    with pytest.raises(UserError, match="'rl'"):
        resolve_run(assignments=["stop.rl.score=0.5", "evaluation.curve.every=2"])
    with pytest.raises(UserError, match=r"stop needs evaluation\.curve"):
        resolve_run(assignments=["stop.on_policy.score=0.5"])


def finished(folder: Path, *more: str) -> Path:
    """A run with a store of its own: what an earlier run left there would cost nothing again."""
    run(resolve_run(assignments=[*SMALL, f"store={folder / 'store'}", *more]), folder / "run", command=["test"])
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("curve"))


def test_a_curve_has_the_start_every_second_step_and_the_end(whole: Path) -> None:
    places = [(point["stage"], point["step"], point["global_step"]) for point in points(whole)]
    assert places == [
        *(("off_policy", step, step) for step in (0, 2, 4, 6)),
        *(("on_policy", step, 6 + step) for step in (0, 2, 4, 6)),
    ]
    on_policy = [point for point in points(whole) if point["stage"] == "on_policy"]
    assert [point["flops"] for point in on_policy] == sorted(point["flops"] for point in on_policy)
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    spent = sum(line["flops"] for line in metrics if line["stage"] == "on_policy")
    assert on_policy[0]["flops"] == 0 and on_policy[-1]["flops"] == pytest.approx(spent)


def test_flops_end_a_stage(whole: Path, tmp_path: Path) -> None:
    goal = next(point["flops"] for point in points(whole) if (point["stage"], point["step"]) == ("on_policy", 4))
    out = finished(tmp_path, f"stop.on_policy.flops={goal}")
    assert timeless(out) == timeless(whole)[:-1]
    state = json.loads((out / "checkpoints" / "step_10" / "state.json").read_text())
    assert state["stage_end"] and len((out / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_score_ends_a_stage(tmp_path: Path) -> None:
    out = finished(tmp_path, "stop.off_policy.score=0.0")
    assert [point["step"] for point in points(out) if point["stage"] == "off_policy"] == [0]


def test_a_stage_ends_with_its_best_weights(whole: Path, tmp_path: Path) -> None:
    out = finished(tmp_path, "evaluation.curve.keep_best=true")
    best = best_point(points(out), "on_policy")
    assert best["scores"][0]["mean"] > points(out)[-1]["scores"][0]["mean"] or best["step"] < 6, "nothing to keep"
    kept = load_file(out / "checkpoints" / "best-on_policy.safetensors")
    student = load_file(out / "student" / "model.safetensors")
    assert all(torch.equal(tensor, student[name]) for name, tensor in kept.items() if name in student)
    last = load_file(whole / "student" / "model.safetensors")
    assert not torch.equal(kept["model.norm.weight"], last["model.norm.weight"])


def test_a_killed_run_has_the_same_curve(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.cli", "run", "--out", str(out)]
    command += [part for assignment in SMALL for part in ("--set", assignment)] + ["--store", str(tmp_path / "store")]
    for place in (3, 7):  # in the first stage, and right after the second one's first point
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if (out / "curve.jsonl").exists() and len((out / "curve.jsonl").read_text().splitlines()) >= place:
                    os.kill(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.02)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert timeless(out) == timeless(whole)
