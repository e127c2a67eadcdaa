"""Which servers a run uses: its own, side by side and one role at a time, or those it was given."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from test_client import Answer, pooled, serving
from test_service import FAKE, alive

from distill import cli
from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.config import RunConfig
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.journal import Journal
from distill.vllm.launch import Launch
from distill.vllm.served import is_healthy
from distill.vllm.service import Service, free_port
from pipelines.hiring import Shifts, api_key, found_servers, hired_teacher, server_launches
from pipelines.resolution import resolve_run


def test_servers_that_run_already_are_sorted_by_what_they_are_for() -> None:
    def having(route: str) -> Answer:
        return 405, {}, route.encode()

    def get(there: str, path: str) -> Answer:
        return having(path) if path == there else (404, {}, b"")

    def post(path: str, body: dict[str, object]) -> Answer:
        return pooled(body)

    with (
        serving(post, get=lambda path: get("/pooling", path)) as one,
        serving(post, get=lambda path: get("/v1/completions", path)) as two,
        serving(post, get=lambda path: get("/pooling", path)) as three,
    ):
        config = resolve_run(assignments=found_servers([one, two, three]))
    assert config.teacher.backend == "vllm"
    assert config.teacher.urls.score == (one, three) and config.teacher.urls.generate == (two,)


@pytest.mark.parametrize("key", ["s3cret\n", "s3 cret", "s3cr\u00e9t"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line's end comes with many a file that a key is read from; the servers would be waited for in vain."""
    monkeypatch.setenv("DISTILL_TEACHER_API_KEY", key)
    with pytest.raises(UserError, match=r"^DISTILL_TEACHER_API_KEY holds a space, a line's end or ") as refused:
        found_servers(["http://127.0.0.1:9"])
    assert "s3" not in str(refused.value)
    monkeypatch.setenv("DISTILL_TEACHER_API_KEY", "")
    assert api_key() is None


def test_a_dry_run_waits_for_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where one stands may be a run already, by the README's first command

    def post(path: str, body: dict[str, object]) -> Answer:
        return pooled(body)

    with (
        serving(post, get=lambda path: (405 if path == "/pooling" else 404, {}, b"")) as there,
        serving(post, get=lambda path: (404, {}, b"")) as other,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        hung = f"http://127.0.0.1:{silent.getsockname()[1]}"
        gone = f"http://127.0.0.1:{free_port('127.0.0.1')}"

        def typed(*urls: str) -> int:
            words = [word for url in urls for word in ("--teacher-url", url)]
            monkeypatch.setattr(sys, "argv", ["distill", "run", "--dry-run", "--json", *words])
            return cli._exit_code()

        began = time.monotonic()
        assert typed(there, hung, gone) == 0 and time.monotonic() - began < 60  # a run waits for minutes
        document = json.loads(capsys.readouterr().out)
        assert document["config"]["teacher"]["urls"] == {"generate": [], "score": [there]}
        assert document["config"]["teacher"]["backend"] == "vllm"
        for step, url in zip(document["plan"], (hung, gone), strict=False):
            assert step.startswith(f"wait for the teacher's server {url}, which does not answer now (")
        # What the run would refuse is refused.
        for url, said in ((other, "neither scores nor generates"), ("gpu-1:8000", "is no URL")):
            assert typed(url) == 2 and said in capsys.readouterr().err


def test_a_server_may_move_while_a_run_rests_and_nothing_else_may_change(tmp_path: Path) -> None:
    def begun(*assignments: str) -> None:
        journal = Journal(tmp_path / "run", resolve_run(assignments=["teacher.backend=vllm", *assignments]))
        try:
            journal.manifest({"command": "a test"})
        finally:
            journal.close()

    begun('teacher.urls.score=["http://gpu-1:8000"]')
    begun('teacher.urls.score=["http://gpu-2:8000", "http://gpu-3:8000"]', "teacher.patience_seconds=60")
    with pytest.raises(UserError, match=r"teacher\.wire is 'bf16' there and 'fp32' here"):
        begun('teacher.urls.score=["http://gpu-1:8000"]', "teacher.wire=fp32")


def test_replicas_of_a_role_are_up_together_and_leave_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.service.GRACE_SECONDS", 0.5)

    program = tmp_path / "fake"
    program.write_text(FAKE.format(python=sys.executable, fails=False))
    program.chmod(0o755)
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    config = resolve_run(assignments=["teacher.backend=vllm", "teacher.replicas=2"])
    launches = {
        role: server_launches(config, teacher, role, on_gpu=False, devices=["0", "1"]) for role in ("score", "generate")
    }
    assert [one.environment()["VLLM_CPU_OMP_THREADS_BIND"] for one in launches["score"]] == ["0", "1"]
    monkeypatch.setattr(Launch, "command", lambda launch, port: [str(program), "--port", str(port)])
    shifts = Shifts(launches, tmp_path / "logs")  # type: ignore[arg-type]
    try:
        shifts.begin("score")
        assert all(map(is_healthy, shifts.urls("score"))) and len(set(shifts.urls("score"))) == 2
        groups = [service.group for service in shifts._on_duty]
        shifts.begin("generate")
        assert all(map(is_healthy, shifts.urls("generate")))
        assert not any(map(is_healthy, shifts.urls("score"))) and not any(map(alive, groups))
    finally:
        shifts.end()
    assert not any(map(is_healthy, shifts.urls("generate")))


def test_no_server_is_started_for_a_role_that_has_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(service: Service) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(Service, "start", refuse)
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    with serving(lambda path, body: pooled(body)) as url:
        urls = [f'teacher.urls.{role}=["{url}"]' for role in ("score", "generate")]
        # More GPUs than there are would be refused if a server of our own had to be started.
        config: RunConfig = resolve_run(assignments=["teacher.backend=vllm", "teacher.replicas=999", *urls])
        encoder = Encoder(load_tokenizer(teacher))
        cpu = torch.device("cpu")
        with hired_teacher(config, teacher, encoder, device=cpu, logs=tmp_path, choose=lambda rollouts: []) as hired:
            assert hired.judge.name == "tiny"
