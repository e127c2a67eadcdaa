"""The sample browser: a few questions with every checkpoint's answers in both modes, and the tokens that the run
recorded, shaded by their divergence to the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.page import Document

NUM_QUESTIONS = 12
"""Questions of a task."""

MOST_CHARACTERS = 4000
"""Characters of a thinking block or an answer that are shown."""

ALL_CHARACTERS = 600_000
"""Characters of all of them together: a page stays small enough to send."""

ALL_TOKENS = 16_000
"""Shaded tokens of a page; each costs some sixty bytes."""

SHADES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats from which a token is shaded, and more strongly."""

_COLUMNS = (
    *("prompt_id", "prompt", "reference", "response", "thinking", "answer", "correct", "closed", "num_tokens"),
    "finish_reason",
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as the page shows it. ``shade`` is 0 (none) to 5, ``said`` what its tooltip says."""

    text: str
    shade: int
    said: str


def browsers(tasks: Mapping[str, Sequence[Document]]) -> list[Document]:
    """One a task, of its examinations without a thinking budget."""
    found = [browser for task, made in tasks.items() if (browser := _browser(task, made))["questions"]]
    questions = [question for browser in found for question in browser["questions"]]
    num_answers = sum(len(modes) for question in questions for modes in question["answers"].values())
    # An answer has two texts: what was thought and what was said.
    most = min(MOST_CHARACTERS, ALL_CHARACTERS // max(2 * num_answers, 1))
    return [{**browser, "most_characters": most} for browser in found]


def _browser(task: str, evaluations: Sequence[Document]) -> Document:
    """Every checkpoint's first answer in each mode.

    First come questions that the last student gets wrong in its first mode, then those it learned, then others.
    """
    answers: dict[str, dict[str, dict[str, Document]]] = {}
    for found in evaluations:
        for row in _first_samples(Path(f"{found['file']}.parquet")):
            answers.setdefault(row["prompt_id"], {}).setdefault(str(found["checkpoint"]), {})[found["mode"]] = row
    names = list(dict.fromkeys(str(found["checkpoint"]) for found in evaluations))
    students = [name for name in names if name != "teacher"]

    def kind(by_name: Mapping[str, Mapping[str, Document]]) -> str:
        right = [next(iter(by_name[name].values()))["correct"] for name in students if name in by_name]
        return "" if not right else "wrong" if not right[-1] else "learned" if not all(right) else "right"

    groups: dict[str, list[str]] = {"wrong": [], "learned": [], "right": [], "": []}
    for prompt_id, by_name in answers.items():
        groups[kind(by_name)].append(prompt_id)
    third = NUM_QUESTIONS // 3
    chosen = [prompt_id for group in groups.values() for prompt_id in group[:third]]
    chosen += [prompt_id for prompt_id in answers if prompt_id not in chosen][: NUM_QUESTIONS - len(chosen)]
    questions = [_question(answers[prompt_id], names, kind(answers[prompt_id])) for prompt_id in chosen]
    return {"task": task, "questions": questions, "num_questions": len(answers)}


def _question(by_name: Mapping[str, Mapping[str, Document]], names: Sequence[str], kind: str) -> Document:
    any_row = next(iter(next(iter(by_name.values())).values()))
    return {
        "prompt": any_row["prompt"],
        "reference": any_row["reference"],
        "kind": kind,
        "answers": {name: by_name[name] for name in names if name in by_name},
    }


def _first_samples(path: Path) -> list[Document]:
    if not path.exists():
        return []
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=list(_COLUMNS), filters=[("sample", "=", 0)])
    rows: list[Document] = table.to_pylist()
    return rows


def shaded(samples: Sequence[Document]) -> list[Document]:
    """The recorded responses by question: for each of its moments (stage and step) both modes' tokens."""
    most = ALL_TOKENS // max(len(samples), 1)
    questions: dict[str, Document] = {}
    for sample in samples:
        question = questions.setdefault(
            sample["prompt_id"], {"prompt": sample["prompt"], "reference": sample["reference"], "moments": {}}
        )
        moment = question["moments"].setdefault((sample["stage"], sample["step"]), {})
        moment[sample["mode"]] = _response(sample, most)
    return [
        {
            **question,
            "moments": [
                {"stage": stage, "step": step, "modes": modes} for (stage, step), modes in question["moments"].items()
            ],
        }
        for question in questions.values()
    ]


def _response(sample: Document, most: int) -> Document:
    tokens = [
        Token(text, sum(kl >= nats for nats in SHADES), f"{kl:.3g} nats, log p {logprob:.3g}")
        for text, kl, logprob in zip(sample["tokens"], sample["kl"], sample["logprob"], strict=True)
    ]
    return {
        "tokens": tokens[:most],
        "num_tokens": len(tokens),
        "mean": sum(sample["kl"]) / len(tokens),
        "truncated": sample["finish_reason"] == "length",
    }


def divergence_names(samples: Sequence[Document]) -> list[str]:
    """What the shades mean in this run, in words."""
    words: dict[str, Any] = {
        "reverse_kl": "reverse KL to the teacher over the whole vocabulary",
        "topk_reverse_kl": "lower bound of the reverse KL to the teacher, from the tokens that it told",
        "estimated_reverse_kl": "estimate of the reverse KL to the teacher from the sampled token alone",
    }
    return [words[name] for name in dict.fromkeys(sample["divergence"] for sample in samples)]
