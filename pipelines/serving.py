"""``distill teacher serve``: a teacher's servers for others to use, until they are asked to stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from distill import interrupt
from distill.checkpoint import open_checkpoint
from distill.errors import StoppedError
from distill.family import resolve
from distill.progress import say
from distill.vllm.launch import Launch, Nodes, Role, replicas
from distill.vllm.service import Service
from pipelines.hiring import api_key, devices_here

_POLL_SECONDS = 0.2


def serve(
    teacher: str,
    role: Role,
    *,
    port: int | None,
    host: str,
    dtype: Literal["bfloat16", "float32"] | None,
    max_model_len: int | None,
    tensor_parallel: int,
    pipeline_parallel: int,
    num_replicas: int,
    quantization: str | None,
    nodes: Nodes | None,
    python: str | None,
    log: Path,
    server_args: Sequence[str],
    on_ready: Callable[[list[str]], None],
) -> None:
    """Serve until a signal; ``on_ready`` is called once with the URL of every replica, or with none on a further node.

    Raises UserError for a teacher that cannot be had or cut like that, DistillError where a server ends by itself.
    """
    on_gpu = torch.cuda.is_available()
    checkpoint = open_checkpoint(resolve(teacher, role="teacher"))
    launch = Launch(
        checkpoint,
        role,
        dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        max_model_len=max_model_len or checkpoint.max_positions,
        on_gpu=on_gpu,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        quantization=quantization,
        nodes=nodes,
        host=host,
        port=port,
        api_key=api_key(),
        python=python or sys.executable,
        extra=tuple(server_args),
    )
    launch.check()
    launches = replicas(launch, num_replicas, devices_here())
    try:
        with ExitStack() as stack:
            services = [Service(one, log=numbered(log, place, len(launches))) for place, one in enumerate(launches)]
            for service in services:
                stack.enter_context(service)
            for service in services:
                service.wait()
            on_ready([service.url for service in services if service.launch.answers])
            while True:
                interrupt.check()
                for service in services:
                    service.check()
                time.sleep(_POLL_SECONDS)
    except StoppedError:
        # To be stopped is how a server ends.
        say(f"teacher {checkpoint.name}: the server has ended")


def numbered(log: Path, place: int, num: int) -> Path:
    """A log for each of ``num`` replicas: teacher.log, or teacher-0.log and so on."""
    return log if num == 1 else log.with_name(f"{log.stem}-{place}{log.suffix}")
