"""The report's sets: where each one lies, and how its rows become questions.

A set comes from the Hugging Face hub, pinned to a commit, or from a local copy with the same columns. A prompt is what
the report's evaluation asks (section 4.6 and the models' cards): mathematics is asked for a boxed answer, multiple
choice for a letter in an `answer` field, in both modes.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.progress import say
from distill.prompt_files import json_rows
from distill.seeding import derive
from distill.types import Prompt

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = 'Please show your choice in the `answer` field with only the choice letter, e.g., `"answer": "C"`.'

_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv")

Row = Mapping[str, Any]
Asked = tuple[str, str] | None
"""A question as it is asked and its reference answer; None leaves the row out."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published set. ``id`` and ``revision`` (a commit of its main branch) are the hub's.

    ``licence`` is the card's; "none stated" where it has none. ``samples`` and ``max_new_tokens`` are what the report
    uses on it. ``subject`` is the column that becomes a question's domain; ``by_subset`` makes the subset's name that.
    """

    id: str
    revision: str
    licence: str
    split: str
    ask: Callable[[Row], Asked]
    instruction: str
    subsets: tuple[str | None, ...] = (None,)
    subject: str | None = None
    by_subset: bool = False
    samples: int = 1
    max_new_tokens: int = 32768


def _problem(question: str, answer: str) -> Callable[[Row], Asked]:
    return lambda row: (row[question], str(row[answer]))


def _ask_gpqa(row: Row) -> Asked:
    # The set always lists the right answer first; the order is drawn from the question, the same in every run.
    options = [str(row[key]).strip() for key in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    order = random.Random(derive(0, "gpqa", row["Question"])).sample(range(4), 4)
    return _with_options(row["Question"].strip(), [options[place] for place in order]), "ABCD"[order.index(0)]


def _ask_mmlu_redux(row: Row) -> Asked:
    # Rows that the annotators found wrong or unclear are what the "redux" is there to leave out.
    if row["error_type"] != "ok":
        return None
    return _with_options(row["question"].strip(), [str(option) for option in row["choices"]]), "ABCD"[row["answer"]]


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
    return "\n".join([question, "", *lines])


_SUBJECTS = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine "
    "professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions"
)

PUBLISHED: dict[str, Published] = {
    "gsm8k": Published(
        id="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        licence="MIT",
        split="test",
        subsets=("main",),
        ask=_problem("question", "answer"),
        instruction=BOXED,
    ),
    "math500": Published(
        id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        licence="none stated (MATH itself: MIT)",
        split="test",
        ask=_problem("problem", "answer"),
        instruction=BOXED,
        subject="subject",
    ),
    "aime24": Published(
        id="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        licence="none stated",
        split="train",
        ask=_problem("problem", "answer"),
        instruction=BOXED,
        samples=64,
        max_new_tokens=38912,
    ),
    "aime25": Published(
        id="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        licence="Apache-2.0",
        split="test",
        ask=_problem("problem", "answer"),
        instruction=BOXED,
        samples=64,
        max_new_tokens=38912,
    ),
    "gpqa_diamond": Published(
        id="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        licence="CC-BY-4.0 (gated: accept its terms on the hub and log in)",
        split="train",
        subsets=("gpqa_diamond",),
        ask=_ask_gpqa,
        instruction=LETTER,
        subject="High-level domain",
    ),
    "mmlu_redux": Published(
        id="edinburgh-dawg/mmlu-redux-2.0",
        revision="372ea425445d51e1ba1188c56e5e893f8138621f",
        licence="CC-BY-4.0",
        split="test",
        subsets=tuple(_SUBJECTS.split()),
        ask=_ask_mmlu_redux,
        instruction=LETTER,
        by_subset=True,
    ),
}


def published_questions(name: str, path: Path | None = None) -> list[Prompt]:
    """The questions of a set, without its instruction, from the hub or from a local copy.

    ``path`` is a JSONL, parquet or CSV file with the set's columns, or a folder: of a set in subsets, one that holds a
    folder of each or all rows together; of several files, those are read whose names begin with the split or the
    subset. Raises UserError where the set cannot be had or has other columns.
    """
    published = PUBLISHED[name]
    if path is None:
        say(f"task {name}: {published.id} at {published.revision[:7]}, licence: {published.licence}")
    per_subset = _local_rows(name, published, path) if path else _hub_rows(name, published)
    try:
        return [
            Prompt(({"role": "user", "content": asked[0]},), answer=asked[1], domain=_domain(published, subset, row))
            # One row of each subset in turn, so that the first questions are of all subjects.
            for turn in zip_longest(*([(subset, row) for row in rows] for subset, rows in per_subset))
            for subset, row in filter(None, turn)
            if (asked := published.ask(row)) is not None
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        where = f"{published.id} at {published.revision[:7]}" if path is None else path
        raise UserError(
            f"the task {name} cannot read {where} ({type(error).__name__}: {error}); its rows need the columns that "
            f"{published.id} has on the hub"
        ) from None


def _domain(published: Published, subset: str | None, row: Row) -> str | None:
    found = subset if published.by_subset else row.get(published.subject) if published.subject else None
    return str(found) if found else None


def _hub_rows(name: str, published: Published) -> list[tuple[str | None, list[Row]]]:
    return [(subset, _download(name, published, subset)) for subset in published.subsets]


def _download(name: str, published: Published, subset: str | None) -> list[Row]:
    import datasets
    import httpx

    try:
        return list(datasets.load_dataset(published.id, subset, split=published.split, revision=published.revision))
    except (OSError, ValueError, httpx.HTTPError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the task {name} needs the data set {published.id} at {published.revision[:7]}, which could not be had "
            f"({first}); run once where the hub can be reached, give a local copy of its columns (distill eval --data "
            f"PATH, for a run --set 'evaluation.tasks=[{{name: {name}, path: PATH}}]'), or name another task"
        ) from None


def _local_rows(name: str, published: Published, path: Path) -> list[tuple[str | None, list[Row]]]:
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"the task {name}: there is no file or folder {path}; check the spelling")
    folders: dict[str | None, Path] = {
        subset: path / subset for subset in published.subsets if subset and (path / subset).is_dir()
    }
    missing = [subset for subset in published.subsets if folders and subset not in folders]
    if missing:
        raise UserError(f"the task {name}: the folder {path} has no folder {missing[0]}, one of the set's subsets")
    return [
        (subset, [row for file in _files(name, published, subset, source) for row in _rows_of(file)])
        for subset, source in (folders or {None: path}).items()
    ]


def _files(name: str, published: Published, subset: str | None, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    subsets = [known for known in published.subsets if known is not None] if subset is None else []
    named = [file for file in files if file.name.startswith((published.split, *subsets))]
    if not files:
        raise UserError(f"the task {name}: the folder {path} holds no {', '.join(_SUFFIXES)} file")
    return named or files


def _rows_of(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if file.suffix not in (".parquet", ".csv"):
        yield from (row for _, row in json_rows(file))
        return
    try:
        if file.suffix == ".parquet":
            yield from pyarrow.parquet.read_table(file).to_pylist()
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({error}); write it again, or use JSONL") from None
