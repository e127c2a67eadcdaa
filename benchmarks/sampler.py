"""How fast a student is sampled: ``python -m benchmarks.sampler --json``.

Two students: the embedded one, and the published 0.6B shape with random weights (few tokens there). Four samplers: a
vLLM server and a vLLM engine in this process (null where vLLM is not installed, and on a GPU), transformers' own
``generate``, and ours. Two workloads without stop tokens, whose lengths are the requests' limits: ``mixed``, a long
tail (half end by 16 tokens, a tenth run to 256; a quarter of that for the 0.6B shape on a CPU), and ``equal``. Prompts
have 10 to 30 tokens.

``generate`` decodes a batch until its longest row has ended; tokens beyond a row's limit do not count. In process the
samplers take turns, ``--repeats`` times, and the fastest pass counts. ``cpu_tokens_per_second`` are by processor time,
which other work on the machine changes less; null for a server, whose work is another process's. ``logprob_gap`` is the
largest difference between a sampler's log-probability of a token and a forward pass over the whole sequence;
``generate`` gives none. ``sync_seconds`` is what new weights take to get to vLLM, the check included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.machine import random_model
from distill.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from distill.device import finish
from distill.encode import Encoder
from distill.family import SIZES, ModelSource, resolve
from distill.model_config import StudentSettings
from distill.sampler import TransformersSampler
from distill.types import Prompt, Request, Rollout, Sampling
from distill.vllm.client import Client
from distill.vllm.engine import Engine
from distill.vllm.engine_sampler import EngineSampler
from distill.vllm.launch import Launch
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import TOLERANCE, VllmSampler
from students.weight_sync import FileSync, MemorySync, Way, flags_of, variables_of


@dataclass(frozen=True)
class Ids:
    """An encoder without text: what a sampler asks of one. Nothing stops and nothing thinks."""

    stop_ids: tuple[int, ...] = ()
    think_open_id: int = -1
    think_close_id: int = -2
    early_stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Size:
    """How much a student is asked for."""

    num_requests: int
    batch: int
    scale: int
    """Lengths are the workload's, divided by this."""


SIZE = {"embedded": Size(256, 64, 1), "0.6B": Size(16, 16, 4)}
GPU_SIZE = {"embedded": Size(256, 64, 1), "0.6B": Size(128, 64, 1)}


def limits(workload: str, num: int, scale: int) -> list[int]:
    """Tokens of each response."""
    if workload == "equal":
        return [64 // scale] * num
    draw = random.Random(0)
    found = []
    for place in range(num):
        part = place % 10
        length = draw.randint(4, 16) if part < 5 else draw.randint(17, 128) if part < 9 else 256
        found.append(max(1, length // scale))
    return found


def requests(vocabulary: int, workload: str, size: Size) -> list[Request]:
    draw = random.Random(1)
    return [
        Request(
            Prompt(({"role": "user", "content": str(place)},)),
            "no_think",
            "hard",
            tuple(draw.randrange(vocabulary) for _ in range(draw.randint(10, 30))),
            Sampling(max_new_tokens=limit),
            place,
        )
        for place, limit in enumerate(limits(workload, size.num_requests, size.scale))
    ]


class AtItsLimit(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a ``generate`` at its own number of tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.length_B = torch.tensor(lengths)

    def __call__(self, ids: Tensor, scores: Any, **others: Any) -> Tensor:
        return self.length_B.to(ids.device) <= ids.shape[1]


@torch.no_grad()
def generate(model: Qwen3ForCausalLM, asked: Sequence[Request], batch: int) -> None:
    """transformers' own, on batches of ``batch`` rows, padded at the left."""
    model.set_attn_implementation("sdpa")
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        width = max(len(request.prompt_ids) for request in part)
        padding = [width - len(request.prompt_ids) for request in part]
        prompts = [[0] * pad + list(request.prompt_ids) for pad, request in zip(padding, part, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        model.generate(
            input_ids=torch.tensor(prompts, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=max(request.sampling.max_new_tokens for request in part),
            stopping_criteria=StoppingCriteriaList(
                [AtItsLimit([width + request.sampling.max_new_tokens for request in part])]
            ),
        )


def in_process(student: Student, size: Size, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    model = cast(Qwen3ForCausalLM, student.model)
    encoder = cast(Encoder, Ids())
    ours = TransformersSampler(model, encoder, speaker="student", batch=size.batch)
    found: dict[str, dict[str, Any]] = {"transformers_generate": {}, "ours": {}}
    gap = 0.0
    for workload in ("mixed", "equal"):
        asked = requests(int(model.config.vocab_size), workload, size)

        def by_ours(asked: Sequence[Request] = asked) -> None:
            TransformersSampler(model, encoder, speaker="student", batch=size.batch).generate(asked)

        def by_generate(asked: Sequence[Request] = asked) -> None:
            model.eval()
            generate(model, asked, size.batch)

        seconds = fastest({"transformers_generate": by_generate, "ours": by_ours}, arguments)
        num_tokens = sum(request.sampling.max_new_tokens for request in asked)
        for name, (wall, processor) in seconds.items():
            found[name] |= rates(workload, num_tokens, wall, processor)
        gap = max(gap, largest_gap(student, ours.generate(asked[: size.batch])))
    found["transformers_generate"] |= {"sync_seconds": 0.0, "logprob_gap": None}
    found["ours"] |= {"sync_seconds": 0.0, "logprob_gap": gap}
    return found


def fastest(works: dict[str, Callable[[], None]], arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The least seconds by the wall and of this process's processor time, each work in turn."""
    best = dict.fromkeys(works, (float("inf"), float("inf")))
    for _ in range(arguments.repeats):
        for name, work in works.items():
            wall, processor = time.perf_counter(), time.process_time()
            work()
            finish(torch.device(arguments.device))
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            best[name] = (min(wall, best[name][0]), min(processor, best[name][1]))
    return best


def rates(workload: str, num_tokens: int, wall: float, processor: float | None) -> dict[str, float | None]:
    suffix = "" if workload == "mixed" else f".{workload}"
    return {
        f"tokens_per_second{suffix}": num_tokens / wall,
        f"cpu_tokens_per_second{suffix}": None if processor is None else num_tokens / processor,
    }


def largest_gap(student: Student, rollouts: Sequence[Rollout]) -> float:
    scored = rescore(student, rollouts)
    return max(
        float((torch.tensor(rollout.logprobs) - one.token_R.cpu()).abs().max())
        for rollout, one in zip(rollouts, scored, strict=True)
    )


def launch(checkpoint: Checkpoint, way: Way, dtype: str) -> Launch:
    return Launch(
        checkpoint,
        "generate",
        dtype=dtype,
        max_model_len=512,
        on_gpu=False,
        extra=flags_of(way),
        whose="student",
        max_restarts=0,
        variables=variables_of(way, None),
    )


def by_server(checkpoint: Checkpoint, student: Student, size: Size, repeats: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Service(launch(checkpoint, "file", student.settings.dtype), log=Path(folder) / "log") as service,
    ):
        service.wait()
        with Client([service.url], width=256, whose="student") as client:
            vocabulary = checkpoint.shape.vocabulary
            remote = RemoteSampler(client, cast(Encoder, Ids()), speaker="student", vocabulary=vocabulary)
            sampler = VllmSampler(
                student, remote, FileSync(client, student.merged_weights), tolerance=TOLERANCE[student.settings.dtype]
            )
            return by_vllm(sampler, size, repeats, in_process=False)


def by_engine(checkpoint: Checkpoint, student: Student, size: Size, repeats: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(launch(checkpoint, "memory", student.settings.dtype), log=Path(folder) / "log") as engine,
    ):
        speaker = EngineSampler(engine, cast(Encoder, Ids()), speaker="student", width=256)
        sampler = VllmSampler(
            student, speaker, MemorySync(engine, student.merged_weights), tolerance=TOLERANCE[student.settings.dtype]
        )
        return by_vllm(sampler, size, repeats, in_process=True)


def by_vllm(sampler: VllmSampler, size: Size, repeats: int, *, in_process: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    gap, syncs = 0.0, []
    for workload in ("mixed", "equal"):
        asked = requests(sampler.vllm.vocabulary, workload, size)
        walls, processors = [], []
        for number in range(repeats):
            sampler.student.num_changes += 1
            sampler.take_weights()
            facts = sampler.facts()
            syncs.append(facts["sampler.sync_seconds"])
            # Other prompts: vLLM keeps what it knows of those it has read.
            fresh = [replace(one, prompt_ids=(number, *one.prompt_ids[1:])) for one in asked]
            wall, processor = time.perf_counter(), time.process_time()
            rollouts = sampler.generate(fresh)
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
        gap = max(gap, facts["sampler.gap"], largest_gap(sampler.student, rollouts))
        num_tokens = sum(request.sampling.max_new_tokens for request in asked)
        found |= rates(workload, num_tokens, min(walls), min(processors) if in_process else None)
    return found | {"sync_seconds": min(syncs), "logprob_gap": gap}


@contextmanager
def checkpoint_of(name: str, dtype: torch.dtype, device: str) -> Iterator[Checkpoint]:
    if name == "embedded":
        yield open_checkpoint(resolve("nano", role="student"))
        return
    shape = SIZES[name]
    model = random_model(shape, seed=0, dtype=dtype, device=device, max_position_embeddings=4096)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # Nothing is text here, but vLLM's server wants a tokenizer.
        load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))).save_pretrained(folder)
        yield open_checkpoint(ModelSource(name, "directory", folder))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype, repeats = arguments.device, getattr(torch, arguments.dtype), arguments.repeats
    size = (SIZE if device == "cpu" else GPU_SIZE)[name]
    with checkpoint_of(name, dtype, device) as checkpoint:
        settings = StudentSettings(dtype=arguments.dtype, gradient_checkpointing=False, micro_batch_tokens=2048)
        student = Student(load_model(checkpoint, dtype, device), settings, stop_ids=[0])
        with_vllm = not arguments.no_vllm and device == "cpu" and importlib.util.find_spec("vllm") is not None
        return {
            "vllm": by_server(checkpoint, student, size, repeats) if with_vllm else None,
            "vllm_in_process": by_engine(checkpoint, student, size, repeats) if with_vllm else None,
            **in_process(student, size, arguments),
        }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", choices=list(SIZE), action="append", help="default: all of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM out although it is installed")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented document")
    arguments = parser.parse_args(words)
    if arguments.repeats < 1:
        parser.error(f"--repeats takes 1 or more, got {arguments.repeats}")
    torch.set_num_threads(arguments.threads)
    found = {name: measure(name, arguments) for name in arguments.student or list(SIZE)}
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
