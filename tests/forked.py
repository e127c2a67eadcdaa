"""Processes of a test's own, without the seconds in which each of them would import torch and transformers again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.multiprocessing import start_processes

# Each of its processes is a fork of a server that has imported these, and has done nothing else: it starts no thread.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.models.qwen3.modeling_qwen3", "pipelines.strong_to_weak"]
)


def _begin(number: int, work: Callable[..., None], environment: Mapping[str, str], arguments: tuple[Any, ...]) -> None:
    # The server was started with another test's environment.
    os.environ.clear()
    os.environ.update(environment)
    work(number, *arguments)


def run_processes(work: Callable[..., None], arguments: tuple[Any, ...], num: int) -> None:
    """``work(number, *arguments)`` in ``num`` new processes; raises what one of them raised."""
    start_processes(_begin, (work, dict(os.environ), arguments), nprocs=num, start_method="forkserver")
