"""The student through vLLM on whatever device is here, wired as in a run: every way for its weights, asleep and awake.

    python -m pytest -s tests/test_sampler_device.py

On a machine with a GPU this is what no other one shows: handles of CUDA, NCCL (with a second GPU), streams, captured
passes, vLLM's sleep, its reload of a GPU's layers, and a mixture of experts. It says what it measured. On a CPU the
same tests go the ways that there are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transfers import check_weights_that_never_left, train
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.family import resolve
from distill.recipe import validate
from distill.types import MODES, Prompt, Request, Rollout, Sampling
from pipelines.student_sampling import check_sampler, student_sampler
from students.ranks import ALONE
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import TOLERANCE, VllmSampler

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

ON_GPU = torch.cuda.is_available()
TINY = open_checkpoint(resolve("tiny", role="teacher"))
"""One that thinks; as a student too."""
ENCODER = Encoder(load_tokenizer(TINY))
PUBLISHED: dict[str, Any] = {
    **{"vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 512},
}
MIXED: dict[str, Any] = {
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
}


@dataclass(frozen=True, slots=True)
class Way:
    """Settings of the sampler, and whether the student has adapters."""

    name: str
    settings: dict[str, Any]
    has_adapters: bool = False

    def __str__(self) -> str:
        return self.name


def ways() -> Iterator[Way]:
    """Those that this machine has."""
    yield Way("server", {})
    yield Way("adapter", {"sync": "adapter"}, has_adapters=True)
    yield Way("in process", {"place": "in_process"})
    if not ON_GPU:
        return
    yield Way("server, merged", {"sync": "ipc"}, has_adapters=True)
    yield Way("server, eager", {"server_args": ("--enforce-eager",)})
    yield Way("in process, merged", {"place": "in_process"}, has_adapters=True)
    yield Way("server that sleeps", {"sleep": True})
    yield Way("adapter that sleeps", {"sync": "adapter", "sleep": True}, has_adapters=True)
    yield Way("in process, sleeps", {"place": "in_process", "sleep": True})
    if torch.cuda.device_count() > 1:
        yield Way("another GPU", {"devices": ("1",)})
        yield Way("another GPU, merged", {"devices": ("1",), "sync": "nccl"}, has_adapters=True)


WAYS = list(ways())


@contextmanager
def speaker(way: Way, dtype: str, folder: Path, checkpoint: Checkpoint = TINY) -> Iterator[tuple[Student, VllmSampler]]:
    """As a run makes it."""
    lengths = {mode: {"max_new_tokens": 48} for mode in MODES}
    config = validate(
        {
            "teacher": {"model": "tiny"},
            "student": {"model": "nano", "dtype": dtype, "lora": {"rank": 8} if way.has_adapters else None},
            "sampler": {"backend": "vllm", **way.settings},
            "stages": {"on_policy": {"kind": "on_policy", "sampling": lengths}},
            "evaluation": {"sampling": lengths},
            "max_prompt_tokens": 128,
        }
    )
    check_sampler(config, checkpoint, ALONE)
    model = load_model(checkpoint, getattr(torch, dtype), ALONE.device)
    learner = Student(model, config.student, stop_ids=ENCODER.stop_ids)
    with student_sampler(config, checkpoint, learner, ENCODER, ALONE, teacher=TINY.shape, logs=folder) as made:
        assert isinstance(made, VllmSampler)
        yield learner, made


def requests(num: int, vocabulary: int = TINY.shape.vocabulary) -> list[Request]:
    """Some of one prompt, which the prefix cache keeps whole blocks of; temperature 2 says many different things."""
    prompts = [tuple(5 + (7 * number * place) % (vocabulary - 5) for place in range(96)) for number in range(2)]
    return [
        Request(Prompt(()), "no_think", "hard", prompts[number % 2], Sampling(48, temperature=2.0), number)
        for number in range(num)
    ]


def off(learner: Student, rollouts: list[Rollout]) -> float:
    """The largest difference between what was said of a sampled token and what the trainer says."""
    gaps = [
        (torch.tensor(rollout.logprobs) - scored.token_R.cpu()).abs().max()
        for rollout, scored in zip(rollouts, rescore(learner, rollouts), strict=True)
    ]
    return float(max(gaps))


CASES = [
    (way, dtype)
    for way in WAYS
    for dtype in (("float32", "bfloat16") if ON_GPU else ("float32",))
    # vLLM's kernels for adapters on a GPU take 16 bits.
    if not (ON_GPU and dtype == "float32" and way.settings.get("sync") == "adapter")
]


@pytest.mark.parametrize(("way", "dtype"), CASES, ids=str)
def test_it_speaks_with_the_weights_of_now_and_one_that_does_not_is_caught(
    way: Way, dtype: str, tmp_path: Path
) -> None:
    with speaker(way, dtype, tmp_path) as (learner, made):
        said = []
        for step in range(5):
            train(learner, step)
            rollouts = made.generate(requests(24))
            facts = made.facts()
            largest = off(learner, rollouts)
            print(
                f"{way}, {dtype}, step {step}: probe gap {facts['sampler.gap']:.2g}, responses' {largest:.2g}, "
                f"sync {facts['sampler.sync_seconds']:.3f} s"
            )
            assert facts["sampler.gap"] <= TOLERANCE[dtype]
            # Decoded, and with captured passes where there are any, while the probes are read.
            assert largest <= TOLERANCE[dtype]
            said.append([one.logprobs for one in rollouts])
        assert all(before != after for before, after in pairwise(said))
        if not way.settings.get("sleep"):
            # The same weights, and another thread: at staleness 1 one samples while another trains.
            again: list[list[Rollout]] = []
            thread = threading.Thread(target=lambda: again.append(made.generate(requests(24))))
            thread.start()
            thread.join()
            assert off(learner, again[0]) <= TOLERANCE[dtype] and made.facts() == {}
        check_weights_that_never_left(learner, made, requests(2))


@pytest.mark.skipif(not ON_GPU, reason="vLLM sleeps on a GPU alone")
@pytest.mark.parametrize("way", [way for way in WAYS if way.settings.get("sleep")], ids=str)
def test_one_that_sleeps_leaves_its_memory_to_the_trainer(way: Way, tmp_path: Path) -> None:
    def free() -> float:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / torch.cuda.mem_get_info()[1]

    with speaker(way, "bfloat16", tmp_path) as (learner, made):
        before = free()
        made.take_weights()
        awake = free()
        made.generate(requests(4))
        asleep = free()
        print(f"{way}: free before it started {before:.1%}, awake {awake:.1%}, asleep {asleep:.1%}")
        assert awake < before - 0.2 and asleep > before - 0.1
        # What the trainer takes meanwhile is its own.
        kept = torch.full((int(0.1 * torch.cuda.mem_get_info()[1] / 4),), 3.0, device="cuda")
        assert float(kept.sum(dtype=torch.float64)) == 3.0 * kept.numel()
        del kept
        train(learner, 0)
        assert off(learner, made.generate(requests(4))) <= TOLERANCE["bfloat16"]


def random_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "experts":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**PUBLISHED, **MIXED))
    return Qwen3ForCausalLM(Qwen3Config(**PUBLISHED, tie_word_embeddings=kind == "tied"))


@pytest.mark.skipif(not ON_GPU, reason="a CPU has these shapes in other tests, and takes no mixture of experts over")
@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
@pytest.mark.parametrize("way", [way for way in WAYS if not way.has_adapters], ids=str)
def test_the_published_vocabulary_and_experts(way: Way, kind: str, tmp_path: Path) -> None:
    # The experts that a token goes to are others where two are close in 16 bits.
    dtype = "float32" if kind == "experts" else "bfloat16"
    model = random_model(kind).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(TINY).save_pretrained(str(tmp_path / "model"))
    checkpoint = open_checkpoint(resolve(str(tmp_path / "model"), role="student"))
    with speaker(way, dtype, tmp_path, checkpoint) as (learner, made):
        for step in range(3):
            train(learner, step)
            largest = off(learner, made.generate(requests(8, 151_936)))
            print(f"{way}, {kind}, {dtype}: probe gap {made.facts()['sampler.gap']:.2g}, responses' {largest:.2g}")
            assert largest <= TOLERANCE[dtype]
