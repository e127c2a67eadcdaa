"""One sample of an examination: what was asked, what was said, whether it is right; and the parquet that keeps it.

A response that could not be had, decoded or graded is a sample like any other: wrong, and marked as broken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.chat import split_thinking
from distill.errors import DistillError
from distill.journal import writing
from distill.response import is_thinking, opening
from distill.types import Prompt, Request, Rollout
from eval.equality import WORKERS
from eval.graders import grade

if TYPE_CHECKING:
    import pyarrow

    from distill.encode import Encoder

Row = dict[str, Any]
"""One sample, as it stands in the per-sample parquet (``schema``)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Sample ``number`` of a question: its request, or the sentence that says why it cannot be asked."""

    question: Prompt
    number: int
    request: Request | str


def fitted(request: Request, context: int | None) -> Request | str:
    """The request with its response cut to what a model of ``context`` tokens takes, or why there is no room."""
    room = request.sampling.max_new_tokens if context is None else context - len(request.prompt_ids)
    if room < 1:
        return f"the prompt is {len(request.prompt_ids)} tokens long, and the model takes {context} with the response"
    limit = min(request.sampling.max_new_tokens, room)
    return replace(request, sampling=replace(request.sampling, max_new_tokens=limit))


def graded(
    asked: Sequence[Asked], said: Sequence[Rollout | str], *, grader: str, encoder: Encoder, seconds: float
) -> list[Row]:
    """The samples of one chunk, graded. A text among ``said`` is why there is no response."""
    # Threads wait for the processes that compare expressions; the other graders take no time.
    with ThreadPoolExecutor(max_workers=WORKERS if grader == "math" else 1) as pool:
        graded = list(pool.map(lambda one, spoken: _grading(one, spoken, grader, encoder), asked, said))
    num_tokens = sum(len(one.response_ids) for one in said if isinstance(one, Rollout))
    return [
        {
            "prompt_id": one.question.id,
            "sample": one.number,
            "prompt": shown(one.question),
            "language": one.question.language,
            "domain": one.question.domain,
            "reference": one.question.answer,
            **grading,
            "num_prompt_tokens": 0 if isinstance(one.request, str) else len(one.request.prompt_ids),
            # A chunk's time, shared out by tokens: what was sampled together took its time together.
            "seconds": seconds * grading["num_tokens"] / num_tokens if num_tokens else seconds / len(asked),
        }
        for one, grading in zip(asked, graded, strict=True)
    ]


def _grading(asked: Asked, said: Rollout | str, grader: str, encoder: Encoder) -> Row:
    answer = asked.question.answer
    assert answer is not None, "every question of a task has an answer"
    if isinstance(said, str):
        return _broken(said) | {
            "closed": False,
            "finish_reason": None,
            "num_tokens": 0,
            "num_thinking_tokens": 0,
            "response_ids": [],
        }
    facts = {
        "closed": encoder.closed_thinking(said),
        "finish_reason": said.finish_reason,
        "num_tokens": len(said.response_ids),
        "num_thinking_tokens": thinking_length(said, encoder),
        "response_ids": list(said.response_ids),
    }
    try:
        text = decoded(said, encoder)
        whole = opening(said, encoder) + text
        parts = split_thinking(whole)
        correct = bool(grade(grader, whole, answer))
    except DistillError:
        raise
    except Exception as error:  # whatever one sample does to a tokenizer or a grader, the others are still examined
        return _broken(f"{type(error).__name__}: {error}") | facts
    return {
        "response": text,
        "thinking": parts.thinking,
        "answer": parts.answer,
        "correct": correct,
        "broken": False,
        "unclosed": not parts.closed,
        **facts,
    }


def _broken(trouble: str) -> Row:
    return {
        "response": f"[{trouble}]",
        "thinking": "",
        "answer": "",
        "correct": False,
        "broken": True,
        "unclosed": False,
    }


def decoded(rollout: Rollout, encoder: Encoder) -> str:
    """The response's text, fit for storing: lone surrogates cannot be."""
    return encoder.decode(rollout.response_ids).encode("utf-8", "replace").decode("utf-8")


def thinking_length(rollout: Rollout, encoder: Encoder) -> int:
    """Tokens up to the end of the thinking block, its tags included; 0 where there is no block."""
    ids = rollout.response_ids
    if encoder.think_close_id in ids:
        return ids.index(encoder.think_close_id) + 1
    if any(rollout.forced):
        # An early-stop string that is one token holds the closing tag itself.
        return len(ids) - rollout.forced[::-1].index(True)
    return len(ids) if encoder.think_open_id in ids or is_thinking(rollout.prompt_ids, encoder) else 0


def shown(prompt: Prompt) -> str:
    """A conversation as text for a reader: a single question as it is, several turns with their roles."""
    if len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def schema() -> pyarrow.Schema:
    """Columns of the per-sample parquet."""
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
            ("unclosed", flag),
            ("finish_reason", text),
            ("num_prompt_tokens", count),
            ("num_tokens", count),
            ("num_thinking_tokens", count),
            ("seconds", pyarrow.float64()),
            ("response_ids", pyarrow.list_(pyarrow.int32())),
        ]
    )


def write_rows(path: Path, rows: Sequence[Row], columns: pyarrow.Schema) -> None:
    """Write a parquet that appears whole."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows), schema=columns)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, temporary)
        os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows
