"""How weights get to a server, as far as can be told without one and without a GPU."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from standin_gpu import install_device

from distill.checkpoint import load_model, open_checkpoint
from distill.config import RunConfig
from distill.errors import DistillError, GoneError, StoppedError, UserError
from distill.family import Shape, resolve, shape_of
from distill.interrupt import deferred_signals
from distill.memory import RESERVED_BYTES, student_memory
from distill.model_config import LoraSettings, SamplerSettings, StudentSettings
from distill.recipe import validate
from distill.server_memory import USABLE
from distill.types import MODES
from distill.vllm.launch import Launch
from pipelines.student_sampling import check_sampler, share_flags, student_sampler
from students.adapter import MODULES, RANKS
from students.engine_sync import EngineSync
from students.handover import private_folder
from students.ranks import ALONE, Ranks
from students.rescoring import rescore
from students.sleep import check_sleep
from students.student import Student
from students.vllm_sampler import PROBE_TOKENS, VllmSampler
from students.weight_sync import (
    AdapterSync,
    FileSync,
    WeightsError,
    WeightSync,
    check_handles,
    choose_way,
    flags_of,
    variables_of,
)

NANO = open_checkpoint(resolve("nano", role="student"))
LORA = LoraSettings(rank=4, alpha=8.0)


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
    assert choose_way(wanted, on_gpu=on_gpu, own_devices=own_devices, num_experts=0, dtype="bfloat16", lora=None) == way


@pytest.mark.parametrize(
    ("lora", "num_experts", "on_gpu", "way"),
    [
        (LORA, 0, True, "adapter"),
        (LoraSettings(target_modules=("model.layers.0.mlp.up_proj",)), 0, True, "adapter"),
        # On a CPU adapters cost many times what merged weights do.
        (LORA, 0, False, "file"),
        # Whole weights where vLLM could not be given the adapters by themselves.
        (LORA, 8, True, "ipc"),
        (LoraSettings(rank=513), 0, True, "ipc"),
        (LoraSettings(target_modules=("q_proj", "lm_head")), 0, True, "ipc"),
    ],
)
def test_auto_sends_adapters_by_themselves_where_vllm_serves_them_well(
    lora: LoraSettings, num_experts: int, on_gpu: bool, way: str
) -> None:
    assert (
        choose_way("auto", on_gpu=on_gpu, own_devices=False, num_experts=num_experts, dtype="bfloat16", lora=lora)
        == way
    )


@pytest.mark.parametrize(
    ("lora", "num_experts", "sentence"),
    [
        (None, 0, r"the student has none \(student.lora is null\); set sampler.sync to auto"),
        (LORA, 8, "the student is a mixture of experts"),
        (LoraSettings(rank=513), 0, "vLLM's largest rank is 512 and student.lora.rank is 513"),
        (LoraSettings(target_modules=("embed_tokens",)), 0, "student.lora.target_modules has embed_tokens"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_where_they_were_asked_for(
    lora: LoraSettings | None, num_experts: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_way("adapter", on_gpu=False, own_devices=False, num_experts=num_experts, dtype="bfloat16", lora=lora)


def test_adapters_in_float32_are_merged_on_a_gpu() -> None:
    """vLLM's kernel for them there asserts 16 bits: a server would end in its first pass."""
    given: Any = {"own_devices": False, "num_experts": 0, "dtype": "float32", "lora": LORA}
    assert choose_way("auto", on_gpu=True, **given) == "ipc"
    with pytest.raises(
        UserError, match=r"on a GPU take 16 bits and student\.dtype is float32; set sampler\.sync to auto"
    ):
        choose_way("adapter", on_gpu=True, **given)
    assert choose_way("adapter", on_gpu=False, **given) == "adapter"


def test_a_lora_students_way_can_be_asked_for() -> None:
    assert (
        choose_way("adapter", on_gpu=False, own_devices=False, num_experts=0, dtype="bfloat16", lora=LORA) == "adapter"
    )
    assert choose_way("ipc", on_gpu=True, own_devices=False, num_experts=0, dtype="bfloat16", lora=LORA) == "ipc"


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
        choose_way(wanted, on_gpu=on_gpu, own_devices=own_devices, num_experts=num_experts, dtype="bfloat16", lora=None)


def test_a_run_is_refused_before_anything_starts() -> None:
    config = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", sync="nccl"))
    with pytest.raises(UserError, match=r"sampler\.sync=nccl needs a GPU"):
        check_sampler(config, NANO, ALONE)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sync": "file"}, r"sampler\.sync=file is a way to a server, and sampler\.place=in_process has none"),
        ({"devices": ("0",)}, r"sampler\.devices are a server's own, and sampler\.place=in_process"),
        ({"sleep": True}, r"sampler\.sleep=true is for vLLM on the trainer's GPU, and this machine has none"),
        ({"server_args": ("-tp", "2")}, r"server_args has -tp"),
    ],
)
def test_what_an_engine_in_the_trainers_process_cannot_have(
    settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    sampler = SamplerSettings(backend="vllm", place="in_process", **settings)
    with pytest.raises(UserError, match=sentence):
        check_sampler(RunConfig(student=StudentSettings(model="nano"), sampler=sampler), NANO, ALONE)


def test_an_engine_in_the_trainers_process_needs_vllm_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SamplerSettings(backend="vllm", place="in_process")
    config = RunConfig(student=StudentSettings(model="nano"), sampler=sampler)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_sampler(config, NANO, ALONE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"place=in_process runs vLLM in this process, and it is not installed"):
        check_sampler(config, NANO, ALONE)


def test_one_process_does_not_speak_and_train_at_once() -> None:
    sampler = SamplerSettings(backend="vllm", place="in_process", staleness=1)
    with pytest.raises(ValueError, match=r"in_process has one process for both; set sampler\.place to server"):
        RunConfig(student=StudentSettings(model="nano"), sampler=sampler)


def test_the_way_within_a_process() -> None:
    for on_gpu in (False, True):
        way = choose_way(
            "auto", on_gpu=on_gpu, own_devices=False, num_experts=0, dtype="bfloat16", lora=LORA, in_process=True
        )
        assert (way, flags_of(way), variables_of(way, None)) == ("memory", (), ())
    with pytest.raises(UserError, match="cannot take over a mixture of experts on a CPU"):
        choose_way("auto", on_gpu=False, own_devices=False, num_experts=8, dtype="bfloat16", lora=None, in_process=True)


def with_devices(*devices: str) -> RunConfig:
    sampler = SamplerSettings(backend="vllm", devices=devices)
    return RunConfig(student=StudentSettings(model="nano"), sampler=sampler)


def test_cores_that_are_not_here_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3})
    check_sampler(with_devices("3", "0"), NANO, ALONE)
    for wrong in ("7", "1", "cuda:0", "0-3", ""):
        sentence = rf"sampler\.devices has '{wrong}', and the CPU cores that this run may use are 0, 3; give each core"
        with pytest.raises(UserError, match=sentence):
            check_sampler(with_devices("0", wrong), NANO, ALONE)


def test_gpus_that_are_not_here_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for right in ("0", "1", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-8932f937"):
        check_sampler(with_devices(right), NANO, ALONE)
    for wrong in ("cuda:0", "2", "-1", "0,1"):
        with pytest.raises(UserError, match=rf"sampler\.devices has '{wrong}', and the GPUs .* are 0, 1; .* its UUID"):
            check_sampler(with_devices(wrong), NANO, ALONE)
    # As `distill plan` writes it: the trainer sees its own GPU, and the server has the one beside it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    check_sampler(with_devices("7"), NANO, ALONE)
    with pytest.raises(UserError, match=r"the GPUs that this run may use are 6; give each GPU"):
        check_sampler(with_devices("cuda:7"), NANO, ALONE)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 80 GB, as far as torch tells of it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9, uuid="a GPU")
    )


def shape(name: str) -> Shape:
    found = shape_of(name)
    assert found is not None
    return found


SMALL, LARGE = shape("0.6B"), shape("4B")


def sampled_by(**settings: Any) -> RunConfig:
    teacher = {"backend": "vllm"}
    return validate({"teacher": {"model": "4B", **teacher}, "student": {"model": "0.6B"}, "sampler": settings})


def test_a_shared_gpu_is_shared_without_a_word_of_the_users(a_gpu: None) -> None:
    """What the plan says of it is what vLLM is started with: left to itself it would want 92 % of the GPU."""

    def share(**settings: Any) -> float:
        flag, value = share_flags(sampled_by(backend="vllm", **settings), SMALL, LARGE, ALONE)
        assert flag == "--gpu-memory-utilization"
        return float(value)

    config = sampled_by(backend="vllm")
    memory = student_memory(config, SMALL, LARGE)
    trainer = memory.total - memory.parts["server"] + RESERVED_BYTES
    assert trainer > 0.08 * 80e9  # so vLLM's own 92 % would not be free
    assert 80e9 * share() <= 80e9 - trainer < 80e9 * (share() + 0.01)
    # One that sleeps has what comes and goes in a training step too.
    assert share() < share(sleep=True) <= USABLE
    assert share(sleep=True, place="in_process") == share(sleep=True)


def test_whoever_says_how_much_vllm_takes_is_heard(a_gpu: None) -> None:
    for words in (("--gpu-memory-utilization", "0.3"), ("--gpu_memory_util=0.3",), ("--kv-cache-memory-bytes=1G",)):
        assert share_flags(sampled_by(backend="vllm", server_args=words), SMALL, LARGE, ALONE) == ()
    assert share_flags(sampled_by(backend="vllm", server_args=("--max-num-seqs", "8")), SMALL, LARGE, ALONE)
    # A server with a GPU of its own has all of it, and a CPU has no such share.
    assert share_flags(sampled_by(backend="vllm", devices=("1",)), SMALL, LARGE, ALONE) == ()


def test_a_gpu_that_the_trainer_fills_is_a_sentence(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=10 * 10**9))
    with pytest.raises(UserError, match=r"of its 10\.0 GB the trainer needs [0-9.]+, and nothing is left for vLLM"):
        share_flags(sampled_by(backend="vllm"), SMALL, LARGE, ALONE)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_whose_handles_nobody_can_open_is_refused(
    name: str, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    whole = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm"))
    for value in ("expandable_segments:True", "max_split_size_mb:64, expandable_segments : true"):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"sampler\.sync=ipc hands .* {name} has expandable_segments"):
            check_sampler(whole, NANO, ALONE)
    # Adapters go through files, and NCCL sends copies.
    check_sampler(with_devices("0"), NANO, ALONE)
    student = StudentSettings(model="nano", dtype="bfloat16", lora=LORA)
    lora = RunConfig(student=student, sampler=SamplerSettings(backend="vllm"))
    check_sampler(lora, NANO, ALONE)
    monkeypatch.setenv(name, "expandable_segments:False")
    check_sampler(whole, NANO, ALONE)
    check_handles({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize(("way", "devices"), [("ipc", None), ("nccl", "0")])
def test_engines_of_another_release_are_refused(
    way: str, devices: str | None, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm"))
    config, found = whole if devices is None else with_devices(devices), {"vllm": "0.32.1+cu130"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr("students.weight_sync.version", version)
    check_sampler(config, NANO, ALONE)
    for other in ("0.33.0", "0.31.2", "1.0"):
        found["vllm"] = other
        with pytest.raises(UserError, match=rf"sampler\.sync={way} .* vllm {other} is installed; install vllm>=0\.32"):
            check_sampler(config, NANO, ALONE)
    found.clear()
    check_sampler(config, NANO, ALONE)


def test_what_the_trainer_holds_in_reserve_is_free_when_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Student(load_model(NANO, torch.float32, "cpu"), StudentSettings(dtype="float32"), stop_ids=[0])
    done: list[str] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("empty"))
    remote: Any = SimpleNamespace(vocabulary=100, ready=lambda: done.append("ready"), model=None)
    remote.forget_prefixes = lambda: None
    remote.read = lambda sequences: [one.token_R.tolist() for one in rescore(learner, sampler.probes)]
    sampler = VllmSampler(learner, remote, SimpleNamespace(send=lambda: None), tolerance=1e-4)
    for _ in range(2):
        sampler.take_weights()
        learner.num_changes += 1
    assert done == ["empty", "ready", "ready"]


@pytest.mark.parametrize("settings", [{"staleness": 1}, {"sleep": True}, {"place": "in_process"}])
def test_several_processes_share_what_a_server_can_give_them(settings: dict[str, Any]) -> None:
    config = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", **settings))
    ((name, _),) = settings.items()
    with pytest.raises(
        UserError, match=rf"sampler\.{name}=.* is for one process, and there are 2; set it to its default"
    ):
        config.check_processes(2)
    config = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm"))
    config.check_processes(2)
    check_sampler(config, NANO, Ranks(0, 2))


@pytest.mark.parametrize(
    ("dtype", "said", "way_out"),
    [
        ("float32", -2.0, "sampler.tolerance 0.1; set another sampler.sync or sampler.place, or"),
        (
            "bfloat16",
            -2.0,
            "bfloat16 alone explains it, raise sampler.tolerance; otherwise set another sampler.sync or",
        ),
        (
            "bfloat16",
            float("nan"),
            "sampler.tolerance 0.1; set another sampler.sync or",
        ),  # no tolerance lets it through
    ],
)
def test_weights_that_did_not_arrive_name_a_way_out(dtype: Any, said: float, way_out: str) -> None:
    settings = StudentSettings(dtype=dtype, gradient_checkpointing=False)
    learner = Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])
    remote: Any = SimpleNamespace(vocabulary=100, ready=lambda: None, forget_prefixes=lambda: None, model=None)
    remote.read = lambda sequences: [[said] * (len(one) - 1) for one in sequences]
    sampler = VllmSampler(learner, remote, SimpleNamespace(send=lambda: None), tolerance=0.1)
    with pytest.raises(WeightsError, match=way_out):
        sampler.take_weights()


@pytest.mark.parametrize(("place", "starts"), [("server", "Service"), ("in_process", "Engine")])
def test_the_probes_fit_a_run_of_short_sequences(
    place: Any, starts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launches: list[Launch] = []

    class StartedError(Exception):
        pass

    def start(launch: Launch, *, log: Path) -> None:
        launches.append(launch)
        raise StartedError

    monkeypatch.setattr(f"pipelines.student_sampling.{starts}", start)
    tree = {
        "student": {"model": "nano"},
        "sampler": {"backend": "vllm", "place": place},
        "stages": {"on_policy": {"kind": "on_policy", "sampling": {mode: {"max_new_tokens": 8} for mode in MODES}}},
        "evaluation": {"sampling": {mode: {"max_new_tokens": 8} for mode in MODES}},
    }
    whoever: Any = None
    for prompt in (14, PROBE_TOKENS):
        sampled = student_sampler(
            validate({**tree, "max_prompt_tokens": prompt}),
            NANO,
            whoever,
            whoever,
            ALONE,
            teacher=NANO.shape,
            logs=tmp_path,
        )
        with pytest.raises(StartedError), sampled:
            pass
    # One token has to be said behind what is scored.
    assert [launch.max_model_len for launch in launches] == [PROBE_TOKENS + 1, PROBE_TOKENS + 8 + 1]


CUTS = (
    *(("--tensor-parallel-size", "2"), ("--pipeline_parallel_size=2",), ("-tp", "2"), ("--tensor-par", "2")),
    *(("--te=2",), ("--pipeline_par", "2"), ("-t", "2"), ("--data-parallel", "2"), ("--data_parallel_size_local=2",)),
    *(("-dpl", "2"), ("-dpn=1",), ("--prefill-context", "2"), ("-pcp", "2")),
)


@pytest.mark.parametrize("words", CUTS)
def test_a_server_that_is_cut_is_refused(words: tuple[str, ...]) -> None:
    config = RunConfig(
        student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", server_args=words)
    )
    with pytest.raises(
        UserError, match=f"server_args has {words[0]}, and the weights are sent to a server that is whole"
    ):
        check_sampler(config, NANO, ALONE)


@pytest.mark.parametrize("place", ["server", "in_process"])
@pytest.mark.parametrize("words", [("--logprobs-mode=processed_logprobs",), ("--logprobs_mode", "raw_logits")])
def test_log_probabilities_of_another_distribution_are_refused(
    words: tuple[str, ...], place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    sampler = SamplerSettings(backend="vllm", place=place, server_args=("--max-num-seqs", "8", *words))
    with pytest.raises(UserError, match=f"^sampler.server_args has {words[0]}, and the log-probabilities"):
        check_sampler(RunConfig(student=StudentSettings(model="nano"), sampler=sampler), NANO, ALONE)


def test_what_a_server_is_started_with(tmp_path: Path) -> None:
    assert flags_of("file") == ("--worker-extension-cls", "distill.vllm.worker.WeightsFromFile")
    assert flags_of("nccl") == ("--weight-transfer-config", '{"backend": "nccl"}')
    words = flags_of("adapter", LoraSettings(rank=33))
    assert words[:2] == ("--enable-lora", "--lora-target-modules")
    assert "lm_head" not in words
    assert words[-2:] == ("--max-lora-rank", "64")  # the smallest that vLLM has and that is large enough
    assert dict(variables_of("adapter", None))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    root = str(Path(__file__).resolve().parent.parent)
    assert dict(variables_of("file", "/mine")) == {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": f"{root}:/mine"}
    assert dict(variables_of("ipc", None)) == {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


class Stuck:
    """vLLM's engine when its peer does not answer: it goes on when its communicator is ended."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then, self.ended = then, threading.Event()

    def send_weights(self) -> None:
        self.then()
        assert self.ended.wait(60)

    def shutdown(self) -> None:
        self.ended.set()


def engine_sync(engine: Any, monkeypatch: pytest.MonkeyPatch) -> EngineSync:
    """With a server that says yes to everything."""
    install_device(monkeypatch.setattr)
    monkeypatch.setattr("students.engine_sync._LAST_WORDS_SECONDS", 0.2)
    monkeypatch.setattr("students.engine_sync._Routes._ask", lambda *_: SimpleNamespace(json=lambda: {"is_paused": 0}))
    monkeypatch.setattr(EngineSync, "_begin", lambda sync: engine)
    client: Any = SimpleNamespace(replicas=[SimpleNamespace(url="http://127.0.0.1:1")], check=lambda: None)
    return EngineSync("nccl", client, lambda: [])


def test_whoever_watches_the_server_knows_of_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def receiving() -> Iterator[None]:
        seen.append("begins")
        try:
            yield
        finally:
            seen.append("ends")

    def fail() -> None:
        raise RuntimeError("NCCL error")

    sync = engine_sync(SimpleNamespace(send_weights=lambda: seen.append("send")), monkeypatch)
    sync.receiving = receiving
    sync.send()
    assert seen == ["begins", "send", "ends"]
    sync = engine_sync(Stuck(fail), monkeypatch)
    sync.receiving = receiving
    with pytest.raises(GoneError):
        sync.send()
    assert seen == ["begins", "send", "ends", "begins", "ends"]


def test_ctrl_c_is_heard_while_nccl_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Stuck(lambda: os.kill(os.getpid(), signal.SIGINT))
    with deferred_signals(), pytest.raises(StoppedError):
        engine_sync(engine, monkeypatch).send()
    assert engine.ended.is_set()


def test_an_engine_works_where_the_trainer_does_and_on_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams do not wait for the trainer's, and a thread begins on the first device."""
    seen: list[Any] = []
    engine = SimpleNamespace(send_weights=lambda: seen.append("send"))
    sync = engine_sync(engine, monkeypatch)
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: seen.append("finish"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 3)
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: seen.append((index, threading.get_ident())))
    sync.send()
    assert [seen[0], seen[2]] == ["finish", "send"]
    index, thread = seen[1]
    assert index == 3
    assert thread != threading.get_ident()


def test_what_vllms_engine_raises_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    engine = Stuck(fail)
    with pytest.raises(GoneError, match="transfer of the student's weights by nccl failed: NCCL error: unhandled"):
        engine_sync(engine, monkeypatch).send()
    assert engine.ended.is_set()


def test_merged_weights_are_those_that_an_export_holds(tmp_path: Path) -> None:
    student = lora_student()
    merged = dict(student.merged_weights())
    student.export(tmp_path, student.weights())
    exported = load_model(open_checkpoint(resolve(str(tmp_path), role="student")), torch.float32, "cpu")
    expected = dict(exported.named_parameters())
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value.detach(), atol=1e-6, rtol=1e-5)


def lora_student() -> Student:
    """One whose adapters change something."""
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False, lora=LORA)
    student = Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return student


def test_adapters_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    student = lora_student()
    (tmp_path / "ours").mkdir()
    student.write_adapter(tmp_path / "ours")
    student.adapted.save_pretrained(tmp_path / "peft")
    ours, pefts = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "peft"))
    assert ours.keys() == pefts.keys()
    assert len(ours) == 2 * 7 * NANO.shape.num_layers
    assert all(torch.equal(ours[name], pefts[name]) for name in ours)
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["bias"], said["modules_to_save"]) == (4, 8.0, "none", None)
    assert set(said["target_modules"]) == set(MODULES)


@pytest.mark.server  # no server starts, but vLLM has to be there
def test_vllm_takes_what_the_rule_lets_through() -> None:
    """The table of ranks, and its own check of an adapter's settings, as the installed vLLM has them."""
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    assert get_args(MaxLoRARanks) == RANKS
    with tempfile.TemporaryDirectory() as folder:
        lora_student().write_adapter(Path(folder))
        PEFTHelper.from_local_dir(folder, None).validate_legal(LoRAConfig(max_lora_rank=8))


def test_an_adapter_has_a_new_name_and_a_private_folder_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def ask(client: Any, path: str, body: dict[str, Any]) -> None:
        asked.append((path, body))
        if path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            assert (folder / "written").exists()
            assert folder.stat().st_mode & 0o077 == 0

    monkeypatch.setattr("students.weight_sync.ask", ask)
    sync = AdapterSync(None, lambda folder: (folder / "written").touch())  # type: ignore[arg-type]
    names = [sync.send(), sync.send()]
    assert len(set(names)) == 2
    assert [path for path, _ in asked] == [*["/v1/load_lora_adapter"] * 2, "/v1/unload_lora_adapter"]
    assert [body["lora_name"] for _, body in asked] == [*names, names[0]]
    folders = {body["lora_path"] for _, body in asked if "lora_path" in body}
    assert len(folders) == 2
    assert not any(Path(folder).exists() for folder in folders)
    assert all("load_inplace" not in body for _, body in asked)


SENDER = """
import sys, time
from students.handover import private_folder
with private_folder() as folder:
    (folder / "weights.safetensors").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "distill-mine").mkdir()
    senders = [
        subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    try:
        killed, living = (Path(sender.stdout.readline().strip()) for sender in senders if sender.stdout)
        senders[0].kill()
        senders[0].wait()
        assert (killed / "weights.safetensors").exists()
        with private_folder():  # it may be just being made
            assert killed.exists()
        for folder in tmp_path.iterdir():
            os.utime(folder, (0, 0))
        with private_folder() as own:
            assert set(tmp_path.iterdir()) == {tmp_path / "distill-mine", living, own}
            assert (living / "weights.safetensors").exists()
    finally:
        for sender in senders:
            sender.kill()
            sender.communicate()


def file_sync() -> FileSync:
    return FileSync(None, lambda: [("weight", torch.zeros(1000, 1000))])  # type: ignore[arg-type]


def adapter_sync() -> AdapterSync:
    return AdapterSync(None, lora_student().write_adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize("sync", [file_sync, adapter_sync])
def test_memory_without_room_for_the_weights_is_a_sentence(
    sync: Callable[[], WeightSync], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("students.weight_sync.ask", lambda *_: pytest.fail("nothing was to be sent"))
    with pytest.raises(
        DistillError, match=r"MB, and /dev/shm has 0\.0 MB free; .*larger --shm-size, or set.*TMPDIR"
    ) as one:
        sync().send()
    assert one.value.exit_code == 1
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(DistillError, match=rf"and {tmp_path} has 0\.0 MB free; make room there, or set.*TMPDIR"):
        sync().send()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sync", [file_sync, adapter_sync])
def test_weights_that_cannot_be_written_are_a_sentence(
    sync: Callable[[], WeightSync], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A limit of a file's size stands in for memory that fills up meanwhile: the write fails half way."""
    made, limits = sync(), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            DistillError, match=rf"could not be written to {tmp_path} for its server: .*too large.*TMPDIR"
        ):
            made.send()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(DistillError, match=r"gone for its server: No such file or directory; .*TMPDIR"):
        made.send()


def test_a_server_sleeps_only_on_the_trainers_gpu() -> None:
    check_sleep(on_gpu=True, own_devices=False)
    with pytest.raises(UserError, match=r"sampler\.devices gives it its own"):
        check_sleep(on_gpu=True, own_devices=True)
    config = RunConfig(student=StudentSettings(model="nano"), sampler=SamplerSettings(backend="vllm", sleep=True))
    with pytest.raises(UserError, match=r"sampler\.sleep=true is for vLLM on the trainer's GPU, and this machine"):
        check_sampler(config, NANO, ALONE)


def test_a_student_counts_the_changes_of_its_weights() -> None:
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False)
    student = Student(load_model(NANO, torch.float32, "cpu"), settings, stop_ids=[0])
    student.load_weights(student.weights())
    assert student.num_changes == 1
