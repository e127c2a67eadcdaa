"""Examining one checkpoint on one task in one mode: responses, grades, and what they come to.

Every sample has its own seed, a function of (seed, question, sample number) alone, so a score does not depend on the
batch or on which questions were asked beside it. What is written can be interrupted anywhere and goes on from the last
finished chunk. A sample that cannot be decoded or graded counts as wrong and is counted; it ends nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.chat import split_thinking
from distill.costs import sequence_flops
from distill.errors import DistillError
from distill.family import Shape
from distill.journal import read_json, write_json, writing
from distill.progress import say, track
from distill.seeding import derive
from distill.types import Mode, Prompt, Request, Rollout, Sampling, Switch, content_hash
from eval.equality import WORKERS
from eval.graders import grade
from eval.statistics import Estimate, estimate, pass_at_k_estimate
from eval.tasks import Task

if TYPE_CHECKING:
    import pyarrow

    from distill.encode import Encoder
    from distill.sampler import Sampler

Row = dict[str, Any]
"""One sample, as it stands in the per-sample parquet (``_schema``)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an examination found. Shares and lengths are over samples; lengths and counts are in response tokens.

    ``closure``: no thinking block is left open at the response's end. ``truncation``: the token limit was reached.
    ``nonempty_thinking``: something is thought (in non-thinking mode: leakage). ``num_broken`` samples could not be
    decoded or graded and count as wrong. ``flops`` are those of one forward pass over prompts and responses, None
    where the model's shape was not given. ``metrics`` holds ``avg@K`` and, for K > 1 samples a question, ``pass@K``
    or the k that was asked for.
    """

    checkpoint: str
    task: str
    mode: Mode
    settings_hash: str
    sampling: Sampling
    seed: int
    samples_per_question: int
    scores: Mapping[str, tuple[float, ...]]
    metrics: Mapping[str, Estimate]
    closure: float
    truncation: float
    nonempty_thinking: float
    mean_length: float
    mean_thinking_length: float
    num_broken: int
    num_tokens: int
    num_prompt_tokens: int
    flops: float | None
    seconds: float

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One object a metric, as in the ``scores`` of ``summary.json``; ``num_samples`` counts all responses."""
        return [
            {
                "checkpoint": self.checkpoint,
                "task": self.task,
                "mode": self.mode,
                "metric": metric,
                "mean": result.mean,
                "ci95": list(result.ci95),
                "num_questions": result.num_questions,
                "num_samples": result.num_samples,
            }
            for metric, result in self.metrics.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; ``from_json`` gives an equal evaluation back."""
        document = asdict(self)
        document["scores"] = {key: list(row) for key, row in self.scores.items()}
        document["metrics"] = [
            {**entry, "standard_error": result.standard_error}
            for entry, result in zip(self.entries, self.metrics.values(), strict=True)
        ]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        metrics = {
            entry["metric"]: Estimate(
                entry["mean"],
                (entry["ci95"][0], entry["ci95"][1]),
                entry["num_questions"],
                entry["num_samples"],
                entry["standard_error"],
            )
            for entry in document["metrics"]
        }
        scores = {key: tuple(row) for key, row in document["scores"].items()}
        return cls(**{**document, "scores": scores, "metrics": metrics, "sampling": Sampling(**document["sampling"])})


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
    pass_k: int | None = None,
) -> Evaluation:
    """Examine whoever ``sampler`` speaks for on ``task`` in ``mode``, ``samples`` responses to each question.

    With ``out``, writes ``<out>/<checkpoint>-<task>-<mode>.json`` and the same name ``.parquet`` with every sample;
    an evaluation that is there with the same settings is read back instead. ``weights`` identifies the checkpoint's
    weights where its name does not. A thinking budget becomes part of the file's name. Requests are sampled and
    saved ``chunk`` at a time. ``pass_k`` is the k of pass@k where it is not ``samples``. ``shape`` is the model's, for
    the FLOPs.
    """
    settings = _settings_hash(
        task,
        checkpoint=checkpoint,
        weights=weights,
        mode=mode,
        switch=switch,
        sampling=sampling,
        samples=samples,
        pass_k=pass_k or samples,
        seed=seed,
    )
    name = _file_name(checkpoint, task.name, mode, sampling)
    if out is not None and (done := _read_back(out / f"{name}.json", settings)) is not None:
        return done
    requests = [
        encoder.request(prompt, mode=mode, switch=switch, sampling=sampling, seed=derive(seed, prompt.id, number))
        for prompt in task.prompts
        for number in range(samples)
    ]
    parts = None if out is None else out / f".{name}-{settings[:12]}-{chunk}"
    rows = _sampled(
        requests,
        task=task,
        sampler=sampler,
        encoder=encoder,
        samples=samples,
        parts=parts,
        chunk=chunk,
        description=f"{checkpoint}, {task.name}, {mode}",
    )
    evaluation = _summarise(
        rows,
        checkpoint=checkpoint,
        task=task.name,
        mode=mode,
        settings_hash=settings,
        sampling=sampling,
        seed=seed,
        samples=samples,
        pass_k=pass_k or samples,
        shape=shape,
    )
    if evaluation.num_broken:
        say(
            f"{checkpoint}, {task.name}, {mode}: {evaluation.num_broken} samples could not be graded and count as wrong"
        )
    if out is not None and parts is not None:
        _write_rows(out / f"{name}.parquet", rows)
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
    pass_k: int,
    seed: int,
) -> str:
    """Hash of everything that decides the responses and their grades."""
    return content_hash(
        {
            "checkpoint": checkpoint,
            "weights": weights,
            "task": task.name,
            "grader": task.grader,
            "questions": [[prompt.id, prompt.answer] for prompt in task.prompts],
            "mode": mode,
            "switch": switch,
            "sampling": asdict(sampling),
            "samples": samples,
            "pass_k": pass_k,
            "seed": seed,
        }
    )


def _sampled(
    requests: Sequence[Request],
    *,
    task: Task,
    sampler: Sampler,
    encoder: Encoder,
    samples: int,
    parts: Path | None,
    chunk: int,
    description: str,
) -> list[Row]:
    """The graded samples of all ``requests``; a chunk whose file is among ``parts`` is read instead."""
    rows: list[Row] = []
    with track(description, len(requests), "responses") as bar:
        for start in range(0, len(requests), chunk):
            part = None if parts is None else parts / f"{start:08}.parquet"
            if part is not None and part.exists():
                rows += _read_rows(part)
                bar.advance(min(chunk, len(requests) - start))
                continue
            begun = time.perf_counter()
            rollouts = sampler.generate(requests[start : start + chunk], lambda rollout: bar.advance())
            seconds = time.perf_counter() - begun
            fresh = _rows(rollouts, task=task, encoder=encoder, first=start, samples=samples, seconds=seconds)
            if part is not None:
                _write_rows(part, fresh)
            rows += fresh
    return rows


def _file_name(checkpoint: str, task: str, mode: Mode, sampling: Sampling) -> str:
    budget = "" if sampling.thinking_budget is None else f"-budget{sampling.thinking_budget}"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{checkpoint}-{task}-{mode}{budget}").lstrip(".")


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


def _rows(
    rollouts: Sequence[Rollout], *, task: Task, encoder: Encoder, first: int, samples: int, seconds: float
) -> list[Row]:
    """The samples of one chunk, graded; ``first`` is the place of its first request among all."""
    # Threads wait for the processes that compare expressions; the other graders take no time.
    with ThreadPoolExecutor(max_workers=WORKERS if task.grader == "math" else 1) as pool:
        graded = list(pool.map(lambda rollout: _decode_and_grade(rollout, task.grader, encoder), rollouts))
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return [
        {
            "prompt_id": rollout.request.prompt.id,
            "sample": (first + place) % samples,
            "prompt": _shown(rollout.request.prompt),
            "language": rollout.request.prompt.language,
            "domain": rollout.request.prompt.domain,
            "reference": rollout.request.prompt.answer,
            **grading,
            "closed": encoder.closed_thinking(rollout),
            "finish_reason": rollout.finish_reason,
            "num_prompt_tokens": len(rollout.prompt_ids),
            "num_tokens": len(rollout.response_ids),
            "num_thinking_tokens": _thinking_length(rollout, encoder),
            # A chunk's time, shared out by tokens: what was sampled together took its time together.
            "seconds": seconds * len(rollout.response_ids) / num_tokens,
            "response_ids": list(rollout.response_ids),
        }
        for place, (rollout, grading) in enumerate(zip(rollouts, graded, strict=True))
    ]


def _decode_and_grade(rollout: Rollout, grader: str, encoder: Encoder) -> Row:
    answer = rollout.request.prompt.answer
    assert answer is not None, "every question of a task has an answer"
    try:
        # Lone surrogates cannot be stored as text.
        text = encoder.decode(rollout.response_ids).encode("utf-8", "replace").decode("utf-8")
        parts = split_thinking(text)
        correct = bool(grade(grader, text, answer))
    except DistillError:
        raise
    except Exception as error:  # whatever one sample does to a tokenizer or a grader, the others are still examined
        return {"response": f"[{type(error).__name__}: {error}]", "thinking": "", "answer": "", "correct": False} | {
            "broken": True
        }
    return {"response": text, "thinking": parts.thinking, "answer": parts.answer, "correct": correct, "broken": False}


def _thinking_length(rollout: Rollout, encoder: Encoder) -> int:
    """Tokens up to the end of the thinking block, its tags included; 0 where there is no block."""
    ids = rollout.response_ids
    if encoder.think_close_id in ids:
        return ids.index(encoder.think_close_id) + 1
    if any(rollout.forced):
        # An early-stop string that is one token holds the closing tag itself.
        return len(ids) - rollout.forced[::-1].index(True)
    return len(ids) if encoder.think_open_id in ids else 0


def _shown(prompt: Prompt) -> str:
    """A conversation as text for a reader: a single question as it is, several turns with their roles."""
    if len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def _summarise(
    rows: Sequence[Row],
    *,
    checkpoint: str,
    task: str,
    mode: Mode,
    settings_hash: str,
    sampling: Sampling,
    seed: int,
    samples: int,
    pass_k: int,
    shape: Shape | None,
) -> Evaluation:
    scores: dict[str, tuple[float, ...]] = {}
    for row in rows:
        scores[row["prompt_id"]] = (*scores.get(row["prompt_id"], ()), float(row["correct"]))
    metrics = {f"avg@{samples}": estimate(scores)}
    if samples > 1:
        metrics[f"pass@{pass_k}"] = pass_at_k_estimate(scores, pass_k)
    num_rows = len(rows)

    def share(values: list[bool]) -> float:
        return sum(values) / num_rows

    return Evaluation(
        checkpoint=checkpoint,
        task=task,
        mode=mode,
        settings_hash=settings_hash,
        sampling=sampling,
        seed=seed,
        samples_per_question=samples,
        scores=scores,
        metrics=metrics,
        closure=share([row["closed"] for row in rows]),
        truncation=share([row["finish_reason"] == "length" for row in rows]),
        nonempty_thinking=share([bool(row["thinking"].strip()) for row in rows]),
        mean_length=sum(row["num_tokens"] for row in rows) / num_rows,
        mean_thinking_length=sum(row["num_thinking_tokens"] for row in rows) / num_rows,
        num_broken=sum(row["broken"] for row in rows),
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_prompt_tokens=sum(row["num_prompt_tokens"] for row in rows),
        flops=None
        if shape is None
        else sum(sequence_flops(shape, row["num_prompt_tokens"], row["num_tokens"]) for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )


def _schema() -> pyarrow.Schema:
    import pyarrow

    text, count, flag = pyarrow.string(), pyarrow.int64(), pyarrow.bool_()
    return pyarrow.schema(
        [
            ("prompt_id", text),
            ("sample", count),
            ("prompt", text),
            ("language", text),
            ("domain", text),
            ("reference", text),
            ("response", text),
            ("thinking", text),
            ("answer", text),
            ("correct", flag),
            ("broken", flag),
            ("closed", flag),
            ("finish_reason", text),
            ("num_prompt_tokens", count),
            ("num_tokens", count),
            ("num_thinking_tokens", count),
            ("seconds", pyarrow.float64()),
            ("response_ids", pyarrow.list_(pyarrow.int32())),
        ]
    )


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows), schema=_schema())
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, temporary)
        os.replace(temporary, path)


def _read_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows
