"""Examining one checkpoint outside a run: ``distill eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.config import EvaluationSettings
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import EMBEDDED_NAMES, ModelSource, resolve
from distill.sampler import TransformersSampler
from distill.seeding import derive
from distill.types import Mode
from eval.runner import evaluate
from eval.tasks import load_task

EMBEDDED_LONGEST = 96
"""Longest response of the embedded family's task; the report's limit would only feed a loop."""


def examine(
    checkpoint: str,
    *,
    task: str,
    modes: Sequence[Mode],
    budget: int | None,
    samples: int,
    num_questions: int | None,
    max_new_tokens: int | None,
    seed: int,
    out: Path | None,
) -> dict[str, Any]:
    """Score ``checkpoint`` on ``task`` in each mode; ``{"checkpoint", "scores": [...], "evaluations": [...]}``.

    Raises UserError for a checkpoint or task that cannot be had, and for an ``out`` that cannot be written.
    """
    source = _resolve(checkpoint)
    if out is not None:
        _claim(out)
    opened = open_checkpoint(source)
    encoder = Encoder(load_tokenizer(opened))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sampler = TransformersSampler(load_model(opened, dtype, device), encoder, speaker=checkpoint)
    questions = load_task(task, num_questions=num_questions, seed=seed)
    settings = EvaluationSettings()
    limit = max_new_tokens or (EMBEDDED_LONGEST if task.startswith("embedded") else None)
    evaluations = []
    for mode in modes:
        sampling = settings.sampling.of(mode)
        sampling = replace(
            sampling,
            max_new_tokens=limit or sampling.max_new_tokens,
            thinking_budget=budget if mode == "think" else None,
        )
        evaluations.append(
            evaluate(
                questions,
                mode,
                sampler=sampler,
                encoder=encoder,
                sampling=sampling,
                samples=samples,
                seed=derive(seed, "evaluate", questions.name, mode),
                checkpoint=Path(checkpoint).name,
                out=out,
                weights=opened.revision,
                shape=opened.shape,
            )
        )
    return {
        "checkpoint": source.location,
        "scores": [entry for evaluation in evaluations for entry in evaluation.entries],
        "evaluations": [evaluation.to_json() for evaluation in evaluations],
    }


def _resolve(checkpoint: str) -> ModelSource:
    """A run means its student; a size name its post-trained model; the rest is what it says."""
    folder = Path(checkpoint)
    if checkpoint not in EMBEDDED_NAMES and (folder / "config.yaml").is_file():
        if not (folder / "student").is_dir():
            raise UserError(
                f"the run {folder} has no student yet; give the command of that run again to finish it, or name one of "
                f"its checkpoints ({folder}/checkpoints/step_N)"
            )
        folder = folder / "student"
        return ModelSource(checkpoint, "directory", str(folder.resolve()))
    return resolve(checkpoint, role="teacher", option="CHECKPOINT")


def _claim(out: Path) -> None:
    """Make the folder and see that it can be written, before an hour of responses is lost in front of it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; name another folder") from None
