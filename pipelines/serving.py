"""``distill teacher serve``: a teacher's server for others to use, until it is asked to stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from distill import interrupt
from distill.checkpoint import open_checkpoint
from distill.errors import StoppedError
from distill.family import resolve
from distill.progress import say
from pipelines.hiring import KEY_VARIABLE
from teachers.service import Launch, Role, Service

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
    python: str | None,
    log: Path,
    server_args: Sequence[str],
    on_ready: Callable[[str], None],
) -> None:
    """Serve until a signal; ``on_ready`` is called once with the URL.

    Raises UserError for a teacher that cannot be had, DistillError where its server ends by itself.
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
        host=host,
        port=port,
        api_key=os.environ.get(KEY_VARIABLE),
        python=python or sys.executable,
        extra=tuple(server_args),
    )
    try:
        with Service(launch, log=log) as service:
            service.wait()
            on_ready(service.url)
            while True:
                interrupt.check()
                service.check()
                time.sleep(_POLL_SECONDS)
    except StoppedError:
        # To be stopped is how a server ends.
        say(f"teacher {checkpoint.name}: the server has ended")
