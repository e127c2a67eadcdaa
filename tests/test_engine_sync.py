"""Weights through vLLM's own transfer engines into a real server; what wants a GPU is played by ``standin_gpu``.

What no machine without one shows: NCCL itself, streams that run ahead of each other, CUDA's handles, and vLLM's reload
of a GPU's layers.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import pytest
import standin_gpu
import torch
from test_vllm_sampler import LORA, NANO, requests, sampler, student, train, train_adapters
from torch import Tensor

from distill.errors import GoneError
from distill.vllm.client import Client, Job, ask
from distill.vllm.launch import Launch
from distill.vllm.service import Service
from students.engine_sync import EngineSync
from students.rescoring import rescore
from students.sleep import Sleep, SleepingServer, level_for
from students.student import Student
from students.vllm_sampler import VllmSampler
from students.weight_sync import Weights, WeightsError, flags_of, variables_of

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

Engine = Literal["nccl", "ipc"]
TESTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Served:
    way: Engine
    service: Service
    client: Client

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return httpx.post(self.service.url + path, json=body, timeout=60, trust_env=False)

    def counts(self) -> dict[str, int]:
        """How often the server was asked for each part of a transfer."""
        lines = httpx.get(self.service.url + "/metrics", trust_env=False).text
        found = re.findall(r'rl_weight_update_operation_duration_seconds_count\{operation="(\w+)"\} (\d+)', lines)
        return {name: int(count) for name, count in found}

    def arrived(self) -> dict[str, list[Any]]:
        (worker,) = ask(self.client, "/collective_rpc", {"method": "arrived"})["results"]
        return dict(worker)


@pytest.fixture(scope="module", params=get_args(Engine))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    way: Engine = request.param
    launch = Launch(
        NANO,
        "generate",
        dtype="float32",
        max_model_len=256,
        on_gpu=False,
        extra=(*flags_of(way), "--worker-extension-cls", "standin_gpu.Witness"),
        whose="student",
        max_restarts=0,
        variables=(
            *variables_of(way, None),
            ("PYTHONPATH", f"{TESTS}:{TESTS.parent}"),
            ("STANDIN_GPU", "server"),
        ),
    )
    with Service(launch, log=tmp_path_factory.mktemp(way) / "log") as service:
        service.wait()
        with Client([service.url], width=64, whose="student", check=service.check) as client:
            yield Served(way, service, client)


@pytest.fixture(autouse=True)
def a_gpus_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    standin_gpu.install_in_trainer(monkeypatch.setattr)
    # So small that the student's weights take several of them.
    monkeypatch.setattr("students.engine_sync._BUFFER_BYTES", 300_000)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def transfer(served: Served, learner: Student, weights: Weights | None = None) -> EngineSync:
    are_made = learner.adapted is not None
    return EngineSync(served.way, served.client, weights or learner.merged_weights, are_made=are_made)


def speaker(served: Served, learner: Student, weights: Weights | None = None) -> VllmSampler:
    return sampler(served.client, learner, transfer(served, learner, weights))


@pytest.mark.parametrize("lora", [None, LORA])
def test_merged_weights_alone_are_packed_and_by_ipc_alone(served: Served, lora: Any) -> None:
    """By NCCL, two buffers of one transfer are two streams to vLLM 0.32's worker, which a CPU has not: parts of one
    layer in both would be read before they are there. By IPC all merged weights would be held at once."""
    sync = transfer(served, student(lora=lora))
    sync.send()
    assert sync._engine.packed is (served.way == "ipc" and lora is not None)
    if sync._engine.packed:
        assert sync._engine.packed_buffer_size_bytes == 300_000


@pytest.mark.parametrize("lora", [None, LORA])
def test_every_weight_arrives_bit_for_bit_at_each_of_several_transfers(
    served: Served, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a run of several processes, of which this one alone sends.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    learner = student(lora=lora)
    speaks, before = speaker(served, learner), served.counts()
    for step in range(3):
        (train if lora is None else train_adapters)(learner, step)
        rollouts = speaks.generate(requests(2))
        assert 0 <= speaks.facts()["sampler.gap"] <= 1e-4
        assert served.arrived() == standin_gpu.described(learner.merged_weights())
        for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True):
            assert rollout.logprobs == pytest.approx(scored.token_R.tolist(), abs=1e-4)
    asked = {name: count - before.get(name, 0) for name, count in served.counts().items()}
    # One handshake for all of them; a buffer is an update.
    updates = asked.pop("update")
    assert updates == 3 if lora is None or served.way == "nccl" else updates > 6
    assert asked == {"init": 1, "start": 3, "finish": 3}


def test_weights_arrive_in_the_dtype_and_order_of_their_own(served: Served) -> None:
    learner = student()

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, value in learner.merged_weights():
            # Transposed twice: no row lies whole in memory.
            yield name, value.bfloat16().mT.contiguous().mT if value.dim() == 2 else value.bfloat16()

    EngineSync(served.way, served.client, weights).send()
    assert served.arrived() == standin_gpu.described(weights())
    assert {one[0] for one in served.arrived().values()} == {"torch.bfloat16"}


def test_a_transfer_that_went_wrong_is_caught(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, kept = student(), list[Tensor]()
    speaks = speaker(served, learner)

    def spoilt(data: bytes) -> bytes:
        return data[:-4096] + bytes(4096) if len(data) > 4096 else data

    def spoilt_handle(tensor: Tensor) -> Any:
        kept.append(torch.zeros_like(tensor) if tensor.dim() == 1 else tensor)
        return standin_gpu.reduce_tensor(kept[-1])

    with monkeypatch.context() as wrong:
        wrong.setattr(standin_gpu.Nccl, "on_the_wire", staticmethod(spoilt))
        wrong.setattr("vllm.distributed.weight_transfer.ipc_engine.reduce_tensor", spoilt_handle)
        with pytest.raises(WeightsError, match="does not hold the student's weights after they were sent"):
            speaks.generate(requests(1))
    speaks.generate(requests(1))
    assert speaks.facts()["sampler.gap"] <= 1e-4


def asking_midway(served: Served, learner: Student, asked: list[Future[Any]]) -> Callable[[], Iterator[Any]]:
    """The weights; whenever the second half of them is wanted, the server is asked to speak."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        for number, one in enumerate(learner.merged_weights()):
            if number == 10:
                asked.append(served.client.submit(Job([1, 2, 3], 1), speak))
                time.sleep(0.5)
            yield one

    async def speak(prompt: list[int]) -> Any:
        _, answer = await served.client.post("/v1/completions", {"prompt": prompt, "max_tokens": 2}, load=5)
        return answer.json()

    return weights


def test_a_question_in_mid_transfer_waits_for_the_end_of_it(served: Served) -> None:
    learner, asked = student(), list[Future[Any]]()
    speaks = speaker(served, learner, asking_midway(served, learner, asked))
    for step in range(2):
        train(learner, step)
        speaks.generate(requests(1))
    assert len(asked) == (4 if served.way == "nccl" else 2)  # NCCL's engine goes through them for their shapes first
    assert all(one.result(timeout=20)["usage"]["completion_tokens"] == 2 for one in asked)


def test_a_server_that_sleeps_stays_so_until_its_cache_is_awake(served: Served) -> None:
    learner = student()
    speaks = speaker(served, learner)
    speaks.sleep = Sleep(SleepingServer(served.client), level_for(served.way))

    def status(what: str) -> bool:
        answer = httpx.get(f"{served.service.url}/is_{what}", trust_env=False)
        return bool(answer.json()[f"is_{what}"])

    seen, sync, server = list[bool](), speaks.sync, SleepingServer(served.client)

    class Watched:
        def send(self) -> None:
            seen.append(status("paused"))
            sync.send()
            seen.append(status("paused"))

    speaks.sync = Watched()
    for step in range(2):
        train(learner, step)
        speaks.generate(requests(1))
        assert speaks.facts()["sampler.gap"] <= 1e-4
        assert status("sleeping")
    assert seen == [False, False, True, True]
    assert server.wake("weights") is False
    assert server.wake("kv_cache") is True
    assert not status("paused")


def test_what_is_out_of_order_or_for_another_engine_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("students.engine_sync._LAST_WORDS_SECONDS", 0.5)
    assert served.post("/update_weights", {"update_info": {}}).status_code == 500
    assert served.post("/finish_weight_update").status_code == 500
    assert served.post("/init_weight_transfer_engine", {"init_info": {"port": 1}}).status_code == 500
    learner = student()
    other: Engine = "ipc" if served.way == "nccl" else "nccl"
    started = time.monotonic()
    with pytest.raises(GoneError, match=r"failed at /init_weight_transfer_engine while .*Invalid init_info"):
        EngineSync(other, served.client, learner.merged_weights).send()
    assert time.monotonic() - started < 20
    served.post("/resume")  # a run would have ended
    speaks = speaker(served, learner)
    speaks.generate(requests(1))
    assert speaks.facts()["sampler.gap"] <= 1e-4


def test_a_server_that_is_killed_in_mid_transfer_ends_it_with_its_last_words(served: Served) -> None:
    """The last one of its server."""
    learner = student()
    passes: list[int] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        passes.append(1)
        for number, one in enumerate(learner.merged_weights()):
            if number == 25 and len(passes) == (2 if served.way == "nccl" else 1):
                os.killpg(served.service.group, signal.SIGKILL)
            yield one

    started = time.monotonic()
    with pytest.raises(GoneError, match=r"the student's vLLM server .* ended unexpectedly; the last lines of"):
        EngineSync(served.way, served.client, weights).send()
    assert time.monotonic() - started < 20
