"""Starting, supervising and ending servers, with a small program in vLLM's place that starts a child of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.checkpoint import open_checkpoint
from distill.errors import DistillError, GoneError, UserError
from distill.family import resolve
from distill.vllm.address import checked_url
from distill.vllm.cuts import needs_expert_parallel
from distill.vllm.launch import Launch, Nodes, replicas
from distill.vllm.served import is_healthy
from distill.vllm.service import Service

FAKE = """#!{python}
import http.server, os, signal, subprocess, sys, threading, time
if {fails}:
    print("the weights are too large for this toy", file=sys.stderr)
    sys.exit({fails})
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has to be killed, and so does its engine
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()  # as vLLM does when its engine has died, where a request is still open
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.service.GRACE_SECONDS", 0.5)


def launch(folder: Path, *, fails: int = 0) -> Launch:
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


ENGINE = """
import pathlib, signal, sys, time
def leave(*_):
    time.sleep({seconds})
    pathlib.Path({held!r}).unlink()
    sys.exit()
signal.signal(signal.SIGTERM, leave)
pathlib.Path({held!r}).touch()
time.sleep(600)
"""
LEAVES = """#!{python}
import http.server, pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {engine!r}])
while not pathlib.Path({held!r}).exists():
    time.sleep(0.01)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(("seconds", "is_given_back"), [(0.5, True), (60.0, False)])
def test_an_engine_has_time_to_give_back_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, is_given_back: bool
) -> None:
    """The server itself is gone at once; its workers' queues in shared memory would stay for ever."""
    monkeypatch.setattr("distill.vllm.service.GRACE_SECONDS", 10.0 if is_given_back else 0.5)
    held = str(tmp_path / "held")
    plain = launch(tmp_path)
    engine = ENGINE.format(seconds=seconds, held=held)
    Path(plain.python).write_text(LEAVES.format(python=sys.executable, engine=engine, held=held))
    with Service(plain, log=tmp_path / "log") as service:
        service.wait()
        began = time.monotonic()
    assert time.monotonic() - began < 8
    assert alive(service.group) == []
    assert Path(held).exists() != is_given_back


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


@pytest.mark.parametrize("log", [".", "fake/log"])
def test_a_log_that_cannot_be_written_is_a_sentence(log: str, tmp_path: Path) -> None:
    service = Service(launch(tmp_path), log=tmp_path / log)
    with pytest.raises(DistillError, match=rf"^the log {tmp_path / log} of the .* cannot be written \(.*--log"):
        service.start()
    service.stop()


def test_an_ipv6_address_makes_a_url(tmp_path: Path) -> None:
    service = Service(replace(launch(tmp_path), host="::1", port=8001), log=tmp_path / "log")
    assert service.url == "http://[::1]:8001" and checked_url(service.url) == service.url
    assert not is_healthy(service.url)


def test_a_port_that_somebody_else_has_is_refused(tmp_path: Path) -> None:
    """His answers would be taken for the server's own: it would be ready at once, with another model."""
    with Service(launch(tmp_path), log=tmp_path / "log") as first:
        first.wait()
        second = Service(replace(launch(tmp_path), port=first.port), log=tmp_path / "other")
        with pytest.raises(DistillError, match=f"^port {first.port} of 127.0.0.1 is taken, so the teacher's vLLM ser"):
            second.start()
        second.stop()
        with httpx.Client() as http:  # its end leaves a closed connection at the port, which is nobody's
            assert http.get(first.url).is_success
    with Service(replace(launch(tmp_path), port=first.port), log=tmp_path / "other") as again:
        again.wait()


@pytest.fixture
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.service.PROBE_SECONDS", 0.3)
    monkeypatch.setattr("distill.vllm.service._CANARY_SECONDS", 0.2)


@pytest.mark.usefixtures("short_probes")
def test_a_server_that_takes_no_connections_any_more_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Service(replace(launch(tmp_path), max_restarts=1), log=tmp_path / "log") as service:
        service.wait()
        first = service.group
        os.kill(sorted(alive(first))[1], signal.SIGUSR1)
        wait_until_gone(first, 10)
        deadline = time.monotonic() + 20
        while not is_healthy(service.url) and time.monotonic() < deadline:
            time.sleep(0.05)
        service.check()
        assert service.group != first
    assert "(score) ended unexpectedly: it takes no connections any more; starting it again" in capsys.readouterr().err
    with Service(replace(launch(tmp_path), max_restarts=0), log=tmp_path / "log") as service:
        service.wait()
        os.kill(sorted(alive(service.group))[1], signal.SIGUSR1)
        wait_until_gone(service.group, 10)
        with pytest.raises(GoneError, match=r"ended unexpectedly: it takes no connections any more; the last lines of"):
            while True:
                service.check()
                time.sleep(0.05)


@pytest.mark.usefixtures("short_probes")
def test_a_server_that_is_stopped_for_a_while_has_not_ended(tmp_path: Path) -> None:
    with Service(replace(launch(tmp_path), max_restarts=0), log=tmp_path / "log") as service:
        service.wait()
        group = service.group
        server = sorted(alive(group))[1]
        os.kill(server, signal.SIGSTOP)
        time.sleep(6)  # ten probes: more than the connections that may wait for one that takes none
        service.check()
        assert len(alive(group)) == 3
        os.kill(server, signal.SIGCONT)
        assert is_healthy(service.url)


def test_a_server_that_does_not_start_is_a_sentence_with_its_last_words(tmp_path: Path) -> None:
    sentence = r"ended before it was ready.*\n.*too large for this toy"
    with (
        Service(launch(tmp_path, fails=1), log=tmp_path / "log") as service,
        pytest.raises(GoneError, match=sentence),
    ):
        service.wait()
    assert alive(service.group) == []


def test_arguments_that_a_server_does_not_take_are_a_fault_of_the_configuration(tmp_path: Path) -> None:
    sentence = r"does not take its arguments and ended before it was ready; .*server_args.*\n.*too large for this toy"
    for code, kind in ((2, UserError), (1, GoneError)):  # in the same log: the line of the first does not count twice
        with (
            Service(launch(tmp_path, fails=code), log=tmp_path / "log") as service,
            pytest.raises(kind, match=sentence if code == 2 else "ended before it was ready"),
        ):
            service.wait()


def test_sigkill_of_the_parent_ends_the_server(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import distill.vllm.service
from test_service import launch
distill.vllm.service.GRACE_SECONDS = 0.5
service = distill.vllm.service.Service(launch(Path({str(tmp_path)!r})), log=Path({str(tmp_path / "log")!r}))
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


@pytest.mark.parametrize(
    "word", ["--logprobs-mode=raw_logits", "--logprobs_mode", "--logprobs-mo", "--logp=raw_logits"]
)
def test_a_teacher_that_would_tell_other_numbers_is_refused(word: str) -> None:
    """As a single log-probability a logit looks right, and a teacher's response is stored with those it came with."""
    with pytest.raises(UserError, match=rf"^teacher\.server_args \(or --server-arg\) has {word}, and .* leave it out$"):
        on_gpus(extra=("--max-logprobs", "30", word)).check()
    on_gpus(extra=("--max-logprobs", "30", "--logits-processor-pattern", "x")).check()


def test_experts_in_blocks_that_cannot_be_cut_stay_whole() -> None:
    quantised = {"moe_intermediate_size": 1536, "quantization_config": {"weight_block_size": [128, 128]}}
    assert [needs_expert_parallel(quantised, gpus) for gpus in (1, 2, 4, 8)] == [False, False, False, True]
    assert not needs_expert_parallel({"moe_intermediate_size": 1536}, 8)
    assert needs_expert_parallel({"moe_intermediate_size": 1536}, 8, "fp8_per_block")
    assert not needs_expert_parallel({"intermediate_size": 12288}, 8)


def on_gpus(**more: Any) -> Launch:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    return Launch(teacher, "score", dtype="bfloat16", max_model_len=64, on_gpu=True, **more)


def with_config(launch: Launch, **change: Any) -> Launch:
    shape = launch.checkpoint.shape
    shape = replace(shape, num_heads=change.pop("num_heads", shape.num_heads))
    checkpoint = replace(launch.checkpoint, config={**launch.checkpoint.config, **change}, shape=shape)
    return replace(launch, checkpoint=checkpoint)


def test_a_model_that_cannot_be_cut_like_that_is_refused_with_a_size_that_works() -> None:
    heads = on_gpus().checkpoint.shape.num_heads
    with pytest.raises(UserError, match=rf"{heads} attention heads.*take {heads} "):
        on_gpus(tensor_parallel=heads + 1).check()
    with pytest.raises(UserError, match="layers"):
        on_gpus(pipeline_parallel=99).check()
    # Qwen3-4B-FP8: 9728 / 8 = 1216 rows are nine and a half blocks.
    blocks = {"quantization_config": {"weight_block_size": [128, 128]}, "intermediate_size": 9728, "num_heads": 32}
    with pytest.raises(UserError, match=r"9728 rows.*block of 128.*take 4 "):
        with_config(on_gpus(tensor_parallel=8), **blocks).check()
    with_config(on_gpus(tensor_parallel=4), **blocks).check()
    with pytest.raises(UserError, match="--nodes 3 does not divide"):
        on_gpus(tensor_parallel=2, nodes=Nodes(3, 0, "gpu-1")).check()
    with pytest.raises(UserError, match="--node-rank 2 is none of 0 to 1"):
        on_gpus(tensor_parallel=2, nodes=Nodes(2, 2, "gpu-1")).check()
    with pytest.raises(UserError, match="needs GPUs"):
        replace(on_gpus(tensor_parallel=2, nodes=Nodes(2, 1, "gpu-1")), on_gpu=False).check()


def test_replicas_share_the_devices_and_never_one_device() -> None:
    gpus = [str(number) for number in range(2, 10)]
    launches = replicas(on_gpus(tensor_parallel=2, pipeline_parallel=2, port=8000), 2, gpus)
    assert [launch.environment()["CUDA_VISIBLE_DEVICES"] for launch in launches] == ["2,3,4,5", "6,7,8,9"]
    assert [launch.port for launch in launches] == [8000, 8001]
    with pytest.raises(UserError, match="3 replicas of 4 GPUs each need 12, and this machine has 8"):
        replicas(on_gpus(tensor_parallel=4), 3, gpus)
    # Two machines: each holds half of the GPUs.
    (part,) = replicas(on_gpus(tensor_parallel=8, pipeline_parallel=2, nodes=Nodes(2, 1, "gpu-1")), 1, gpus)
    assert part.environment()["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)
    on_cpu = replace(on_gpus(), on_gpu=False)
    cores = [launch.environment()["VLLM_CPU_OMP_THREADS_BIND"] for launch in replicas(on_cpu, 2, gpus)]
    assert cores == ["2,3,4,5", "6,7,8,9"]
    with pytest.raises(UserError, match="3 replicas of 1 CPU cores"):
        replicas(on_cpu, 3, ["0", "1"])


def test_a_server_over_several_machines_is_one_command_with_a_rank() -> None:
    parts = [on_gpus(tensor_parallel=8, pipeline_parallel=2, nodes=Nodes(2, rank, "gpu-1", 7000)) for rank in (0, 1)]
    head, other = (part.command(8000) for part in parts)
    assert [part.answers for part in parts] == [True, False]
    assert "--headless" in other and "--headless" not in head
    assert [command[command.index("--node-rank") + 1] for command in (head, other)] == ["0", "1"]
    assert head[head.index("--nnodes") :][:2] == ["--nnodes", "2"]
    assert head[head.index("--master-addr") :][:4] == ["--master-addr", "gpu-1", "--master-port", "7000"]


def test_health_is_asked_directly() -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:9/health", trust_env=False)
    assert not is_healthy("http://127.0.0.1:9")
