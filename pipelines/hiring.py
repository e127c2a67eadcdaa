"""Hiring a run's teacher: a model in this process, or vLLM servers, our own or somebody else's.

Of the run's own servers one is up at a time: generating and scoring are two roles of the same weights, and the roles
take turns on the same devices. A role's server starts when its first work comes and stays until the other role's
comes, so a resumed run starts only what it still needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distill.checkpoint import Checkpoint, load_model
from distill.config import RunConfig
from distill.encode import Encoder
from distill.sampler import Sampler, TransformersSampler
from teachers.client import Client
from teachers.local import LocalTeacher
from teachers.remote import RemoteTeacher
from teachers.remote_sampler import RemoteSampler
from teachers.service import ROLES, Launch, Role, Service, free_port
from teachers.teacher import Teacher

KEY_VARIABLE = "DISTILL_TEACHER_API_KEY"
"""Holds the API key of the teacher's servers; a key is never part of a configuration."""


@dataclass(frozen=True, slots=True)
class Hired:
    """One teacher in its two capacities."""

    judge: Teacher
    speaker: Sampler


@contextmanager
def hired_teacher(
    config: RunConfig, checkpoint: Checkpoint, encoder: Encoder, *, device: torch.device, logs: Path
) -> Iterator[Hired]:
    """The run's teacher; within the block its servers start as they are needed, and all of them end with it."""
    settings, dtype = config.teacher, getattr(torch, config.teacher.dtype)
    if settings.backend == "local":
        model = load_model(checkpoint, dtype, device)
        yield Hired(
            LocalTeacher(model, name=checkpoint.name, batch_tokens=settings.batch_tokens),
            TransformersSampler(model, encoder, speaker="teacher", batch=config.sampler_batch),
        )
        return
    with ExitStack() as stack:
        shifts = Shifts({role: _launch(config, checkpoint, role, device) for role in ROLES}, logs)
        stack.callback(shifts.end)
        score = stack.enter_context(_client(shifts, "score", settings.urls.score, settings.batch_tokens))
        generate = stack.enter_context(_client(shifts, "generate", settings.urls.generate, config.sampler_batch))
        yield Hired(
            RemoteTeacher(score, checkpoint, wire=settings.wire, dtype=dtype, device=device),
            RemoteSampler(generate, encoder, speaker="teacher", vocabulary=checkpoint.shape.vocabulary),
        )


def _launch(config: RunConfig, checkpoint: Checkpoint, role: Role, device: torch.device) -> Launch:
    # One more than prompt and response: forced tokens at the very end are scored by asking for one after them.
    longest = config.max_prompt_tokens + config.longest_response + 1
    return Launch(
        checkpoint,
        role,
        dtype=config.teacher.dtype,
        max_model_len=min(longest, checkpoint.max_positions),
        on_gpu=device.type == "cuda",
        tensor_parallel=config.teacher.tensor_parallel,
        port=free_port("127.0.0.1"),
        api_key=os.environ.get(KEY_VARIABLE),
        extra=config.teacher.server_args,
    )


def _client(shifts: Shifts, role: Role, urls: Sequence[str], width: int) -> Client:
    """Asks the servers at ``urls``, or our own where there are none; ``width`` is for one server."""
    key = os.environ.get(KEY_VARIABLE)
    if urls:
        return Client(urls, width=width * len(urls), api_key=key)
    return Client([shifts.url(role)], width=width, api_key=key, before=partial(shifts.begin, role), check=shifts.check)


class Shifts:
    """The run's own servers, one at a time."""

    def __init__(self, launches: dict[Role, Launch], logs: Path) -> None:
        self._launches, self._logs = launches, logs
        self._on_duty: Service | None = None

    def url(self, role: Role) -> str:
        """Where the role's server is, or will be."""
        return f"http://127.0.0.1:{self._launches[role].port}"

    def begin(self, role: Role) -> None:
        """Have the role's server up, the other one's ended."""
        if self._on_duty is not None and self._on_duty.launch.role == role:
            return
        self.end()
        self._on_duty = Service(self._launches[role], log=self._logs / f"{role}.log")
        self._on_duty.start()
        self._on_duty.wait()

    def check(self) -> None:
        """Raise DistillError if the server on duty is gone for good."""
        if self._on_duty is not None:
            self._on_duty.check()

    def end(self) -> None:
        if self._on_duty is not None:
            self._on_duty.stop()
            self._on_duty = None
