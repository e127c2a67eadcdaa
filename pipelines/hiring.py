"""Hiring a run's teacher: a model in this process, or vLLM servers, our own or somebody else's.

Of the run's own servers those of one role are up at a time: generating and scoring are two roles of the same weights,
and the roles take turns on the same devices. A role's servers start when its first work comes and stay until the other
role's comes, so a resumed run starts only what it still needs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.checkpoint import Checkpoint, load_model
from distill.config import RunConfig
from distill.encode import Encoder
from distill.errors import UserError
from distill.interrupt import deferred_signals
from distill.model_config import TeacherSettings
from distill.sampler import Sampler, TransformersSampler
from distill.types import Request, Rollout, Signal
from distill.vllm.address import checked_url
from distill.vllm.client import Client
from distill.vllm.launch import ROLES, Launch, Role, replicas
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service, free_port
from pipelines.signals import SIGNALS, Wanted
from teachers.local import LocalTeacher
from teachers.reduced import Choose
from teachers.remote import REPLY_BYTES, state_bytes
from teachers.roles import find_role, glance
from teachers.teacher import Teacher

KEY_VARIABLE = "DISTILL_TEACHER_API_KEY"
"""Holds the API key of the teacher's servers; a key is never part of a configuration."""


def api_key() -> str | None:
    """The servers' key, None where there is none.

    Raises UserError, which does not show it, for one that no request can carry.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key and not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"{KEY_VARIABLE} holds a space, a line's end or a letter that is not ASCII, and a key has none of them; "
            f"set it to the key alone"
        )
    return key or None


@dataclass(frozen=True, slots=True)
class Hired:
    """One teacher in its two capacities.

    ``judged_at`` and ``spoken_at`` name every place where it works, with the client that asks there (None in this
    process); ``foreign`` are those of them that somebody else runs. ``takes_turns`` where asking in one capacity ends
    the servers of the other. ``is_exact`` where what comes back is float32 all the way.
    """

    judge: Teacher
    speaker: Sampler
    judged_at: Mapping[str, Client | None]
    spoken_at: Mapping[str, Client | None]
    foreign: Sequence[str]
    takes_turns: bool
    is_exact: bool

    def judge_at(self, where: str, rollouts: Sequence[Rollout]) -> Sequence[Signal]:
        """What the judge at one place says."""
        with _only(self.judged_at[where], where):
            return self.judge.score(rollouts)

    def speak_at(self, where: str, requests: Sequence[Request]) -> list[Rollout]:
        """Responses from one place."""
        with _only(self.spoken_at[where], where):
            return self.speaker.generate(requests)


def _only(client: Client | None, url: str) -> AbstractContextManager[None]:
    return nullcontext() if client is None else client.only(url)


@contextmanager
def hired_teacher(
    config: RunConfig, checkpoint: Checkpoint, encoder: Encoder, *, device: torch.device, logs: Path, choose: Choose
) -> Iterator[Hired]:
    """The run's teacher; within the block its servers start as they are needed, and all of them end with it.

    ``choose`` names the ids that the student asks about, where the signal is ``chosen``.
    """
    settings, dtype = config.teacher, getattr(torch, config.teacher.dtype)
    signal, wanted = SIGNALS[settings.signal], Wanted(checkpoint, settings, device, choose)
    if settings.backend == "local":
        model = load_model(checkpoint, dtype, device)
        here = f"the model {checkpoint.name} in this process"
        judge = LocalTeacher(model, name=checkpoint.name, batch_tokens=settings.batch_tokens)
        speaker = TransformersSampler(
            model, encoder, speaker="teacher", batch=config.sampler_batch, cache_tokens=config.sampler_tokens
        )
        yield Hired(
            signal.here(judge, wanted),
            speaker,
            judged_at={here: None},
            spoken_at={here: None},
            foreign=(),
            takes_turns=False,
            is_exact=settings.dtype == "float32",
        )
        return
    with ExitStack() as stack:
        own = [
            role for role, urls in (("score", settings.urls.score), ("generate", settings.urls.generate)) if not urls
        ]
        shifts = Shifts(
            {
                role: server_launches(config, checkpoint, role, on_gpu=device.type == "cuda", devices=devices_here())
                for role in ROLES
                if role in own
            },
            logs,
        )
        stack.callback(shifts.end)
        clients = _Clients(shifts, settings)
        most = REPLY_BYTES / state_bytes(checkpoint, settings.wire) if signal.role == "score" else math.inf
        judges = settings.urls.score or (settings.urls.generate if signal.role == "generate" else ())
        score = stack.enter_context(clients.of(signal.role, judges, width=settings.batch_tokens, most=most))
        generate = stack.enter_context(clients.of("generate", settings.urls.generate, width=config.sampler_batch))
        yield Hired(
            signal.there(score, wanted),
            RemoteSampler(generate, encoder, speaker="teacher", vocabulary=checkpoint.shape.vocabulary),
            judged_at={replica.url: score for replica in score.replicas},
            spoken_at={replica.url: generate for replica in generate.replicas},
            foreign=tuple(map(checked_url, (*settings.urls.score, *settings.urls.generate))),
            takes_turns=signal.role == "score" and not settings.urls.score and not settings.urls.generate,
            is_exact=settings.dtype == "float32" and (signal.role == "generate" or settings.wire == "fp32"),
        )


def found_servers(urls: Sequence[str]) -> list[str]:
    """The assignments (``a.b=c``) that make a run use servers which run already; what each one is for, it is asked."""
    with deferred_signals():
        return _used([(url, find_role(url, api_key=api_key())) for url in urls])


def seen_servers(urls: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The same of those that answer now, without waiting for any; and what is the matter with each of the others."""
    seen = [(url, *glance(url, api_key=api_key())) for url in urls]
    used = _used([(url, role) for url, role, _ in seen if role is not None])
    return used, {url: trouble for url, role, trouble in seen if role is None}


def _used(servers: Sequence[tuple[str, Role]]) -> list[str]:
    by_role: dict[Role, list[str]] = {}
    for url, role in servers:
        by_role.setdefault(role, []).append(url)
    return ["teacher.backend=vllm", *(f"teacher.urls.{role}={json.dumps(found)}" for role, found in by_role.items())]


def devices_here() -> list[str]:
    """The GPUs that this process may use, or its CPU cores where there is no GPU."""
    if not torch.cuda.is_available():
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return [str(core) for core in sorted(cores)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def server_launches(
    config: RunConfig, checkpoint: Checkpoint, role: Role, *, on_gpu: bool, devices: Sequence[str]
) -> list[Launch]:
    """What the run's own servers of a role are started with, on ``devices``."""
    settings = config.teacher
    # One more than prompt and response: forced tokens at the very end are scored by asking for one after them.
    longest = config.max_prompt_tokens + config.longest_response + 1
    signal = SIGNALS[settings.signal]
    launch = Launch(
        checkpoint,
        role,
        dtype=settings.dtype,
        max_model_len=min(longest, checkpoint.max_positions),
        on_gpu=on_gpu,
        tensor_parallel=settings.tensor_parallel,
        pipeline_parallel=settings.pipeline_parallel,
        quantization=settings.quantization,
        api_key=api_key(),
        extra=(*(signal.flags(settings) if role == signal.role else ()), *settings.server_args),
    )
    launch.check()
    return [replace(one, port=free_port(one.host)) for one in replicas(launch, settings.replicas, devices)]


@dataclass(frozen=True, slots=True)
class _Clients:
    """Who asks a role's servers: those at given URLs, or our own where there are none."""

    shifts: Shifts
    settings: TeacherSettings

    def of(self, role: Role, urls: Sequence[str], *, width: int, most: float = math.inf) -> Client:
        """``width`` is for one server, ``most`` for all of them."""
        shared: dict[str, Any] = {
            "api_key": api_key(),
            "patience": self.settings.patience_seconds,
        }
        if urls:
            return Client(urls, width=int(min(width * len(urls), most)), **shared)
        own = self.shifts.urls(role)
        shared |= {"before": partial(self.shifts.begin, role), "check": self.shifts.check}
        return Client(own, width=int(min(width * len(own), most)), **shared)


class Shifts:
    """The run's own servers, those of one role at a time."""

    def __init__(self, launches: dict[Role, list[Launch]], logs: Path) -> None:
        self._launches, self._logs = launches, logs
        self._role: Role | None = None
        self._on_duty: list[Service] = []

    def urls(self, role: Role) -> list[str]:
        """Where the role's servers are, or will be."""
        return [f"http://{launch.host}:{launch.port}" for launch in self._launches[role]]

    def begin(self, role: Role) -> None:
        """Have the role's servers up, the other ones ended."""
        if self._role == role:
            return
        self.end()
        logs = [
            self._logs / f"{role}{'' if number == 0 else f'-{number}'}.log"
            for number in range(len(self._launches[role]))
        ]
        self._on_duty = [Service(launch, log=log) for launch, log in zip(self._launches[role], logs, strict=True)]
        for service in self._on_duty:
            service.start()
        for service in self._on_duty:
            service.wait()
        self._role = role

    def check(self) -> None:
        """Raise DistillError if a server on duty is gone for good."""
        for service in self._on_duty:
            service.check()

    def end(self) -> None:
        self._role = None
        for service in self._on_duty:
            service.stop()
        self._on_duty = []
