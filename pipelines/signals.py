"""The catalogue of signals: what a teacher may say of a response, and who says it, here or behind a server.

signal    holds, for each response token                         had from a server that was started to
hidden    the whole distribution, as a hidden state              score
topk      the k most probable tokens, and the mass of the rest   generate
sampled   the log-probability of the sampled token               generate
chosen    k tokens that the student chose, and the rest          generate, on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distill.checkpoint import Checkpoint
from distill.errors import UserError
from distill.model_config import TeacherSettings
from distill.vllm.client import Client
from distill.vllm.launch import Role
from teachers.chosen import ChosenTeacher
from teachers.logprobs import LogprobTeacher
from teachers.reduced import Choose, ReducedTeacher, to_chosen, to_sampled, to_topk
from teachers.remote import RemoteTeacher
from teachers.teacher import ExactTeacher, Teacher


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose judgement is wanted, and what it needs. ``choose`` names the ids that the student asks about."""

    checkpoint: Checkpoint
    settings: TeacherSettings
    device: torch.device
    choose: Choose


@dataclass(frozen=True, slots=True)
class Route:
    """How a signal is had from a model in this process, and from a server of which role, with which further flags."""

    here: Callable[[ExactTeacher, Wanted], Teacher]
    there: Callable[[Client, Wanted], Teacher]
    role: Role
    flags: Callable[[TeacherSettings], Sequence[str]] = lambda settings: ()


def _as_it_is(teacher: ExactTeacher, wanted: Wanted) -> Teacher:
    return teacher


def _hidden(client: Client, wanted: Wanted) -> Teacher:
    dtype = getattr(torch, wanted.settings.dtype)
    return RemoteTeacher(client, wanted.checkpoint, wire=wanted.settings.wire, dtype=dtype, device=wanted.device)


def _logprobs(client: Client, wanted: Wanted, k: int) -> Teacher:
    checkpoint = wanted.checkpoint
    return LogprobTeacher(
        client, name=checkpoint.name, vocabulary=checkpoint.shape.vocabulary, k=k, device=wanted.device
    )


def _chosen(client: Client, wanted: Wanted) -> Teacher:
    urls = wanted.settings.urls
    if wanted.device.type == "cpu" and not (urls.score or urls.generate):
        raise UserError(
            "teacher.signal=chosen needs a vLLM server on a GPU, and this machine has none; set it to hidden, which is "
            "exact, or teacher.backend to local, or name a server in teacher.urls.score"
        )
    return ChosenTeacher(client, name=wanted.checkpoint.name, choose=wanted.choose, device=wanted.device)


def _room_for_k(settings: TeacherSettings) -> Sequence[str]:
    # vLLM gives 20 at most unless it is told otherwise.
    return ("--max-logprobs", str(settings.top_k))


SIGNALS: dict[str, Route] = {
    "hidden": Route(_as_it_is, _hidden, "score"),
    "topk": Route(
        lambda teacher, wanted: ReducedTeacher(teacher, to_topk(wanted.settings.top_k)),
        lambda client, wanted: _logprobs(client, wanted, wanted.settings.top_k),
        "generate",
        _room_for_k,
    ),
    "sampled": Route(
        lambda teacher, wanted: ReducedTeacher(teacher, to_sampled),
        lambda client, wanted: _logprobs(client, wanted, 0),
        "generate",
    ),
    "chosen": Route(
        lambda teacher, wanted: ReducedTeacher(teacher, to_chosen(wanted.choose)),
        _chosen,
        "generate",
        lambda settings: (*_room_for_k(settings), "--enable-scale-out"),
    ),
}
"""``teacher.signal`` to how it is had."""
