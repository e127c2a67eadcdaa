"""Several processes of one run and one vLLM server of its own: the curve of one process, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_parallel import assert_same_curve, metrics, start

from distill.errors import UserError
from pipelines.student_sampling import _check_one_machine
from students.ranks import Ranks

SETTINGS = {"sampler.backend": "vllm", "evaluation.curve": "{every: 2, num_questions: 4}"}


def run(out: Path, processes: int, **changes: str) -> subprocess.Popen[str]:
    return start(out, processes, **{**SETTINGS, **changes})


def finish(out: Path, processes: int, **changes: str) -> dict[str, Any]:
    stdout, stderr = (process := run(out, processes, **changes)).communicate(timeout=500)
    assert process.returncode == 0, stderr[-3000:]
    return dict(json.loads(stdout))


@pytest.mark.server
@pytest.mark.timeout(900)
def test_two_processes_and_their_server_give_the_curve_of_one(tmp_path: Path) -> None:
    summaries = {
        kind: finish(tmp_path / kind, processes, **{"student.parallel": kind, "student.micro_batch_tokens": "192"})
        for kind, processes in (("auto", 1), ("sharded", 2), ("replicated", 2))
    }
    for kind in ("sharded", "replicated"):
        assert_same_curve(tmp_path / kind, tmp_path / "auto")
        gaps = [row["sampler.gap"] for row in metrics(tmp_path / kind) if row["stage"] == "on_policy"]
        assert len(gaps) == 4
        assert all(0 <= gap <= 1e-4 for gap in gaps)
        assert [one["mean"] for one in summaries[kind]["scores"]] == [
            one["mean"] for one in summaries["auto"]["scores"]
        ]
        log = (tmp_path / kind / "servers" / "student.log").read_text()
        assert log.count("Started server process") == 1


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_server_that_dies_ends_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = run(out, 2, **{"stages.on_policy.steps": "1000"})
    while len(metrics(out)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    words = {one.pid: one.cmdline() for one in psutil.Process(process.pid).children(recursive=True)}
    (server,) = (pid for pid, line in words.items() if "vllm.entrypoints" in " ".join(line) and "-I" not in line)
    os.kill(server, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr[-3000:]
    assert "the student's vLLM server (generate) ended unexpectedly" in stderr


def test_a_server_that_some_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, item: [item, "elsewhere"])
    with pytest.raises(UserError, match=r"starts a server that its own machine alone can reach, and .*elsewhere"):
        _check_one_machine(Ranks(0, 2))
