"""How weights get to a server, as far as can be told without one and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import load_model, open_checkpoint
from distill.config import RunConfig
from distill.errors import UserError
from distill.family import resolve
from distill.model_config import LoraSettings, SamplerSettings, StudentSettings
from pipelines.student_sampling import check_sampler
from students.ranks import ALONE
from students.student import Student
from students.weight_sync import EngineSync, choose_way, flags_of, variables_of

NANO = open_checkpoint(resolve("nano", role="student"))


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "own_devices", "way"),
    [
        ("auto", False, False, "file"),
        ("auto", False, True, "file"),
        ("auto", True, True, "nccl"),
        ("auto", True, False, "ipc"),
        ("nccl", True, True, "nccl"),
    ],
)
def test_the_way_that_fits(wanted: Any, on_gpu: bool, own_devices: bool, way: str) -> None:
    assert choose_way(wanted, on_gpu=on_gpu, own_devices=own_devices, num_experts=0) == way


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "own_devices", "num_experts", "sentence"),
    [
        ("nccl", False, True, 0, "sampler.sync=nccl needs a GPU, and this machine has none"),
        ("ipc", False, False, 0, "sampler.sync=ipc needs a GPU, and this machine has none"),
        ("file", True, False, 0, "sampler.sync=file is for vLLM on a CPU"),
        ("nccl", True, False, 0, "name them in sampler.devices"),
        ("ipc", True, True, 0, "leave sampler.devices empty"),
        ("auto", False, False, 8, "cannot take over a mixture of experts on a CPU"),
    ],
)
def test_ways_that_cannot_be_gone_are_refused_by_name(
    wanted: Any, on_gpu: bool, own_devices: bool, num_experts: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_way(wanted, on_gpu=on_gpu, own_devices=own_devices, num_experts=num_experts)


def test_a_run_is_refused_before_anything_starts() -> None:
    config = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", sync="nccl"))
    with pytest.raises(UserError, match=r"sampler\.sync=nccl needs a GPU"):
        check_sampler(config, NANO, ALONE)
    check_sampler(RunConfig(sampler=SamplerSettings(sync="nccl")), NANO, ALONE)  # nobody will ask for it


@pytest.mark.parametrize("words", [("--tensor-parallel-size", "2"), ("--pipeline_parallel_size=2",), ("-tp", "2")])
def test_a_server_that_is_cut_is_refused(words: tuple[str, ...]) -> None:
    config = RunConfig(
        student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", server_args=words)
    )
    with pytest.raises(
        UserError, match=f"server_args has {words[0]}, and the weights are sent to a server that is whole"
    ):
        check_sampler(config, NANO, ALONE)


def test_what_a_server_is_started_with(tmp_path: Path) -> None:
    assert flags_of("file") == ("--worker-extension-cls", "distill.vllm.worker.WeightsFromFile")
    assert flags_of("nccl") == ("--weight-transfer-config", '{"backend": "nccl"}')
    root = str(Path(__file__).resolve().parent.parent)
    assert dict(variables_of("file", "/mine")) == {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": f"{root}:/mine"}
    assert dict(variables_of("ipc", None)) == {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@pytest.mark.server  # no server starts, but vLLM has to be there
@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_vllms_engines_get_the_weights_as_they_are_when_sent(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM's own classes; the engine, which wants a GPU, is one of ours."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    sent: list[dict[str, Tensor]] = []
    begun: list[Any] = []

    class Engine:
        def __init__(self, source: Any) -> None:
            self.source = source

        def send_weights(self) -> None:
            assert [meta.name for meta in self.source.metadata()] == [name for name, _ in self.source]
            sent.append({name: tensor.clone() for name, tensor in self.source})

    def trainer_init(info: Any, *, client: Any, source: Any) -> Engine:
        begun.append((info, client.base_url))
        return Engine(source)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    model = nn.Linear(2, 3, bias=False)

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, value.detach()) for name, value in model.named_parameters())

    sync = EngineSync(way, "http://127.0.0.1:8000", weights)
    sync.send()
    with torch.no_grad():
        model.weight += 1
    sync.send()
    assert len(begun) == 1  # one rendezvous for all transfers
    info, url = begun[0]
    assert (info.backend, info.rank, url) == (way, 0, "http://127.0.0.1:8000")
    assert way == "ipc" or info.world_size == 2
    assert torch.equal(sent[1]["weight"], sent[0]["weight"] + 1)


def test_merged_weights_are_those_that_an_export_holds(tmp_path: Path) -> None:
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False, lora=LoraSettings(rank=4, alpha=8.0))
    student = Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = dict(student.merged_weights())
    student.export(tmp_path, student.weights())
    exported = load_model(open_checkpoint(resolve(str(tmp_path), role="student")), torch.float32, "cpu")
    expected = dict(exported.named_parameters())
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value.detach(), atol=1e-6, rtol=1e-5)


def test_a_student_counts_the_changes_of_its_weights() -> None:
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False)
    student = Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])
    student.load_weights(student.weights())
    assert student.num_changes == 1
