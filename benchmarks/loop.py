"""A stage in the loop that ``distill run`` runs, with a crew that is put together by hand."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.config import GuardSettings, RunConfig
from distill.encode import Encoder
from distill.family import Shape, resolve
from distill.journal import Journal
from distill.prompt_config import EmbeddedPrompts
from distill.prompts import EmbeddedSource
from distill.sampler import StudentSampler
from pipelines.batches import Batches
from pipelines.crew import Crew, Stage
from pipelines.faculty import Faculty
from pipelines.guards import Guards
from pipelines.loop import run_stage
from pipelines.meter import Meter
from pipelines.phases import PHASES, Clock
from pipelines.tracker import UNTRACKED
from students.student import Student


@cache
def encoder() -> Encoder:
    return Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))


def only_judge(judge: object, shape: Shape) -> Faculty:
    """One teacher, of whom nothing is known but how it judges."""
    tutor = SimpleNamespace(
        name="teacher",
        shape=shape,
        role=lambda role: role,
        hired=SimpleNamespace(judge=judge),
        candidate=SimpleNamespace(domains=()),
    )
    return Faculty([cast(Any, tutor)])


def crew_of(teachers: Faculty, student: Student, sampler: StudentSampler, shape: Shape) -> Crew:
    """Who works on the embedded prompts; nobody asks for a store, or for the student as it began."""
    return Crew(
        encoder=encoder(),
        teachers=teachers,
        student=student,
        student_sampler=sampler,
        student_shape=shape,
        start_of=cast(Any, None),
        prompts=EmbeddedSource(EmbeddedPrompts(), seed=0),
        store=cast(Any, None),
        meter=Meter(),
        seed=0,
        run_id="",
    )


def metrics_of(stage: Stage, crew: Crew, batches: Batches, **options: Any) -> list[dict[str, Any]]:
    """What the loop records of the stage's steps."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), RunConfig())
        try:
            run_stage(
                stage,
                crew.student,
                crew,
                journal,
                **{
                    "first_step": 0,
                    "global_step": 0,
                    "checkpoint": lambda done, ended: None,
                    "checkpoint_every": 10**9,
                    "guards": Guards(GuardSettings(), stage=stage.name, checkpoints=Path(folder), history=[]),
                    "tracking": UNTRACKED,
                    "examine": lambda done: False,
                    "clock": Clock(dict.fromkeys(PHASES, 1)),
                    **options,
                },
                batches=batches,
            )
            return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        finally:
            journal.close()
