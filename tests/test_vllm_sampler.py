"""The student behind a real vLLM server: it speaks with the trainer's weights, or the run stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_weights_arrive
import torch
import yaml
from safetensors.torch import load_file, save_file
from transfers import check_weights_that_never_left, train

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import DistillError, UserError
from distill.family import resolve
from distill.model_config import LoraSettings, StudentSettings
from distill.types import MODES, Prompt, Request, Sampling
from distill.vllm.client import Client
from distill.vllm.launch import Launch
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import TOLERANCE, VllmSampler
from students.weight_sync import AdapterSync, FileSync, Way, WeightsError, WeightSync, flags_of, variables_of

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

NANO = open_checkpoint(resolve("nano", role="student"))
ENCODER = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))


LORA = LoraSettings(rank=4, alpha=8.0)


@contextmanager
def serving(way: Way, folder: Path, dtype: str = "float32") -> Iterator[Client]:
    launch = Launch(
        NANO,
        "generate",
        dtype=dtype,
        max_model_len=256,
        on_gpu=False,
        extra=flags_of(way, LORA),
        whose="student",
        max_restarts=0,
        variables=variables_of(way, None),
    )
    with Service(launch, log=folder / "log") as service:
        service.wait()
        with Client([service.url], width=64, whose="student", check=service.check) as client:
            yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving("file", tmp_path_factory.mktemp("student")) as client:
        yield client


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving("file", tmp_path_factory.mktemp("rounding"), "bfloat16") as client:
        yield client


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving("adapter", tmp_path_factory.mktemp("adapting")) as client:
        yield client


def student(**settings: Any) -> Student:
    model = load_model(NANO, torch.float32, "cpu")
    settings = {"dtype": "float32", "gradient_checkpointing": False, **settings}
    return Student(model, StudentSettings(**settings), stop_ids=ENCODER.stop_ids)


def sampler(client: Client, student: Student, sync: WeightSync | None = None) -> VllmSampler:
    remote = RemoteSampler(client, ENCODER, speaker="student", vocabulary=NANO.shape.vocabulary)
    return VllmSampler(student, remote, sync or FileSync(client, student.merged_weights), tolerance=1e-4)


def requests(num: int) -> list[Request]:
    return [
        ENCODER.request(
            Prompt(({"role": "user", "content": f"{number % 10}+4*{number % 7}-2="},)),
            mode=MODES[number % 2],
            sampling=Sampling(24),
            seed=number,
        )
        for number in range(num)
    ]


def train_adapters(student: Student, seed: int) -> None:
    """The same for adapters, which begin as ones that change nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    student.num_changes += 1


def test_fifty_steps_each_with_the_trainers_weights(client: Client) -> None:
    learner = student()
    speaker = sampler(client, learner)
    first = speaker.generate(requests(4))
    for step in range(50):
        train(learner, step)
        speaker.weight_version = step + 1
        rollouts = speaker.generate(requests(4))
        assert 0 <= speaker.facts()["sampler.gap"] <= 1e-4
        assert {rollout.weight_version for rollout in rollouts} == {step + 1}
        # Not of the probes alone: what the server says of its own responses is what the trainer finds.
        for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True):
            assert rollout.logprobs == pytest.approx(scored.token_R.tolist(), abs=1e-4)
    assert [one.response_ids for one in first] != [one.response_ids for one in rollouts]
    # Weights that have not changed are not sent again.
    speaker.generate(requests(1))
    assert speaker.facts() == {}


def test_it_speaks_with_the_weights_that_it_took_while_the_model_is_trained(client: Client) -> None:
    learner = student()
    speaker = sampler(client, learner)
    speaker.take_weights()
    with speaker.keeping():
        train(learner, 3)
        speaker.weight_version = 1
        stale = speaker.generate(requests(4))
    fresh = speaker.generate(requests(4))
    for rollouts, version in ((stale, 0), (fresh, 1)):
        assert {rollout.weight_version for rollout in rollouts} == {version}
        gaps = [
            abs(said - found)
            for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True)
            for said, found in zip(rollout.logprobs, scored.token_R.tolist(), strict=True)
        ]
        assert (max(gaps) <= 1e-4) == (version == 1), max(gaps)


def test_adapters_arrive_merged(client: Client) -> None:
    learner = student(lora=LORA)
    speaker = sampler(client, learner)
    for step in range(3):
        train_adapters(learner, step)
        speaker.generate(requests(2))
        assert speaker.facts()["sampler.gap"] <= 1e-4


def test_adapters_are_swapped_under_a_server_that_runs(adapting: Client) -> None:
    learner = student(lora=LORA)
    speaker = sampler(adapting, learner, AdapterSync(adapting, learner.write_adapter))
    said, names = [], []
    for step in range(24):
        train_adapters(learner, step)
        speaker.weight_version = step + 1
        # The same prompts each time: keys and values that an earlier adapter made of them would show.
        rollouts = speaker.generate(requests(4))
        assert 0 <= speaker.facts()["sampler.gap"] <= 1e-4
        for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True):
            assert rollout.logprobs == pytest.approx(scored.token_R.tolist(), abs=1e-4)
        said.append([one.response_ids for one in rollouts])
        names.append(speaker.vllm.model)
    assert len({str(one) for one in said}) > 12  # the adapters are no trifle
    # None but the last is left, and whoever asks for another is not answered by it.
    speaker.vllm.model = names[-2]
    with pytest.raises(UserError, match=names[-2]):
        speaker.vllm.read([[1, 2]])


def test_an_adapter_with_a_wrong_tensor_is_caught(adapting: Client) -> None:
    learner = student(lora=LORA)

    def corrupted(folder: Path) -> None:
        learner.write_adapter(folder)
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] *= 1.1
        save_file(tensors, path)

    train_adapters(learner, 0)
    speaker = sampler(adapting, learner, AdapterSync(adapting, corrupted))
    with pytest.raises(WeightsError, match=r"log-probability -\d+\.\d+, the trainer gives it -\d+\.\d+; the gap of"):
        speaker.generate(requests(1))


def test_an_adapter_that_is_cut_short_is_refused_by_the_server(adapting: Client) -> None:
    learner = student(lora=LORA)

    def cut(folder: Path) -> None:
        learner.write_adapter(folder)
        path = folder / "adapter_model.safetensors"
        os.truncate(path, path.stat().st_size // 2)

    speaker = sampler(adapting, learner, AdapterSync(adapting, cut))
    with pytest.raises(DistillError, match="failed 5 times on the same request"):
        speaker.generate(requests(1))
    # The server is as it was.
    speaker.sync = AdapterSync(adapting, learner.write_adapter)
    speaker.generate(requests(1))


def test_a_swap_that_never_happened_is_caught(adapting: Client) -> None:
    learner = student(lora=LORA)
    train_adapters(learner, 0)
    sync = AdapterSync(adapting, learner.write_adapter)
    speaker = sampler(adapting, learner, sync)
    speaker.generate(requests(1))
    name = speaker.vllm.model

    class Nothing:
        def send(self) -> str | None:
            return name

    speaker.sync = Nothing()
    train_adapters(learner, 1)
    with pytest.raises(WeightsError, match="does not hold the student's weights"):
        speaker.generate(requests(1))
    # Nor does the base model pass for the adapted one.
    name = None
    with pytest.raises(WeightsError, match="does not hold the student's weights"):
        speaker.generate(requests(1))


@pytest.mark.parametrize("spoilt", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_transfer_that_went_wrong_is_caught(client: Client, spoilt: str) -> None:
    learner = student()

    class Corrupted(FileSync):
        def send(self) -> None:
            right = self.weights
            self.weights = lambda: ((name, 1.02 * value if name == spoilt else value) for name, value in right())
            super().send()

    speaker = sampler(client, learner)
    speaker.sync = Corrupted(client, learner.merged_weights)
    with pytest.raises(WeightsError, match=r"log-probability -\d+\.\d+, the trainer gives it -\d+\.\d+; the gap of"):
        speaker.generate(requests(1))
    # Nothing was remembered of it: right weights are sent again, and found right.
    speaker.sync = FileSync(client, learner.merged_weights)
    speaker.generate(requests(1))
    assert speaker.facts()["sampler.gap"] <= 1e-4


def test_weights_that_never_left_are_caught(client: Client) -> None:
    learner = student()
    check_weights_that_never_left(learner, sampler(client, learner), requests(1))


def test_in_bfloat16_one_step_and_one_bit_are_not_lost(rounding: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate at which forty steps change no score by more than the tolerance."""
    learner = test_weights_arrive.student("bfloat16", learning_rate=2e-6)
    speaker = sampler(rounding, learner)
    speaker.tolerance = TOLERANCE["bfloat16"]
    for step in range(8):
        speaker.take_weights()
        test_weights_arrive.train(learner, step)
    right = speaker.sync

    class Nothing:
        def send(self) -> None:
            """A transfer that says it is done."""

    speaker.sync = Nothing()
    with pytest.raises(WeightsError, match=r"tokens have changed by up to 0\.\d+, the sampler's by exactly 0"):
        speaker.take_weights()
    speaker.sync = right
    name = "model.layers.1.mlp.down_proj.weight"

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file({**tensors, name: test_weights_arrive.spoilt(tensors[name])}, path)

    with monkeypatch.context() as wrong:
        wrong.setattr("students.weight_sync.save_file", write)
        with pytest.raises(WeightsError, match=rf"of \d+ tensors 1 are not what the trainer has, {name}"):
            speaker.take_weights()
    speaker.take_weights()


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}])
def test_a_run_samples_its_student_through_vllm(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "teacher": {"model": "tiny", "dtype": "float32"},
                "student": {"model": "nano", "dtype": "float32", "gradient_checkpointing": False, "lora": lora},
                "sampler": {"backend": "vllm", "sync": "auto" if lora is None else "adapter"},
                "stages": {
                    "on_policy": {
                        "kind": "on_policy",
                        "steps": 50,
                        "prompts_per_step": 4,
                        "samples_per_prompt": 2,
                        "sampling": {mode: {"max_new_tokens": 16} for mode in MODES},
                        "optimiser": {"learning_rate": 1e-3, "warmup_steps": 0},
                    }
                },
                "evaluation": {
                    "num_questions": 4,
                    "sampling": {mode: {"max_new_tokens": 16} for mode in MODES},
                },
                "max_prompt_tokens": 64,
                # Responses this short go wrong at this rate; here they need only be spoken with the right weights.
                "guards": {"repetition": None, "truncation": None},
            }
        )
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 50
    assert all(step["sampler.gap"] <= 1e-4 and step["sampler.sync_seconds"] > 0 for step in steps)
    log = (out / "servers" / "student.log").read_text()
    assert ("Loaded new LoRA adapter" in log) == (lora is not None)
