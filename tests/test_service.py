"""Starting, supervising and ending servers, with a small program in vLLM's place that starts a child of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from distill.checkpoint import open_checkpoint
from distill.errors import DistillError
from distill.family import resolve
from teachers.client import is_healthy
from teachers.service import Launch, Service, needs_expert_parallel

FAKE = """#!{python}
import http.server, os, signal, subprocess, sys
if {fails}:
    sys.exit("the weights are too large for this toy")
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has to be killed, and so does its engine
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.service.GRACE_SECONDS", 0.5)


def launch(folder: Path, *, fails: bool = False) -> Launch:
    program = folder / "fake"
    program.write_text(FAKE.format(python=sys.executable, fails=fails))
    program.chmod(0o755)
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    return Launch(teacher, "score", dtype="float32", max_model_len=64, on_gpu=False, python=str(program))


def alive(group: int) -> list[int]:
    """Processes of the group that still run; one that only waits for init to take note of its end does not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (name) state ppid pgrp ...; the name may hold spaces and brackets.
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until_gone(group: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(group) == []


def test_a_server_and_what_it_started_end_together(tmp_path: Path) -> None:
    with Service(launch(tmp_path), log=tmp_path / "log") as service:
        service.wait()
        assert is_healthy(service.url)
        group = service.group
        assert len(alive(group)) == 3  # the watcher, the server, its engine
    assert alive(group) == []
    assert not is_healthy(service.url)


def test_a_server_that_was_healthy_is_started_again_at_the_same_url(tmp_path: Path) -> None:
    with Service(launch(tmp_path), log=tmp_path / "log") as service:
        service.wait()
        first = service.group
        watcher, server, _ = sorted(alive(first))
        assert watcher == first
        os.kill(server, signal.SIGKILL)
        wait_until_gone(first)  # its engine too
        deadline = time.monotonic() + 20
        while not is_healthy(service.url) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_healthy(service.url) and service.group != first
        service.check()
    assert alive(service.group) == []


def test_a_server_that_does_not_start_is_a_sentence_with_its_last_words(tmp_path: Path) -> None:
    sentence = r"ended before it was ready.*\n.*too large for this toy"
    with (
        Service(launch(tmp_path, fails=True), log=tmp_path / "log") as service,
        pytest.raises(DistillError, match=sentence),
    ):
        service.wait()
    assert alive(service.group) == []


def test_sigkill_of_the_parent_ends_the_server(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import teachers.service
from test_service import launch
teachers.service.GRACE_SECONDS = 0.5
service = teachers.service.Service(launch(Path({str(tmp_path)!r})), log=Path({str(tmp_path / "log")!r}))
service.start()
service.wait()
print(service.group, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(alive(group)) == 3
        parent.kill()
    wait_until_gone(group)


def test_the_command_has_what_each_role_needs(tmp_path: Path) -> None:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    on_cpu = Launch(teacher, "score", dtype="float32", max_model_len=64, on_gpu=False, api_key="s3cret")
    command = on_cpu.command(8001)
    assert "s3cret" not in " ".join(command) and on_cpu.environment()["VLLM_API_KEY"] == "s3cret"
    assert json.loads(command[command.index("--pooler-config") + 1]) == {"task": "token_embed", "use_activation": False}
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"head_dtype": "model"}
    assert "--enforce-eager" in command and int(on_cpu.environment()["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    on_gpu = Launch(teacher, "generate", dtype="bfloat16", max_model_len=64, on_gpu=True).command(8001)
    assert "--pooler-config" not in on_gpu and "--enforce-eager" not in on_gpu
    assert on_gpu[on_gpu.index("--logprobs-mode") + 1] == "raw_logprobs"


def test_experts_in_blocks_that_cannot_be_cut_stay_whole() -> None:
    quantised = {"moe_intermediate_size": 1536, "quantization_config": {"weight_block_size": [128, 128]}}
    assert [needs_expert_parallel(quantised, gpus) for gpus in (1, 2, 4, 8)] == [False, False, False, True]
    assert not needs_expert_parallel({"moe_intermediate_size": 1536}, 8)
    assert not needs_expert_parallel({"intermediate_size": 12288}, 8)


def test_health_is_asked_directly() -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:9/health", trust_env=False)
    assert not is_healthy("http://127.0.0.1:9")
