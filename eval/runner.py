"""Examining one checkpoint on one task in one mode: asking, keeping what was said, going on after an interruption.

Every sample has its own seed, a function of (seed, question, sample number) alone, so a score does not depend on the
batch or on which questions were asked beside it. What is written can be interrupted anywhere and goes on from the last
finished chunk. A sample that cannot be had, decoded or graded counts as wrong and is counted; it ends nothing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill import interrupt
from distill.errors import DistillError, GoneError, StoppedError, UserError
from distill.family import Shape
from distill.journal import read_json, write_json
from distill.progress import say, track
from distill.seeding import derive
from distill.types import Mode, Request, Rollout, Sampling, Switch, content_hash
from eval.evaluation import Evaluation, summarise
from eval.samples import Asked, Row, fitted, graded, read_rows, schema, write_rows
from eval.tasks import Task

if TYPE_CHECKING:
    from distill.encode import Encoder
    from distill.sampler import OnFinished, Sampler

HOPELESS = 3
"""Requests of a chunk that fail one by one, with none that succeeds, before the fault is taken to be the speaker's."""


def evaluate(
    task: Task,
    mode: Mode,
    *,
    sampler: Sampler,
    encoder: Encoder,
    sampling: Sampling,
    samples: int,
    seed: int,
    checkpoint: str,
    out: Path | None = None,
    weights: str = "",
    switch: Switch = "hard",
    shape: Shape | None = None,
    chunk: int = 256,
    pass_at: Sequence[int] = (),
    context: int | None = None,
) -> Evaluation:
    """Examine whoever ``sampler`` speaks for on ``task`` in ``mode``, ``samples`` responses to each question.

    With ``out``, writes ``<out>/<checkpoint>-<task>-<mode>.json`` and the same name ``.parquet`` with every sample;
    an evaluation that is there with the same settings is read back instead. ``weights`` identifies the checkpoint's
    weights where its name does not. A thinking budget or a soft switch becomes part of the file's name. Requests are
    sampled and saved ``chunk`` at a time. ``shape`` is the model's, for the FLOPs; ``context`` the most tokens that it
    takes, prompt and response together: a response is cut there, and a question that leaves no room for one is a
    broken sample. ``pass_at`` are the k for which pass@k is estimated; empty means k = ``samples``.

    Raises UserError for a k above ``samples``, and what the sampler raises where it is not a single request's fault.
    """
    if pass_at and max(pass_at) > samples:
        raise UserError(f"pass@{max(pass_at)} needs at least {max(pass_at)} samples a question; {samples} are drawn")
    settings = _settings_hash(
        task,
        checkpoint=checkpoint,
        weights=weights,
        mode=mode,
        switch=switch,
        sampling=sampling,
        samples=samples,
        seed=seed,
        context=context,
    )
    name = _file_name(checkpoint, task.name, mode, sampling, switch)
    if out is not None and (done := _read_back(out / f"{name}.json", settings)) is not None:
        found = done.with_pass_at(pass_at)
        if found != done:
            write_json(out / f"{name}.json", found.to_json())
        return found
    asked = _asked(
        task, mode, encoder=encoder, sampling=sampling, samples=samples, seed=seed, switch=switch, context=context
    )
    parts = None if out is None else out / f".{name}-{settings[:12]}-{chunk}"
    said = f"{checkpoint}, {task.name}, {mode}"
    rows = _sampled(
        asked, grader=task.grader, sampler=sampler, encoder=encoder, parts=parts, chunk=chunk, description=said
    )
    evaluation = summarise(
        rows,
        checkpoint=checkpoint,
        task=task.name,
        mode=mode,
        switch=switch,
        settings_hash=settings,
        sampling=sampling,
        seed=seed,
        samples=samples,
        pass_at=pass_at,
        shape=shape,
    )
    if evaluation.num_broken:
        say(f"{said}: {evaluation.num_broken} samples could not be had or graded and count as wrong")
    if out is not None and parts is not None:
        write_rows(out / f"{name}.parquet", rows, schema())
        write_json(out / f"{name}.json", evaluation.to_json())
        shutil.rmtree(parts, ignore_errors=True)
    return evaluation


def _settings_hash(
    task: Task,
    *,
    checkpoint: str,
    weights: str,
    mode: Mode,
    switch: Switch,
    sampling: Sampling,
    samples: int,
    seed: int,
    context: int | None,
) -> str:
    """Hash of everything that decides the responses and their grades."""
    return content_hash(
        {
            "checkpoint": checkpoint,
            "weights": weights,
            "task": task.name,
            "grader": task.grader,
            "questions": [[prompt.id, prompt.answer] for prompt in task.prompts],
            "instruction": task.instructions.get(mode, ""),
            "mode": mode,
            "switch": switch,
            "sampling": asdict(sampling),
            "samples": samples,
            "seed": seed,
            "context": context,
        }
    )


def _asked(
    task: Task,
    mode: Mode,
    *,
    encoder: Encoder,
    sampling: Sampling,
    samples: int,
    seed: int,
    switch: Switch,
    context: int | None,
) -> list[Asked]:
    """Every sample with its request; prompts are encoded once for all their samples."""
    asked = []
    for question in task.prompts:
        interrupt.check()
        first = encoder.request(task.asked(question, mode), mode=mode, switch=switch, sampling=sampling, seed=0)
        for number in range(samples):
            request = replace(first, seed=derive(seed, question.id, number))
            asked.append(Asked(question, number, fitted(request, context)))
    return asked


def _sampled(
    asked: Sequence[Asked],
    *,
    grader: str,
    sampler: Sampler,
    encoder: Encoder,
    parts: Path | None,
    chunk: int,
    description: str,
) -> list[Row]:
    """The graded samples; a chunk whose file is among ``parts`` is read instead."""
    rows: list[Row] = []
    with track(description, len(asked), "responses") as bar:
        for start in range(0, len(asked), chunk):
            these = asked[start : start + chunk]
            part = None if parts is None else parts / f"{start:08}.parquet"
            if part is not None and part.exists():
                rows += read_rows(part)
                bar.advance(len(these))
                continue
            begun, before = time.perf_counter(), bar.done
            said = speak(sampler, [one.request for one in these], lambda rollout: bar.advance())
            if all(row["broken"] for row in rows) and not any(isinstance(one, Rollout) for one in said):
                raise DistillError(f"{description}: no response can be had: {said[0]}")
            # Responses that broke off with their chunk and were asked for again were not seen to finish.
            bar.advance(before + len(these) - bar.done)
            fresh = graded(these, said, grader=grader, encoder=encoder, seconds=time.perf_counter() - begun)
            if part is not None:
                write_rows(part, fresh, schema())
            rows += fresh
    return rows


def speak(
    sampler: Sampler, wanted: Sequence[Request | str], on_finished: OnFinished | None = None
) -> list[Rollout | str]:
    """A rollout for each request, or the sentence that says why this one has none; sentences stay as they are.

    Where a batch fails it is asked for again in halves, so that what one request does to the sampler costs the others
    nothing but time. Raises what the sampler raises for a stop, for wrong usage, where nobody will answer any more, and
    where the first ``HOPELESS`` requests fail one by one.
    """
    said: list[Rollout | str] = [one if isinstance(one, str) else "" for one in wanted]
    num_had = num_failed = 0

    def ask(requests: Sequence[tuple[int, Request]], on_finished: OnFinished | None) -> None:
        nonlocal num_had, num_failed
        try:
            rollouts = sampler.generate([request for _, request in requests], on_finished)
        except (StoppedError, UserError, GoneError):
            raise
        except DistillError as error:
            if len(requests) > 1:
                middle = len(requests) // 2
                ask(requests[:middle], None)
                ask(requests[middle:], None)
                return
            num_failed += 1
            if num_failed >= HOPELESS and num_had == 0:
                raise
            said[requests[0][0]] = str(error)
        else:
            num_had += len(rollouts)
            for (place, _), rollout in zip(requests, rollouts, strict=True):
                said[place] = rollout

    requests = [(place, one) for place, one in enumerate(wanted) if not isinstance(one, str)]
    if requests:
        ask(requests, on_finished)
    return said


def _file_name(checkpoint: str, task: str, mode: Mode, sampling: Sampling, switch: Switch) -> str:
    budget = "" if sampling.thinking_budget is None else f"-budget{sampling.thinking_budget}"
    soft = "-soft" if switch == "soft" else ""
    return file_name(f"{checkpoint}-{task}-{mode}{soft}{budget}")


def file_name(text: str) -> str:
    """``text`` as a file's name, without what a file system or a shell takes amiss."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")


def _read_back(path: Path, settings: str) -> Evaluation | None:
    if not path.exists():
        return None
    # A file of another version or by another hand is no evaluation with these settings either.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = read_json(path)
        if document["settings_hash"] == settings:
            return Evaluation.from_json(document)
    say(f"{path.name} is there with other settings: it is made anew")
    return None
