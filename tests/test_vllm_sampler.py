"""The student behind a real vLLM server: it speaks with the trainer's weights, or the run stops."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.family import resolve
from distill.model_config import LoraSettings, StudentSettings
from distill.types import MODES, Prompt, Request, Sampling
from distill.vllm.client import Client
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Launch, Service
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import VllmSampler, WeightsError
from students.weight_sync import FileSync, flags_of, variables_of

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

NANO = open_checkpoint(resolve("nano", role="student"))
ENCODER = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    launch = Launch(
        NANO,
        "generate",
        dtype="float32",
        max_model_len=256,
        on_gpu=False,
        extra=flags_of("file"),
        whose="student",
        max_restarts=0,
        variables=variables_of("file", None),
    )
    with Service(launch, log=tmp_path_factory.mktemp("student") / "log") as service:
        service.wait()
        with Client([service.url], width=64, whose="student") as client:
            yield client


def student(**settings: Any) -> Student:
    model = load_model(NANO, torch.float32, "cpu")
    settings = {"dtype": "float32", "gradient_checkpointing": False, **settings}
    return Student(model, StudentSettings(**settings), stop_ids=ENCODER.stop_ids)


def sampler(client: Client, student: Student) -> VllmSampler:
    remote = RemoteSampler(client, ENCODER, speaker="student", vocabulary=NANO.shape.vocabulary)
    return VllmSampler(student, remote, FileSync(client, student.merged_weights), tolerance=1e-4)


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


def train(student: Student, seed: int) -> None:
    """What an optimiser step does to whoever holds a copy of the weights, and more of it."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=draw)
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


def test_adapters_arrive_merged(client: Client) -> None:
    learner = student(lora=LoraSettings(rank=4, alpha=8.0))
    speaker = sampler(client, learner)
    for step in range(3):
        with torch.no_grad():  # peft begins with adapters that change nothing
            for name, parameter in learner.model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        learner.num_changes += 1
        speaker.generate(requests(2))
        assert speaker.facts()["sampler.gap"] <= 1e-4


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
    speaker = sampler(client, learner)
    speaker.generate(requests(1))

    class Nothing:
        def send(self) -> None:
            """A transfer that says it is done."""

    speaker.sync = Nothing()
    train(learner, 7)
    with pytest.raises(WeightsError, match="does not hold the student's weights"):
        speaker.generate(requests(1))


def test_a_run_samples_its_student_through_vllm(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "teacher": {"model": "tiny", "dtype": "float32"},
                "student": {"model": "nano", "dtype": "float32", "gradient_checkpointing": False},
                "sampler": {"backend": "vllm"},
                "stages": {
                    "on_policy": {
                        "kind": "on_policy",
                        "steps": 4,
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
            }
        )
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert all(step["sampler.gap"] <= 1e-4 and step["sampler.sync_seconds"] > 0 for step in steps)
    assert (out / "servers" / "student.log").exists()
