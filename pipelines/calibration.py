"""Measuring this machine: products, memory, and a few real steps of the embedded pair.

What is found replaces the table's figures of this machine's device (``distill.hardware``) until it is measured again.
Each kind of work is done at two sizes; of the two times follow what a pass through a layer costs by itself and which
share of the measured FLOP/s the rest reaches, through the very formulas that a plan uses (``pipelines.pace``). On a GPU
the embedded models are too small to show a share; there the table's stays, and the latency is what is learnt.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
import yaml

from distill import interrupt
from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.config import RunConfig
from distill.device import finish
from distill.embedded.task import questions
from distill.encode import Encoder
from distill.family import EMBEDDED_STUDENTS, EMBEDDED_TEACHER, resolve
from distill.hardware import Device, Latency, Pool, Shares, Tera, calibration_file, load_devices, named_like
from distill.journal import write_atomically
from distill.progress import say
from distill.roofline import Times
from distill.sampler import TransformersSampler
from distill.stage_config import DivergenceSettings, OnPolicyStage
from distill.types import MODES, Example, HiddenStates, Prompt, Rollout
from pipelines.fitting import search
from pipelines.layouts import Devices, Layout, Pair
from pipelines.losses import LOSSES
from pipelines.pace import job_times
from pipelines.resolution import resolve_run
from pipelines.workload import Job, Sequences
from students.loss import Felt, Rows
from students.student import Student
from teachers.local import LocalTeacher

SMALL, LARGE = 2, 64
"""Responses of the two sizes."""

REPEATS = 3
"""Each time is the median of so many, after one that counts for nothing."""

MOST_SHARE = 4.0
"""Small products reach more than the large one that the peak is measured by; not more than this."""

SERVER_TIMES = 3
"""Of a sampler's time on a CPU, what a vLLM server takes for the same responses: 1.8 to 4, the more the fewer they are
and the less the cores are its own (docs/sampling.md, docs/plan.md)."""

MATRIX = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}


def calibrate() -> Device:
    """Measure, keep, say what was found; the device as plans take it from now on."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"measuring {where.type}: products, memory, steps of the embedded pair")
    known = load_devices()
    memory = _memory(where)
    name = "CPU" if where.type == "cpu" else named_like(torch.cuda.get_device_name(where), memory, known)
    base = known.get(name)
    bf16 = _flops(where, torch.bfloat16)
    peaks: dict[str, Any] = {
        "kind": "cpu" if where.type == "cpu" else "gpu",
        "memory": memory,
        "bandwidth": round(_bandwidth(where), 3),
        "tflops": {"fp32": _rounded(_flops(where, torch.float32)), "bf16": _rounded(bf16)},
        "measured": f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
    }
    if base is None:
        # A device that no table has: the wire is not measured.
        peaks |= {"link": 32.0, "network": 1.25, "source": "measured; its wires are an assumption"}
    elif base.tflops.fp8 is not None:
        peaks["tflops"]["fp8"] = _rounded(bf16 * base.tflops.fp8 / base.tflops.bf16)
    figures = peaks | _speeds(where, peaks)
    path = calibration_file()
    write_atomically(path, yaml.safe_dump({name: figures}, sort_keys=False))
    say(f"{name} as measured is in {path}; remove the file to go back to the table")
    return load_devices()[name]


def _speeds(where: torch.device, peaks: dict[str, Any]) -> dict[str, Any]:
    """Shares and latencies by kind of work, from the embedded pair."""
    unit = Device(
        kind=peaks["kind"],
        memory=peaks["memory"],
        bandwidth=peaks["bandwidth"],
        tflops=Tera(fp32=peaks["tflops"]["fp32"], bf16=peaks["tflops"]["bf16"]),
        link=1.0,
        network=1.0,
        source="a device that reaches its peaks, and whose passes cost a microsecond",
        shares=Shares(train=1.0, score=1.0, sample=1.0, serve=1.0),
        latency=Latency(train=1.0, score=1.0, sample=1.0, serve=1.0),
    )
    pair = _EmbeddedPair(where)
    layout = pair.layout(unit)
    shares, latencies = {}, {}
    for kind, measured in pair.measure().items():
        (small, small_seconds), (large, large_seconds) = (
            (job_times(job, pair.shapes, layout), seconds) for job, seconds in measured
        )
        share, latency = solve(small, small_seconds, large, large_seconds)
        shares[kind], latencies[kind] = _rounded(share), _rounded(latency)
    if where.type == "cpu":
        return with_server(shares, latencies)
    return {"latency": latencies}


def with_server(shares: dict[str, float], latencies: dict[str, float]) -> dict[str, dict[str, float]]:
    """What was measured on a CPU, and a vLLM server by it, which is not measured."""
    return {
        "shares": {**shares, "serve": _rounded(shares["sample"] / SERVER_TIMES)},
        "latency": {**latencies, "serve": _rounded(latencies["sample"] * SERVER_TIMES)},
    }


def solve(small: Times, small_seconds: float, large: Times, large_seconds: float) -> tuple[float, float]:
    """The share s and the latency l (microseconds) with which both ``compute / s + passes l`` are the seconds.

    ``small`` and ``large`` are the times of a device that reaches its peak and needs a microsecond a pass. Where noise
    makes a latency negative it is none, and the large one alone decides the share. A share that is negative, or beyond
    ``MOST_SHARE``, is that, and the latency what it leaves of the large one's seconds.
    """
    determinant = small.compute * large.latency - large.compute * small.latency
    inverse = (small_seconds * large.latency - large_seconds * small.latency) / determinant
    latency = (small.compute * large_seconds - large.compute * small_seconds) / determinant
    if latency < 0:
        inverse, latency = large_seconds / large.compute, 0.0
    if inverse < 1 / MOST_SHARE:
        inverse = 1 / MOST_SHARE
        latency = max(0.0, large_seconds - inverse * large.compute) / large.latency
    return 1 / inverse, latency


class _EmbeddedPair:
    """Both embedded models, at work."""

    def __init__(self, where: torch.device) -> None:
        teacher = open_checkpoint(resolve(EMBEDDED_TEACHER, role="teacher"))
        student = open_checkpoint(resolve(EMBEDDED_STUDENTS[0], role="student"))
        self.config: RunConfig = resolve_run()
        self.shapes = Pair(teacher.shape, student.shape)
        self.encoder = Encoder(load_tokenizer(teacher))
        self._where = where
        self._model = load_model(teacher, torch.float32, where)
        self._teacher = LocalTeacher(self._model, name=teacher.name, batch_tokens=self.config.teacher.batch_tokens)
        self._student = Student(
            load_model(student, torch.float32, where), self.config.student, stop_ids=self.encoder.stop_ids
        )

    def layout(self, device: Device) -> Layout:
        pool = Pool("here", device, 1, 1)
        return search(self.config, self.shapes, Devices(pool, pool, is_one=True)).layouts[0]

    def measure(self) -> dict[str, list[tuple[Job, float]]]:
        """By kind of work, the small and the large job with the seconds it took."""
        stage = self.config.stages["on_policy"]
        assert isinstance(stage, OnPolicyStage)
        self._student.begin(stage.optimiser)
        small, large = (self._measure(num, stage) for num in (SMALL, LARGE))
        return {kind: [small[kind], large[kind]] for kind in small}

    def _measure(self, num: int, stage: OnPolicyStage) -> dict[str, tuple[Job, float]]:
        """One on-policy step on ``num`` responses, part by part; the teacher speaks, who knows when to stop."""
        sampler = TransformersSampler(self._model, self.encoder, speaker="teacher")
        requests = [
            self.encoder.request(
                Prompt(({"role": "user", "content": question.text},)),
                mode=mode,
                sampling=stage.sampling.of(mode),
                seed=place,
            )
            for place, (question, mode) in enumerate(zip(questions(0, num), cycle(MODES), strict=False))
        ]
        said, sampling = _timed(partial(sampler.generate, requests), self._where)
        judged, scoring = _timed(partial(self._teacher.score, said), self._where)
        examples = [Example(rollout, signal) for rollout, signal in zip(said, judged, strict=True)]
        _, training = _timed(partial(self._learn, examples), self._where)
        return {
            "sample": (_job("decode", "teacher", said), sampling),
            "score": (_job("score", "teacher", said), scoring),
            "train": (_job("train", "student", said), training),
        }

    def _learn(self, examples: Sequence[Example]) -> None:
        def loss(rows: Rows) -> Felt:
            return LOSSES[HiddenStates](rows, DivergenceSettings(), self._teacher.head_VD, self.encoder.stop_ids)

        self._student.step(examples, loss, step=0, num_steps=1, where="the calibration")


def _job(kind: Literal["decode", "score", "train"], who: Literal["teacher", "student"], said: Sequence[Rollout]) -> Job:
    """What was worked on, as a plan sees it."""
    num, longest = len(said), max(len(rollout.response_ids) for rollout in said)
    mean = sum(len(rollout.response_ids) for rollout in said) / num
    prompt = sum(len(rollout.prompt_ids) for rollout in said) / num
    return Job("calibration", kind, kind, who, 1, (Sequences(num, prompt, mean, mean, longest, longest),), judged=True)


def _timed(work: Callable[[], Any], where: torch.device) -> tuple[Any, float]:
    """What ``work`` gives, and the median of its seconds."""
    seconds = []
    for _ in range(REPEATS + 1):
        interrupt.check()
        started = time.perf_counter()
        found = work()
        finish(where)
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds[1:])


def _flops(where: torch.device, dtype: torch.dtype) -> float:
    """10^12 FLOP/s of a product of two square matrices."""
    size = MATRIX[where.type]
    left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    _, seconds = _timed(lambda: left @ right, where)
    return 2 * size**3 / seconds / 1e12


def _bandwidth(where: torch.device) -> float:
    """10^9 bytes a second, read and written together, of a copy."""
    source = torch.ones(COPIED_BYTES[where.type] // 4, device=where)
    target = torch.empty_like(source)
    _, seconds = _timed(lambda: target.copy_(source), where)
    return 2 * COPIED_BYTES[where.type] / seconds / 1e9


def _memory(where: torch.device) -> float:
    """10^9 bytes."""
    if where.type == "cuda":
        return float(torch.cuda.get_device_properties(where).total_memory) / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
