"""A run's teachers: the one for every prompt, and specialists for the prompts of their domains.

Each has its own model or servers, its own LM head, its own responses in the store and its own lines in the cost
account; there is one student. A response is judged by the teacher of its prompt's domain, whose head its states need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distill.checkpoint import Checkpoint, open_checkpoint
from distill.config import RunConfig
from distill.costs import CostRole, rollout_flops
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import Shape, resolve
from distill.model_config import TeacherSettings
from distill.spans import Span
from distill.types import Prompt, Rollout, Signal
from distill.vllm.arguments import changing
from pipelines.hiring import Hired, hired_teacher
from pipelines.meter import Meter
from teachers.reduced import Choose
from teachers.store import LOADED_AS, TeacherIdentity

TeacherPart = Literal["speaks", "judges"] | None
"""What a stage has the teacher do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A teacher that was found on disk and not yet hired. The one for every prompt has no domains."""

    settings: TeacherSettings
    checkpoint: Checkpoint
    domains: tuple[str, ...]

    @property
    def revision(self) -> str:
        """What its responses are stored under: a model that is rounded or quantised when it is loaded, or that servers
        compute in a way of their own, is another one."""
        settings, checkpoint = self.settings, self.checkpoint
        changes: list[str] = [] if settings.dtype == checkpoint.dtype else [settings.dtype]
        if settings.backend == "vllm":  # in this process nobody reads what servers are told
            changes += [] if settings.quantization is None else [settings.quantization]
            changes += changing(settings.server_args)
        return LOADED_AS.join([checkpoint.revision, *changes])

    def identity(self, encoder: Encoder) -> TeacherIdentity:
        """What decides its responses besides the request."""
        return TeacherIdentity(
            name=self.checkpoint.name,
            revision=self.revision,
            template_hash=encoder.template_hash,
            tokenizer_hash=encoder.vocabulary_hash,
        )

    @property
    def label(self) -> str:
        """What tells a specialist from the others in costs and folders."""
        return "+".join(self.domains)


@dataclass(frozen=True, slots=True)
class Tutor:
    """A hired teacher with what its responses are stored under."""

    candidate: Candidate
    hired: Hired
    identity: TeacherIdentity

    @property
    def name(self) -> str:
        return self.candidate.checkpoint.name

    @property
    def shape(self) -> Shape:
        return self.candidate.checkpoint.shape

    def role(self, role: CostRole) -> CostRole:
        """The line of the cost account for its work; a specialist has lines of its own."""
        label = self.candidate.label
        return f"{role}.{label}" if label else role


class Faculty:
    """All tutors of a run; ``default`` teaches the prompts of every domain without a specialist."""

    def __init__(self, tutors: Sequence[Tutor]) -> None:
        self.tutors = tuple(tutors)
        self.default = self.tutors[0]
        self._by_domain = {domain: tutor for tutor in tutors for domain in tutor.candidate.domains}
        self._by_name = {tutor.name: tutor for tutor in tutors}
        self.failure: Exception | None = None
        """What hearing of a response, or judging it, raised last. Whoever speaks meets it, and it is not his."""

    def of(self, prompt: Prompt) -> Tutor:
        """Who teaches this prompt."""
        return self.default if prompt.domain is None else self._by_domain.get(prompt.domain, self.default)

    def head_VD(self, teacher: str) -> Tensor:
        """The LM head that makes logits of the states of the teacher of this name."""
        head_VD = self._by_name[teacher].hired.judge.head_VD
        assert head_VD is not None, "only hidden states name their teacher"
        return head_VD

    @property
    def hears(self) -> bool:
        """Whether one teacher judges everything, and in the background what it hears of; see ``Teacher.hears``."""
        return len(self.tutors) == 1 and self.default.hired.judge.hears

    def hear(self, rollout: Rollout) -> None:
        """Have the response's teacher take note of it; see ``Teacher.hear``."""
        with self._failing():
            self.of(rollout.request.prompt).hired.judge.hear(rollout)

    def check(self) -> None:
        """Raise what went wrong with what any teacher heard; see ``Teacher.check``."""
        with self._failing():
            for tutor in self.tutors:
                tutor.hired.judge.check()

    def heard_all(self) -> None:
        """Tell every teacher that the batch has been spoken; see ``Teacher.heard_all``."""
        with self._failing():
            for tutor in self.tutors:
                tutor.hired.judge.heard_all()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def break_off(self) -> None:
        """Tell every teacher that the batch will not be spoken whole; see ``Teacher.break_off``."""
        for tutor in self.tutors:
            tutor.hired.judge.break_off()

    def forget(self) -> None:
        """Have every teacher drop all that it heard."""
        for tutor in self.tutors:
            tutor.hired.judge.forget()

    def worked(self) -> list[Span]:
        """When any teacher worked on what it judged since this was asked last; see ``Teacher.worked``."""
        return [span for tutor in self.tutors for span in tutor.hired.judge.worked()]

    def groups(self, prompts: Sequence[Prompt]) -> list[tuple[Tutor, list[int]]]:
        """Each tutor that has work with the places of its prompts."""
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(self.of(prompt).name, []).append(place)
        return [(self._by_name[name], found) for name, found in places.items()]

    def judge(self, rollouts: Sequence[Rollout], meter: Meter, stage: str) -> list[Signal]:
        """What each rollout's own teacher says of it, in the order of ``rollouts``, charged to ``stage``."""
        signals: dict[int, Signal] = {}
        for tutor, places in self.groups([rollout.request.prompt for rollout in rollouts]):
            own = [rollouts[place] for place in places]
            with meter.measure(tutor.role("teacher_score"), stage) as cost:
                signals |= zip(places, tutor.hired.judge.score(own), strict=True)
                cost.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in own)
                cost.flops = rollout_flops(tutor.shape, own)
        return [signals[place] for place in range(len(rollouts))]


def find_teachers(config: RunConfig, *, download: bool = True) -> list[Candidate]:
    """The teachers that ``config`` names, opened, the one for every prompt first; domains of equal settings share one.

    Without ``download`` they have to be on this machine.

    Raises UserError for two different teachers of the same name: a name tells whose states a response was judged by.
    """
    domains: dict[TeacherSettings, tuple[str, ...]] = {config.teacher: ()}
    for domain, settings in config.specialists.items():
        if settings != config.teacher:
            domains[settings] = (*domains.get(settings, ()), domain)
    found = []
    for settings, names in domains.items():
        source = resolve(settings.model, role="teacher", revision=settings.revision)
        found.append(Candidate(settings, open_checkpoint(source, download=download), names))
    names_seen: set[str] = set()
    for candidate in found:
        if candidate.checkpoint.name in names_seen:
            raise UserError(
                f"specialists.{candidate.domains[0]} and another teacher are both called {candidate.checkpoint.name} "
                f"and differ in their settings; give both the same settings, or name one by the folder of a copy"
            )
        names_seen.add(candidate.checkpoint.name)
    return found


def check_domains(candidates: Sequence[Candidate], domains: Mapping[str, int]) -> None:
    """Raises UserError for a specialist that no prompt asks for; ``domains`` counts the prompts of each domain."""
    for candidate in candidates:
        for domain in candidate.domains:
            if domain not in domains:
                known = ", ".join(domains) or "none"
                raise UserError(
                    f"specialists.{domain}: no prompt has the domain {domain!r}; the prompts' domains are {known}"
                )


@contextmanager
def hired_faculty(
    config: RunConfig,
    candidates: Sequence[Candidate],
    encoder: Encoder,
    *,
    device: torch.device,
    logs: Path,
    choose: Choose,
) -> Iterator[Faculty]:
    """All of the run's teachers; what has to be ended of them ends with the block.

    ``choose`` is what ``hired_teacher`` takes.
    """
    with ExitStack() as stack:
        tutors = []
        for candidate in candidates:
            own = config.model_copy(update={"teacher": candidate.settings})
            folder = logs / candidate.label.replace("/", "-") if candidate.label else logs
            hired = stack.enter_context(
                hired_teacher(own, candidate.checkpoint, encoder, device=device, logs=folder, choose=choose)
            )
            tutors.append(Tutor(candidate, hired, candidate.identity(encoder)))
        yield Faculty(tutors)
