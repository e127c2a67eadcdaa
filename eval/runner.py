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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")

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
    wanted = _Examination(task, mode, switch, sampling, samples, seed, checkpoint, weights, context)
    name, settings = wanted.name, wanted.settings_hash
    if out is not None and (done := read_back(out / f"{name}.json", settings, Evaluation.from_json)) is not None:
        found = done.with_pass_at(pass_at)
        if found != done:
            write_json(out / f"{name}.json", found.to_json())
        return found
    parts = None if out is None else out / f".{name}-{settings[:12]}-{chunk}"
    said = f"{checkpoint}, {task.name}, {mode}"
    rows = _sampled(
        wanted.asked(encoder),
        grader=task.grader,
        sampler=sampler,
        encoder=encoder,
        parts=parts,
        chunk=chunk,
        description=said,
    )
    evaluation = wanted.summary(rows, pass_at=pass_at, shape=shape)
    if evaluation.num_broken:
        say(f"{said}: {evaluation.num_broken} samples could not be had or graded and count as wrong")
    if out is not None and parts is not None:
        write_rows(out / f"{name}.parquet", rows, schema())
        write_json(out / f"{name}.json", evaluation.to_json())
        shutil.rmtree(parts, ignore_errors=True)
    return evaluation


@dataclass(frozen=True, slots=True)
class _Examination:
    """Everything that decides the responses and their grades."""

    task: Task
    mode: Mode
    switch: Switch
    sampling: Sampling
    samples: int
    seed: int
    checkpoint: str
    weights: str
    context: int | None

    @property
    def settings_hash(self) -> str:
        return content_hash(
            {
                "checkpoint": self.checkpoint,
                "weights": self.weights,
                "task": self.task.name,
                "grader": self.task.grader,
                "questions": [[prompt.id, prompt.answer] for prompt in self.task.prompts],
                "instruction": self.task.instructions.get(self.mode, ""),
                "mode": self.mode,
                "switch": self.switch,
                "sampling": asdict(self.sampling),
                "samples": self.samples,
                "seed": self.seed,
                "context": self.context,
            }
        )

    @property
    def name(self) -> str:
        """That of its files, without their endings."""
        budget = "" if self.sampling.thinking_budget is None else f"-budget{self.sampling.thinking_budget}"
        soft = "-soft" if self.switch == "soft" else ""
        return file_name(f"{self.checkpoint}-{self.task.name}-{self.mode}{soft}{budget}")

    def asked(self, encoder: Encoder) -> list[Asked]:
        """Every sample with its request; prompts are encoded once for all their samples."""
        asked = []
        for question in self.task.prompts:
            interrupt.check()
            prompt = self.task.asked(question, self.mode)
            first = encoder.request(prompt, mode=self.mode, switch=self.switch, sampling=self.sampling, seed=0)
            for number in range(self.samples):
                request = replace(first, seed=derive(self.seed, question.id, number))
                asked.append(Asked(question, number, fitted(request, self.context)))
        return asked

    def summary(self, rows: Sequence[Row], *, pass_at: Sequence[int], shape: Shape | None) -> Evaluation:
        return summarise(
            rows,
            checkpoint=self.checkpoint,
            task=self.task.name,
            mode=self.mode,
            switch=self.switch,
            settings_hash=self.settings_hash,
            sampling=self.sampling,
            seed=self.seed,
            samples=self.samples,
            pass_at=pass_at,
            shape=shape,
        )


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


def file_name(text: str) -> str:
    """``text`` as a file's name, without what a file system or a shell takes amiss."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")


def refuse_namesakes(names: Iterable[str]) -> None:
    """Raises UserError where two of the tasks that are called so would be examined into the same files."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.get(file_name(name))
        if other is not None:
            raise UserError(
                f"the tasks {other} and {name} have one name in the results, and each would replace the other's; give "
                "one of them a label in the recipe, or rename its file"
            )
        seen[file_name(name)] = name


def read_back(path: Path, settings: str, parse: Callable[[Any], T]) -> T | None:
    """What an earlier examination with these settings left at ``path``, if it did."""
    if not path.exists():
        return None
    # A file of another version or by another hand has not these settings either.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = read_json(path)
        if document["settings_hash"] == settings:
            return parse(document)
    say(f"{path.name} is there with other settings: it is made anew")
    return None
