"""Who draws the student's responses in a run: its own model in this process, or a vLLM of the run's own.

vLLM is a server, or an engine in this process. It starts when the first responses are wanted, and ends with the run. A
server is never started again by itself: it would speak with the weights of its checkpoint. Several processes share one
server, which the main one starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from distill.checkpoint import Checkpoint
from distill.config import RunConfig
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import Shape
from distill.memory import student_memory
from distill.sampler import StudentSampler, TransformersSampler
from distill.vllm.client import Client
from distill.vllm.engine import Engine, check_installed
from distill.vllm.engine_sampler import EngineSampler
from distill.vllm.launch import Launch
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service
from pipelines.hiring import devices_here
from pipelines.layouts import room_beside
from pipelines.processes import choose_engine
from students.engine_sync import EngineSync
from students.ranks import Ranks
from students.sleep import Sleep, SleepingServer, check_sleep, level_for
from students.student import Student
from students.vllm_sampler import PROBE_TOKENS, TOLERANCE, VllmSampler
from students.weight_sync import (
    AdapterSync,
    FileSync,
    MemorySync,
    Way,
    WeightSync,
    check_handles,
    check_release,
    check_uncut,
    choose_way,
    flags_of,
    variables_of,
)

_SIZES = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
"""vLLM's flags that say how much it takes."""

_GONE_SECONDS = 20.0
"""How long a process that did not start the server waits for one that does not answer: it never comes back."""


@contextmanager
def student_sampler(
    config: RunConfig,
    checkpoint: Checkpoint,
    student: Student,
    encoder: Encoder,
    ranks: Ranks,
    *,
    teacher: Shape,
    logs: Path,
) -> Iterator[StudentSampler]:
    """The run's sampler of ``student``, which began as ``checkpoint`` and has ``teacher`` for its largest one; what it
    starts ends with the block."""
    settings = config.sampler
    if settings.backend == "transformers":
        yield TransformersSampler(
            student.model,
            encoder,
            speaker="student",
            batch=config.sampler_batch,
            cache_tokens=config.sampler_tokens,
        )
        return
    way = _way(config, checkpoint, ranks)
    launch, log = _launch(config, checkpoint, way, on_gpu=ranks.device.type == "cuda"), logs / "student.log"
    launch = replace(launch, extra=(*share_flags(config, checkpoint.shape, teacher, ranks), *launch.extra))
    tolerance = settings.tolerance or TOLERANCE[config.student.dtype]
    if settings.place == "in_process":
        with Engine(launch, log=log) as engine:
            speaker = EngineSampler(engine, encoder, speaker="student", width=config.sampler_batch)
            sleep = Sleep(engine, level_for(way)) if settings.sleep else None
            memory = MemorySync(engine, student.merged_weights)
            yield VllmSampler(student, speaker, memory, tolerance=tolerance, sleep=sleep)
        return
    _check_one_machine(ranks)
    service = Service(launch, log=log)
    client = Client(
        [ranks.from_main(service.url)],
        width=-(-config.sampler_batch // ranks.count),
        whose="student",
        patience=settings.patience_seconds if ranks.is_main else min(_GONE_SECONDS, settings.patience_seconds),
        before=service.ensure if ranks.is_main else _nothing,
        check=service.check if ranks.is_main else _nothing,
    )
    try:
        with client:
            remote = RemoteSampler(client, encoder, speaker="student", vocabulary=checkpoint.shape.vocabulary)
            sleep = Sleep(SleepingServer(client), level_for(way)) if settings.sleep else None
            sync = _sync(way, student, client, service)
            yield VllmSampler(student, remote, sync, tolerance=tolerance, sleep=sleep, ranks=ranks)
    finally:
        service.stop()


def share_flags(config: RunConfig, student: Shape, teacher: Shape, ranks: Ranks) -> tuple[str, ...]:
    """How much of the trainer's GPU vLLM takes, where nobody says it.

    Left to itself it wants ``USABLE`` of the GPU: it does not start where the trainer has more than the rest, and
    leaves no more to one that has less.
    """
    is_shared = ranks.device.type == "cuda" and not config.sampler.devices
    if not is_shared or any(_names(word, flag) for word in config.sampler.server_args for flag in _SIZES):
        return ()
    engine = choose_engine(config, student, ranks, teacher)
    memory = student_memory(config, student, teacher, processes=ranks.count, engine=engine)
    has = torch.cuda.get_device_properties(ranks.device).total_memory
    share = math.floor(100 * room_beside(config, memory, has) / has) / 100
    if share <= 0:
        raise UserError(
            f"sampler.backend=vllm on the trainer's GPU: of its {has / 1e9:.1f} GB the trainer needs "
            f"{memory.total / 1e9:.1f}, and nothing is left for vLLM; set sampler.sleep=true, name another GPU in "
            f"sampler.devices, or say in sampler.server_args how much it may take (--gpu-memory-utilization)"
        )
    return ("--gpu-memory-utilization", f"{share:.2f}")


def _names(word: str, flag: str) -> bool:
    """Whether vLLM's parser takes ``word`` for ``flag``: underscores are dashes to it, a flag's beginning the flag."""
    name = word.partition("=")[0].replace("_", "-")
    return len(name) > 2 and flag.startswith(name)


def _nothing() -> None:
    """The main process starts the server, and learns of its end."""


def _check_one_machine(ranks: Ranks) -> None:
    """Every process must call it."""
    machines = sorted(set(ranks.hosts()))
    if len(machines) > 1:
        raise UserError(
            f"sampler.backend=vllm starts a server that its own machine alone can reach, and the run's processes are "
            f"on {', '.join(machines)}; set sampler.backend to transformers"
        )


def check_sampler(config: RunConfig, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Raises UserError where the student cannot be sampled in the way that ``config`` wants, before anything starts."""
    if config.sampler.backend == "vllm":
        if config.sampler.place == "in_process":
            check_installed()
        on_gpu = ranks.device.type == "cuda"
        _launch(config, checkpoint, _way(config, checkpoint, ranks), on_gpu=on_gpu).check()
        _check_devices(config.sampler.devices, on_gpu=on_gpu)


def _check_devices(devices: Sequence[str], *, on_gpu: bool) -> None:
    """Raise UserError for devices that are not here: CUDA hides all behind one, vLLM on a CPU binds to nothing."""
    here = devices_here()
    kind, one = ("GPUs", "GPU") if on_gpu else ("CPU cores", "core")
    for device in devices:
        if device in here or (on_gpu and _may_be_gpu(device)):
            continue
        raise UserError(
            f"sampler.devices has {device!r}, and the {kind} that this run may use are {', '.join(here)}; give each "
            f"{one} of the server's own by its number{' or its UUID' if on_gpu else ''}, or leave it empty"
        )


def _may_be_gpu(device: str) -> bool:
    """Whether CUDA may know the device, though it is none of those that this process sees."""
    # The trainer's own GPUs may be all that it sees, with the server's beside them.
    return device.startswith(("GPU-", "MIG-")) or (device.isdecimal() and "CUDA_VISIBLE_DEVICES" in os.environ)


def _way(config: RunConfig, checkpoint: Checkpoint, ranks: Ranks) -> Way:
    check_uncut(config.sampler.server_args)
    on_gpu, own_devices = ranks.device.type == "cuda", bool(config.sampler.devices)
    if config.sampler.sleep:
        check_sleep(on_gpu=on_gpu, own_devices=own_devices)
    way = choose_way(
        config.sampler.sync,
        on_gpu=on_gpu,
        own_devices=own_devices,
        num_experts=checkpoint.shape.num_experts,
        dtype=config.student.dtype,
        lora=config.student.lora,
        in_process=config.sampler.place == "in_process",
    )
    if way in ("nccl", "ipc"):
        check_release(way)
    if way == "ipc":
        check_handles(os.environ)
    return way


def _sync(way: Way, student: Student, client: Client, service: Service) -> WeightSync:
    if way == "adapter":
        return AdapterSync(client, student.write_adapter)
    if way == "file":
        return FileSync(client, student.merged_weights)
    assert way != "memory", "a server shares no memory with this process"
    are_made = student.adapted is not None
    return EngineSync(way, client, student.merged_weights, are_made=are_made, receiving=service.receiving)


def _launch(config: RunConfig, checkpoint: Checkpoint, way: Way, *, on_gpu: bool) -> Launch:
    # One more than prompt and response: forced tokens at the very end are scored by asking for one after them. So are
    # the probes, however short the run's own sequences are.
    longest = max(config.max_prompt_tokens + config.longest_response, PROBE_TOKENS) + 1
    return Launch(
        checkpoint,
        "generate",
        dtype=config.student.dtype,
        max_model_len=min(longest, checkpoint.max_positions),
        on_gpu=on_gpu,
        devices=config.sampler.devices,
        extra=(*flags_of(way, config.student.lora), *config.sampler.server_args),
        whose="student",
        max_restarts=0,
        variables=variables_of(way, os.environ.get("PYTHONPATH")),
        sleeps=config.sampler.sleep,
    )
