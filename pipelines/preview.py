"""What a run's models will read and learn, before anything is spent: prompts, modes, token counts, the loss mask.

Prompts, modes and ids are made by the same functions as in the run. A teacher's response is shown where the store holds
it; what is not spoken yet is shown by its form. Left out on purpose: loading a model, and downloading one's weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.chat import EARLY_STOP, IM_END, THINK_CLOSE, THINK_OPEN
from distill.checkpoint import open_tokenizer
from distill.config import RunConfig
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.prompts import load_prompts
from distill.stage_config import OffPolicyStage, StageSettings
from distill.types import MODES, Prompt, Request, Rollout
from pipelines.crew import positions_of, student_requests, teacher_requests
from pipelines.faculty import Candidate, find_teachers
from pipelines.listing import output
from teachers.store import ResponseStore, response_key, root_of

SURVEYED = 256
"""Prompts of a stage that its modes and lengths are counted over."""

Document = dict[str, Any]


def preview(config: RunConfig, *, num: int = 2, stage: str | None = None) -> Document:
    """Each stage of ``config`` (or the one called ``stage``) with its first ``num`` prompts, as JSON can hold it.

    Raises UserError for a stage that is not there, a tokenizer or prompts that cannot be had.
    """
    if stage is not None and stage not in config.stages:
        raise UserError(f"--stage {stage!r} is none of the run's stages: {', '.join(config.stages)}")
    source = resolve(config.teacher.model, role="teacher", revision=config.teacher.revision)
    encoder = Encoder(open_tokenizer(source)[0])
    prompts = load_prompts(
        config.prompts,
        seed=config.seed,
        max_prompt_tokens=config.max_prompt_tokens,
        count_tokens=encoder.count_tokens,
    )
    stored = _Stored(config, encoder)
    found, first = [], config.first_prompt
    for name, settings in config.stages.items():
        num_prompts = positions_of(settings, prompts)
        if stage in (None, name):
            asked = prompts.batch(first, min(num_prompts, max(num, SURVEYED)))
            requests = _requests(asked, settings, encoder, seed=config.seed, stage=name, first=first)
            entry = _stage(name, settings, requests, first=first, shown=num, stored=stored)
            found.append({**entry, "num_prompts": num_prompts})
        first += num_prompts
    return {
        "teacher": source.location,
        "num_train": prompts.num_train,
        "num_held_out": len(prompts.held_out()),
        "stages": found,
        "no_responses": stored.reason,
    }


class _Stored:
    """The responses that the run's teachers have given already; none, and why, where their weights are not here."""

    def __init__(self, config: RunConfig, encoder: Encoder) -> None:
        self.encoder = encoder
        self.store = ResponseStore(root_of(config.store))
        self.candidates: list[Candidate] = []
        self.reason: str | None = None
        try:
            self.candidates = find_teachers(config, download=False)
        except UserError as error:
            self.reason = str(error)

    def get(self, request: Request) -> Rollout | None:
        if not self.candidates:
            return None
        domain = request.prompt.domain
        teacher = next((one for one in self.candidates if domain in one.domains), self.candidates[0])
        identity = teacher.identity(self.encoder)
        kept = self.store.get(identity, [request]).get(response_key(identity, request))
        return None if kept is None else kept.rollout


def _stage(
    name: str, settings: StageSettings, requests: Sequence[Request], *, first: int, shown: int, stored: _Stored
) -> Document:
    """The stage whose prompts begin at position ``first``; ``shown`` of its ``requests`` are shown, all are counted."""
    lengths = [len(request.prompt_ids) for request in requests]
    return {
        "stage": name,
        "kind": settings.kind,
        "speaker": "teacher" if isinstance(settings, OffPolicyStage) else "student",
        "num_surveyed": len(requests),
        "modes": {
            mode: dict(Counter(request.switch for request in requests if request.mode == mode)) for mode in MODES
        },
        "prompt_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "prompts": [
            {"position": first + place, **_shown(request, settings, stored)}
            for place, request in enumerate(requests[:shown])
        ],
    }


def _requests(
    prompts: Sequence[Prompt], settings: StageSettings, encoder: Encoder, *, seed: int, stage: str, first: int
) -> list[Request]:
    """One request a prompt: further samples ask the same."""
    requests = (
        teacher_requests(prompts, settings, encoder, seed=seed, stage=stage, first=first)
        if isinstance(settings, OffPolicyStage)
        else student_requests(prompts, settings, encoder, seed=seed, stage=stage, first=first)
    )
    return requests[:: settings.samples_per_prompt]


def _shown(request: Request, settings: StageSettings, stored: _Stored) -> Document:
    rollout = stored.get(request) if isinstance(settings, OffPolicyStage) else None
    text = stored.encoder.decode(request.prompt_ids)
    prompt = {"text": text, "tokens": len(request.prompt_ids), "trained": False}
    return {
        "id": request.prompt.id,
        "mode": request.mode,
        "switch": request.switch,
        "answer": request.prompt.answer,
        "prompt_tokens": len(request.prompt_ids),
        "max_new_tokens": request.sampling.max_new_tokens,
        "response": "form" if rollout is None else "stored",
        "pieces": [prompt, *(_form(request) if rollout is None else _said(rollout, stored.encoder))],
    }


def _said(rollout: Rollout, encoder: Encoder) -> list[Document]:
    """The response in pieces of tokens that carry loss and tokens that do not."""
    marked = zip(rollout.response_ids, rollout.loss_mask, strict=True)
    pieces = [(trained, [token for token, _ in group]) for trained, group in groupby(marked, key=lambda pair: pair[1])]
    return [{"text": encoder.decode(ids), "tokens": len(ids), "trained": trained} for trained, ids in pieces]


def _form(request: Request) -> list[Document]:
    """What a response to ``request`` looks like; its tokens are not counted."""
    if request.mode == "no_think":
        block = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n" if request.switch == "soft" else ""
        return [_part(f"{block}ANSWER{IM_END}", trained=True)]
    if request.sampling.thinking_budget is None:
        return [_part(f"{THINK_OPEN}\nTHINKING\n{THINK_CLOSE}\n\nANSWER{IM_END}", trained=True)]
    return [
        _part(f"{THINK_OPEN}\nTHINKING", trained=True),
        _part(EARLY_STOP, trained=False),
        _part(f"ANSWER{IM_END}", trained=True),
    ]


def _part(text: str, *, trained: bool) -> Document:
    return {"text": text, "tokens": None, "trained": trained}


def print_preview(document: Document) -> None:
    """The document for a reader: what carries no loss is dim on a terminal, and stands behind a bar everywhere."""
    console = output()
    train = document["num_train"]
    console.print(f"teacher {document['teacher']}")
    console.print(
        f"prompts to train on: {'never run out' if train is None else train}, held out: {document['num_held_out']}"
    )
    for found in document["stages"]:
        lengths = found["prompt_tokens"]
        console.print(
            f"\n{found['stage']} ({found['kind']}): {found['num_prompts']} prompts, the {found['speaker']} speaks"
        )
        console.print(
            f"  of the first {found['num_surveyed']}: {_modes(found['modes'])}; "
            f"prompts of {lengths['min']} to {lengths['max']} tokens, {lengths['mean']:.1f} on average"
        )
        for shown in found["prompts"]:
            _print_prompt(console, shown)
    if document["no_responses"] is not None:
        console.print(f"\nstored responses are not shown: {document['no_responses']}")


def _modes(modes: Document) -> str:
    return ", ".join(
        f"{count} {mode} ({switch} switch)" for mode, switches in modes.items() for switch, count in switches.items()
    )


def _print_prompt(console: Console, shown: Document) -> None:
    said = sum(piece["tokens"] or 0 for piece in shown["pieces"][1:])
    response = f"a stored response of {said}" if shown["response"] == "stored" else "the form of a response"
    console.print(
        f"\n  prompt {shown['position']}, {shown['mode']} by the {shown['switch']} switch: {shown['prompt_tokens']} "
        f"tokens, then {response}, at most {shown['max_new_tokens']}; answer: {shown['answer'] or 'none'}"
    )
    for piece in shown["pieces"]:
        label = "loss   " if piece["trained"] else "no loss"
        count = "" if piece["tokens"] is None else f"{piece['tokens']}"
        for number, line in enumerate(piece["text"].removesuffix("\n").split("\n")):
            margin = f"  {label} {count:>5} | " if number == 0 else f"{'':16} | "
            console.print(Text(margin) + Text(line, style="green" if piece["trained"] else "dim"))
