"""A server that rests while the student trains: the order of calls, at vLLM's own routes before an engine of ours.

vLLM sleeps on GPUs alone. What stands behind the routes here keeps the rules of vLLM's engine: asleep it takes weights
in where their memory is back, and works when all of it is.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standin_gpu import install_device
from test_service import launch

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import DistillError
from distill.family import resolve
from distill.model_config import LoraSettings, StudentSettings
from distill.types import Request, Rollout
from distill.vllm.client import Client
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service
from students.engine_sync import EngineSync
from students.rescoring import rescore
from students.sleep import Sleep, SleepingServer, level_for
from students.student import Student
from students.vllm_sampler import VllmSampler
from students.weight_sync import AdapterSync, WeightSync

NANO = open_checkpoint(resolve("nano", role="student"))
PARTS = {"weights", "kv_cache"}


class Engine:
    """What vLLM's routes call; ``calls`` are what reached it."""

    model_config = SimpleNamespace(max_model_len=256)
    renderer = input_processor = None

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.awake = set(PARTS)
        self.has_weights = True
        self.wakes = True
        self.adapter: str | None = None
        self.paused = False

    def work(self, what: str) -> None:
        assert self.awake == PARTS, f"{what} while the server sleeps"
        assert not self.paused
        assert self.has_weights, f"{what} without weights"
        self.calls.append(what)

    async def sleep(self, level: int, mode: str) -> None:
        self.calls.append(f"sleep {level}")
        self.awake, self.has_weights = set(), level == 1

    async def wake_up(self, tags: list[str] | None) -> bool:
        assert tags is not None
        self.calls.append(f"wake {' '.join(tags)}")
        self.awake |= set(tags)
        return self.wakes and self.awake == PARTS

    async def is_paused(self) -> bool:
        return self.paused or self.awake != PARTS

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode}")
        self.paused = True

    async def resume_generation(self) -> None:
        assert self.awake == PARTS
        self.calls.append("resume")
        self.paused = False

    async def start_weight_update(self) -> None:
        assert "weights" in self.awake
        assert await self.is_paused()
        self.calls.append("start")

    async def finish_weight_update(self, version: str | None) -> None:
        self.calls.append("finish")
        self.has_weights = True

    async def add_lora(self, request: Any) -> None:
        assert "weights" in self.awake
        assert self.has_weights
        assert (Path(request.lora_path) / "adapter_model.safetensors").exists()
        self.calls.append("load")
        self.adapter = request.lora_name

    async def reset_prefix_cache(self, running: bool, external: bool) -> bool:
        self.calls.append("reset")
        return True


@pytest.fixture
def served() -> Iterator[tuple[Engine, Client]]:
    import uvicorn
    from fastapi import FastAPI
    from vllm.entrypoints.openai.models import api_router as models
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.rl.online import api_router as transfer
    from vllm.entrypoints.serve.dev.cache import api_router as cache
    from vllm.entrypoints.serve.dev.sleep import api_router as sleep
    from vllm.entrypoints.serve.lora import api_router as lora

    app, engine = FastAPI(), Engine()
    for module in (models, transfer, cache, sleep):
        app.include_router(module.router)
    lora._attach_router(app)
    app.state.engine_client = engine
    app.state.openai_serving_models = OpenAIServingModels(engine, [BaseModelPath("nano", "nano")])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with Client([f"http://127.0.0.1:{listener.getsockname()[1]}"], width=8, whose="student") as client:
            yield engine, client
    finally:
        server.should_exit = True
        thread.join()


def student(lora: LoraSettings | None = None) -> Student:
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False, lora=lora)
    return Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])


class Remote(RemoteSampler):
    """Speaks as the student itself would, when the engine works."""

    def __init__(self, client: Client, engine: Engine, learner: Student) -> None:
        encoder = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))
        super().__init__(client, encoder, speaker="student", vocabulary=NANO.shape.vocabulary)
        self.engine, self.learner, self.probes = engine, learner, list[Rollout]()

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        assert self.model == self.engine.adapter
        self.engine.work("check")
        return [one.token_R.tolist() for one in rescore(self.learner, self.probes)]

    def generate(self, requests: Sequence[Request], on_finished: Any = None) -> list[Rollout]:
        self.engine.work("batch")
        return []


def sampler(engine: Engine, client: Client, learner: Student, sync: WeightSync, sleep: Sleep) -> VllmSampler:
    remote = Remote(client, engine, learner)
    made = VllmSampler(learner, remote, sync, tolerance=1e-4, sleep=sleep)
    remote.probes = made.probes
    return made


@pytest.mark.server  # no server starts, but vLLM has to be there
def test_whole_weights_are_sent_between_the_two_halves_of_waking(
    served: tuple[Engine, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Transfer:
        """vLLM's order of calls; the handles want a GPU."""

        def __init__(self, client: Any) -> None:
            self.client = client

        def send_weights(self) -> None:
            self.client.start_weight_update()
            self.client.finish_weight_update()

    install_device(monkeypatch.setattr)
    monkeypatch.setattr(EngineSync, "_begin", lambda sync: Transfer(sync._routes))
    engine, client = served
    learner = student()
    sync = EngineSync("ipc", client, learner.merged_weights)
    speaker = sampler(engine, client, learner, sync, Sleep(SleepingServer(client), level_for("ipc")))
    send, check, batch = ["start", "finish"], ["reset", "check"], ["batch", "sleep 2"]
    speaker.generate([])  # a server that has just started is awake
    assert engine.calls == ["pause keep", *send, "resume", *check, *batch]
    engine.calls.clear()
    speaker.generate([])  # the student has not changed, and the server has forgotten its weights all the same
    assert engine.calls == ["wake weights", *send, "wake kv_cache", *check, *batch]
    assert speaker.facts()["sampler.gap"] == 0


@pytest.mark.server  # no server starts, but vLLM has to be there
def test_under_adapters_the_base_weights_are_kept(served: tuple[Engine, Client]) -> None:
    engine, client = served
    learner = student(LoraSettings(rank=4))
    sync = AdapterSync(client, learner.write_adapter)
    speaker = sampler(engine, client, learner, sync, Sleep(SleepingServer(client), level_for("adapter")))
    speaker.generate([])
    speak = ["reset", "check", "batch", "sleep 1"]
    assert engine.calls == ["load", *speak]
    engine.calls.clear()
    speaker.generate([])
    assert engine.calls == ["wake weights", "load", "wake kv_cache", *speak]


@pytest.mark.server  # no server starts, but vLLM has to be there
def test_a_server_that_does_not_wake_is_a_sentence(served: tuple[Engine, Client]) -> None:
    engine, client = served
    engine.wakes = False
    sleep = Sleep(SleepingServer(client), 1)
    sleep.begin()
    sleep.wake_weights()
    with pytest.raises(DistillError, match="was woken up and says that it sleeps"):
        sleep.wake_cache()


RESTS = """#!{python}
import http.server, pathlib, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        sleeps = b"true" if pathlib.Path({flag!r}).exists() else b"false"
        self.wfile.write(b'{{"is_sleeping": ' + sleeps + b"}}" if self.path == "/is_sleeping" else b"vllm:steps 1\\n")
    def do_POST(self):
        time.sleep(60)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_that_sleeps_has_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"GRACE": 0.5, "PROBE": 0.1, "STALL": 1.0, "_CANARY": 0.3}.items():
        monkeypatch.setattr(f"distill.vllm.service.{name}_SECONDS", seconds)
    flag = tmp_path / "sleeps"
    flag.touch()
    plain = launch(tmp_path)
    Path(plain.python).write_text(RESTS.format(python=sys.executable, flag=str(flag)))
    with Service(replace(plain, sleeps=True, max_restarts=0), log=tmp_path / "log") as service:
        assert "--enable-sleep-mode" in service.launch.command(1)
        service.wait()
        time.sleep(3.0)
        service.check()
        flag.unlink()  # awake, and it works on nothing
        time.sleep(3.0)
        with pytest.raises(DistillError, match="has hung"):
            service.check()


def test_a_server_that_is_sent_weights_has_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"GRACE": 0.5, "PROBE": 0.1, "STALL": 1.0, "_CANARY": 0.3, "RECEIVING": 4.0}.items():
        monkeypatch.setattr(f"distill.vllm.service.{name}_SECONDS", seconds)
    plain = launch(tmp_path)
    Path(plain.python).write_text(RESTS.format(python=sys.executable, flag=str(tmp_path / "nothing")))

    def served() -> Service:
        return Service(replace(plain, max_restarts=0), log=tmp_path / "log")

    with served() as service:
        service.wait()
        with service.receiving():
            time.sleep(2.5)
            service.check()
        time.sleep(0.5)
        service.check()  # what was not seen to move meanwhile has its time from now on
        time.sleep(2.0)
        with pytest.raises(DistillError, match=r"has hung for [0-9]+ s;"):
            service.check()
    with served() as service, service.receiving():
        service.wait()
        time.sleep(6.0)
        with pytest.raises(DistillError, match=r"has hung for [0-9]+ s while it was sent weights;"):
            service.check()
