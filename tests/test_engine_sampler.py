"""The student through a real vLLM engine in this process: the trainer's weights, the run's semantics, nothing left."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from transfers import check_weights_that_never_left, train

from distill import interrupt
from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import DistillError, UserError
from distill.family import resolve
from distill.model_config import LoraSettings, StudentSettings
from distill.sampler import TransformersSampler
from distill.types import MODES, Mode, Prompt, Request, Rollout, Sampling
from distill.vllm.client import Client
from distill.vllm.engine import Engine
from distill.vllm.engine_sampler import EngineSampler
from distill.vllm.launch import Launch
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.segments import Segment
from distill.vllm.service import Service
from pipelines.phases import reproducible
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import VllmSampler
from students.weight_sync import FileSync, MemorySync, WeightsError, flags_of, variables_of

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

LEARNER = open_checkpoint(resolve("tiny", role="teacher"))
"""One that thinks, unlike the embedded student before it has learnt to."""
ENCODER = Encoder(load_tokenizer(LEARNER))
# Several, as they are to a tokenizer that is not the embedded one.
ENCODER.early_stop_ids = (198, 28, 198, *ENCODER.early_stop_ids)
WILD = Sampling(24, temperature=2.0)


def launch(*extra: str, variables: tuple[tuple[str, str], ...] = ()) -> Launch:
    return Launch(
        LEARNER,
        "generate",
        dtype="float32",
        max_model_len=256,
        on_gpu=False,
        extra=extra,
        whose="student",
        max_restarts=0,
        variables=variables,
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(launch(), log=tmp_path_factory.mktemp("engine") / "log") as engine:
        yield engine


def student(**settings: Any) -> Student:
    model = load_model(LEARNER, torch.float32, "cpu")
    settings = {"dtype": "float32", "gradient_checkpointing": False, **settings}
    return Student(model, StudentSettings(**settings), stop_ids=ENCODER.stop_ids)


def sampler(engine: Engine, student: Student, *, width: int = 64) -> VllmSampler:
    speaker = EngineSampler(engine, ENCODER, speaker="student", width=width)
    return VllmSampler(student, speaker, MemorySync(engine, student.merged_weights), tolerance=1e-4)


def request(number: int, sampling: Sampling, *, mode: Mode = "think", seed: int | None = None) -> Request:
    prompt = Prompt(({"role": "user", "content": f"{number % 10}+4*{number % 7}-2="},))
    return ENCODER.request(prompt, mode=mode, sampling=sampling, seed=number if seed is None else seed)


def requests(num: int) -> list[Request]:
    return [request(number, WILD, mode=MODES[number % 2]) for number in range(num)]


def check_scores(learner: Student, rollouts: Sequence[Rollout]) -> None:
    for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(scored.token_R.tolist(), abs=1e-4)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8.0)])
def test_each_step_speaks_with_the_trainers_weights(engine: Engine, lora: LoraSettings | None) -> None:
    learner = student(lora=lora)
    speaker = sampler(engine, learner)
    said = []
    for step in range(12):
        train(learner, step)
        speaker.weight_version = step + 1
        rollouts = speaker.generate(requests(4))
        assert 0 <= speaker.facts()["sampler.gap"] <= 1e-4
        assert {rollout.weight_version for rollout in rollouts} == {step + 1}
        check_scores(learner, rollouts)
        said.append(tuple(one.logprobs for one in rollouts))
    assert len(set(said)) == 12
    speaker.generate(requests(1))
    assert speaker.facts() == {}


def test_it_says_what_a_server_says(engine: Engine, tmp_path: Path) -> None:
    learner = student()
    for step in range(3):
        train(learner, step)
    asked = [
        request(number, Sampling(24, temperature=1.5, thinking_budget=6), mode=MODES[number % 2])
        for number in range(16)
    ]
    here = sampler(engine, learner).generate(asked)
    served = launch(*flags_of("file"), variables=variables_of("file", None))
    with Service(served, log=tmp_path / "log") as service:
        service.wait()
        with Client([service.url], width=64, whose="student", check=service.check) as client:
            remote = RemoteSampler(client, ENCODER, speaker="student", vocabulary=LEARNER.shape.vocabulary)
            there = VllmSampler(learner, remote, FileSync(client, learner.merged_weights), tolerance=1e-4)
            theirs = there.generate(asked)
    assert any(any(one.forced) for one in here)
    for mine, its in zip(here, theirs, strict=True):
        assert (mine.response_ids, mine.forced, mine.finish_reason) == (its.response_ids, its.forced, its.finish_reason)
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)


def test_it_says_what_transformers_says_where_nothing_is_drawn(engine: Engine) -> None:
    learner = student()
    asked = [
        request(number, Sampling(8 + number, top_k=1, thinking_budget=6 if mode == "think" else None), mode=mode)
        for number in range(8)
        for mode in MODES
    ]
    ours = TransformersSampler(learner.model, ENCODER, speaker="student").generate(asked)
    for mine, its in zip(sampler(engine, learner).generate(asked), ours, strict=True):
        assert (mine.response_ids, mine.forced, mine.finish_reason) == (its.response_ids, its.forced, its.finish_reason)
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)
    assert {one.finish_reason for one in ours} == {"stop", "length"}


def test_a_thinking_budget_forces_tokens_and_marks_them(engine: Engine) -> None:
    learner = student()
    rollouts = sampler(engine, learner).generate(
        [request(number, Sampling(60, thinking_budget=5)) for number in range(8)]
    )
    cut = [one for one in rollouts if any(one.forced)]
    assert cut
    early_stop = tuple(ENCODER.early_stop_ids)
    for one in cut:
        begin = one.forced.index(True)
        assert begin >= 5
        assert one.response_ids[begin : begin + len(early_stop)] == early_stop
        assert sum(one.forced) == len(early_stop)
    check_scores(learner, rollouts)
    # Where the limit falls among the forced tokens, those that fit are there and scored.
    limit = 5 + 2
    short = sampler(engine, learner).generate(
        [request(number, Sampling(limit, thinking_budget=5)) for number in range(8)]
    )
    assert any(one.forced[-1] and len(one.response_ids) == limit and one.finish_reason == "length" for one in short)
    check_scores(learner, short)


def test_a_request_is_its_seed_and_not_its_company(engine: Engine) -> None:
    learner = student()
    asked = [request(3, WILD, seed=seed) for seed in range(12)]
    together = sampler(engine, learner).generate(asked)
    assert len({one.response_ids for one in together}) > 6  # samples of one prompt
    backwards = sampler(engine, learner, width=5).generate(asked[::-1])[::-1]
    assert [one.response_ids for one in backwards] == [one.response_ids for one in together]
    again = sampler(engine, learner).generate(asked)
    assert [one.logprobs for one in again] == [one.logprobs for one in together]


BLOCK = 128
"""Tokens in a block of the prefix cache, on a CPU."""


def known_tokens(engine: Engine, speaker: VllmSampler, asked: Sequence[Request]) -> list[int]:
    """Of each request the tokens of its prompt that the engine did not have to read."""
    found: dict[int, int] = {}
    answer = engine._answer

    def note(output: Any) -> tuple[int, Segment]:
        place, segment = answer(output)
        found[place] = output.num_cached_tokens
        return place, segment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_answer", note)
        speaker.vllm.generate(asked)
    return [found[place] for place in range(len(asked))]


def test_a_long_prompt_is_read_once_for_its_samples_and_again_by_new_weights(engine: Engine) -> None:
    learner = student()
    speaker = sampler(engine, learner)
    long = ENCODER.request(
        Prompt(({"role": "user", "content": "+".join("3" for _ in range(80)) + "="},)),
        mode="think",
        sampling=Sampling(8),
        seed=0,
    )
    assert BLOCK < len(long.prompt_ids) - 1 < 2 * BLOCK
    asked = [replace(long, seed=seed) for seed in range(4)]
    speaker.take_weights()
    assert known_tokens(engine, speaker, asked) == [0, BLOCK, BLOCK, BLOCK]
    assert known_tokens(engine, speaker, asked) == [BLOCK] * 4
    short = [request(1, Sampling(8), seed=seed) for seed in range(4)]
    assert known_tokens(engine, speaker, short) == [0] * 4  # less than a block
    # What the old weights made of the prompt is no use to the new ones.
    train(learner, 0)
    speaker.take_weights()
    assert known_tokens(engine, speaker, asked) == [0, BLOCK, BLOCK, BLOCK]
    check_scores(learner, speaker.generate(asked))


def test_who_ends_first_is_told_first_and_work_that_is_called_off_leaves_nothing(engine: Engine) -> None:
    learner = student()
    speaker = sampler(engine, learner)
    asked = [request(number, Sampling(limit, top_k=1)) for number, limit in enumerate((40, 2, 30, 3))]
    told: list[Rollout] = []
    rollouts = speaker.generate(asked, told.append)
    assert told[0] is rollouts[1]
    assert sorted(map(id, told)) == sorted(map(id, rollouts))
    called_off = threading.Event()
    with interrupt.until(called_off), pytest.raises(interrupt.CalledOffError):
        speaker.generate(asked, lambda rollout: called_off.set())
    assert engine.num_asked == 0
    assert speaker.generate(asked) == rollouts


@pytest.mark.parametrize("spoilt", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_transfer_that_went_wrong_is_caught(engine: Engine, spoilt: str) -> None:
    learner = student()
    right = learner.merged_weights
    speaker = sampler(engine, learner)
    speaker.sync = MemorySync(
        engine, lambda: ((name, 1.02 * value if name == spoilt else value) for name, value in right())
    )
    with pytest.raises(WeightsError, match=r"log-probability -\d+\.\d+, the trainer gives it -\d+\.\d+; the gap of"):
        speaker.generate(requests(1))
    speaker.sync = MemorySync(engine, right)
    speaker.generate(requests(1))
    assert speaker.facts()["sampler.gap"] <= 1e-4


def test_weights_that_never_left_are_caught(engine: Engine) -> None:
    learner = student()
    check_weights_that_never_left(learner, sampler(engine, learner), requests(1))


def test_the_process_is_as_it_was_and_an_engine_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, where vLLM was never imported."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "as it was\n"


def state() -> tuple[Any, ...]:
    root = logging.getLogger()
    return (
        {name: value for name, value in os.environ.items() if not name.startswith("_TORCHINDUCTOR")},
        (torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        (root.level, list(root.handlers)),
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
    )


def undisturbed(folder: Path) -> None:
    learner, process = student(), psutil.Process()
    for turn in range(3):
        before = state()
        with Engine(launch(), log=folder / "log") as engine:
            speaker = sampler(engine, learner)
            speaker.generate(requests(8))
            assert state() == before, turn
            working = process.memory_info().rss
        assert state() == before, turn
        assert not torch.distributed.is_initialized()
        assert process.memory_info().rss < working - 0.8 * 2**30, "the cache of keys and values is still there"
    assert "Loading weights took" in (folder / "log").read_text()
    print("as it was")


def test_what_vllm_does_not_take_is_a_sentence(tmp_path: Path, engine: Engine) -> None:
    for words, error, sentence in (
        (("--no-such-flag",), UserError, r"does not take sampler\.server_args as they are: .*--no-such-flag"),
        (("--max-num-seqs", "many"), UserError, r"does not take sampler\.server_args as they are: .*--max-num-seqs"),
        (("--max-num-batched-tokens", "8"), DistillError, "vLLM in this process could not start for the student"),
    ):
        with Engine(launch(*words), log=tmp_path / "log") as broken, pytest.raises(error, match=sentence):
            broken.start()
    speaker = sampler(engine, student())
    speaker.generate(requests(1))  # the other one goes on
    for refused, sentence in (
        (request(0, Sampling(8, temperature=3.0)), r"temperature is 3\.0, and vLLM draws at 0\.01 to 2\.0"),
        (Request(Prompt(()), "think", "hard", (1,) * 300, Sampling(8), 0), "refuses a request .*256"),
    ):
        with pytest.raises(DistillError, match=sentence):
            speaker.generate([*requests(2), refused])
    assert len(speaker.generate(requests(3))) == 3


def test_a_run_that_was_interrupted_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "teacher": {"model": "tiny", "dtype": "float32"},
                "student": {
                    "model": "nano",
                    "dtype": "float32",
                    "gradient_checkpointing": False,
                    # Dropout draws from the process's own random stream, which vLLM must leave alone.
                    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2},
                },
                "stages": {
                    "on_policy": {
                        "kind": "on_policy",
                        "steps": 10,
                        "prompts_per_step": 4,
                        "samples_per_prompt": 2,
                        "sampling": {
                            "think": {"max_new_tokens": 24, "thinking_budget": 8},
                            "no_think": {"max_new_tokens": 16},
                        },
                        "optimiser": {"learning_rate": 1e-3, "warmup_steps": 0},
                    }
                },
                "evaluation": {"num_questions": 4, "sampling": {mode: {"max_new_tokens": 16} for mode in MODES}},
                "max_prompt_tokens": 64,
            }
        )
    )

    def command(out: Path) -> list[str]:
        words = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(out), "--json"]
        return [*words, "--set", "sampler.backend=vllm", "--set", "sampler.place=in_process"]

    def rows(out: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(row["sampler.gap"] <= 1e-4 for row in found)
        return [reproducible(row) for row in found]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run(command(whole), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["run"] == str(whole)  # standard output is the run's own
    assert "Loading weights took" in (whole / "servers" / "student.log").read_text()
    with subprocess.Popen(command(parts), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        while not (parts / "metrics.jsonl").exists() or len((parts / "metrics.jsonl").read_text().splitlines()) < 3:
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said[-3000:]
    assert len(rows(parts)) < 10
    done = subprocess.run(command(parts), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(parts) == rows(whole)


if __name__ == "__main__":
    undisturbed(Path(sys.argv[1]))
