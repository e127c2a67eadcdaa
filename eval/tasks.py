"""Tasks by name: questions with reference answers, and the grader that decides.

Three kinds: the embedded task (unlimited, offline), prompts with answers of one's own, and the sets of the report
from the Hugging Face hub, each pinned to a commit. A prompt is what the report's evaluation asks (section 4.6 and the
models' cards): mathematics is asked for a boxed answer, multiple choice for a letter in an `answer` field.
Left out on purpose: tasks whose grading runs a model's code, or asks a model.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill.embedded.task import DEFAULT_LENGTHS, MAX_OPERATIONS, lengths_up_to, questions
from distill.errors import UserError
from distill.progress import say
from distill.seeding import derive
from distill.types import Prompt
from eval.graders import GRADERS, as_number, grader_of

EMBEDDED_QUESTIONS = 512
"""Questions of the embedded task where no number is asked for: a 95 % interval of at most +-4.3 points."""

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = 'Please show your choice in the `answer` field with only the choice letter, e.g., `"answer": "C"`.'

_FORMULA = re.compile(r"[\\^_{}=$]|[\dxyz]\s*[-+*/(,]\s*[\dxyz]")
"""What is in a reference that a comparison of words would not do justice to."""

Row = Mapping[str, Any]
Asked = tuple[str, str] | None
"""A question as it is asked and its reference answer; None leaves the row out."""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions to examine a checkpoint on. ``grader`` is a key of ``eval.graders.GRADERS``."""

    name: str
    prompts: tuple[Prompt, ...]
    grader: str

    def __post_init__(self) -> None:
        assert self.grader in GRADERS, f"unknown grader {self.grader}"
        assert all(prompt.answer is not None for prompt in self.prompts), "every question of a task has an answer"
        assert len({prompt.id for prompt in self.prompts}) == len(self.prompts), "a task asks every question once"


@dataclass(frozen=True, slots=True)
class HubTask:
    """A data set on the hub and how its rows become questions.

    ``revision`` is a commit of the set's main branch. The licence is the card's; "none stated" where it has none.
    """

    id: str
    revision: str
    licence: str
    split: str
    ask: Callable[[Row], Asked]
    suffix: str
    subsets: tuple[str | None, ...] = (None,)


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

HUB_TASKS: dict[str, HubTask] = {
    "gsm8k": HubTask(
        id="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        licence="MIT",
        split="test",
        subsets=("main",),
        ask=_problem("question", "answer"),
        suffix=BOXED,
    ),
    "math500": HubTask(
        id="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        licence="none stated (MATH itself: MIT)",
        split="test",
        ask=_problem("problem", "answer"),
        suffix=BOXED,
    ),
    "aime24": HubTask(
        id="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        licence="none stated",
        split="train",
        ask=_problem("problem", "answer"),
        suffix=BOXED,
    ),
    "aime25": HubTask(
        id="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        licence="Apache-2.0",
        split="test",
        ask=_problem("problem", "answer"),
        suffix=BOXED,
    ),
    "gpqa_diamond": HubTask(
        id="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        licence="CC-BY-4.0 (gated: accept its terms on the hub and log in)",
        split="train",
        subsets=("gpqa_diamond",),
        ask=_ask_gpqa,
        suffix=LETTER,
    ),
    "mmlu_redux": HubTask(
        id="edinburgh-dawg/mmlu-redux-2.0",
        revision="372ea425445d51e1ba1188c56e5e893f8138621f",
        licence="CC-BY-4.0",
        split="test",
        subsets=tuple(_SUBJECTS.split()),
        ask=_ask_mmlu_redux,
        suffix=LETTER,
    ),
}


def load_task(name: str, *, num_questions: int | None = None, seed: int = 0, held_out: Sequence[Prompt] = ()) -> Task:
    """The task called ``name``, cut to its first ``num_questions``.

    ``embedded`` and ``embedded-N`` (chains of at most N operations) are drawn by ``seed``; ``prompts`` is
    ``held_out``, the caller's own; a path ends in ``.jsonl`` (columns prompt and answer; ``FILE@GRADER`` names the
    grader); the other names are those of ``HUB_TASKS``.

    Raises UserError for an unknown name, a file that cannot be read, a set that cannot be had.
    """
    if name == "embedded" or re.fullmatch(rf"embedded-[1-{MAX_OPERATIONS}]", name):
        task = _embedded(name, num_questions or EMBEDDED_QUESTIONS, seed)
    elif name == "prompts":
        answered = [prompt for prompt in held_out if prompt.answer is not None]
        if not answered:
            raise UserError("the task prompts needs prompts with answers: add an answer column, or name another task")
        task = _own(name, answered)
    elif name in HUB_TASKS:
        task = _from_hub(name)
    elif re.search(r"\.jsonl(@\w+)?$", name):
        task = _from_file(name)
    else:
        raise _unknown(name)
    if num_questions is not None and num_questions > len(task.prompts):
        say(
            f"the task {name} has {len(task.prompts)} questions, fewer than the {num_questions} asked for: all are used"
        )
    return Task(task.name, task.prompts[:num_questions], task.grader)


def _unknown(name: str) -> UserError:
    known = ["embedded", *(f"embedded-{n}" for n in range(1, MAX_OPERATIONS)), "prompts", *HUB_TASKS]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(['embedded', 'prompts', *HUB_TASKS])}"
    return UserError(f"no task is called {name!r}; {hint}; or give a file that ends in .jsonl")


def _embedded(name: str, num_questions: int, seed: int) -> Task:
    lengths = DEFAULT_LENGTHS if name == "embedded" else lengths_up_to(int(name.removeprefix("embedded-")))
    drawn = questions(seed, num_questions, lengths=lengths, split="test")
    return Task(name, tuple(_prompt(question.text, question.answer) for question in drawn), "embedded")


def _prompt(text: str, answer: str) -> Prompt:
    return Prompt(messages=({"role": "user", "content": text},), answer=answer)


def _once(name: str, prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts without repetitions of a question; the first stays."""
    unique: dict[str, Prompt] = {}
    num_repeated = sum(unique.setdefault(prompt.id, prompt) is not prompt for prompt in prompts)
    if num_repeated:
        say(f"the task {name} asks {num_repeated} questions more than once: each counts once")
    return tuple(unique.values())


def _own(name: str, prompts: Sequence[Prompt], grader: str | None = None) -> Task:
    """A task of one's own prompts; unless it is named, the references decide on the grader."""
    return Task(name, _once(name, prompts), grader or suited_grader([prompt.answer or "" for prompt in prompts]))


def suited_grader(answers: Sequence[str]) -> str:
    """The strictest grader that all ``answers`` suit: numbers, option letters, words, else mathematics."""
    if all(as_number(answer.rpartition("####")[2]) is not None for answer in answers):
        return "number"
    if all(re.fullmatch(r"[A-J]", answer.strip()) for answer in answers):
        return "choice"
    return "math" if any(_FORMULA.search(answer) for answer in answers) else "words"


def _from_file(name: str) -> Task:
    path, _, grader = name.partition("@")
    if grader and grader not in GRADERS:
        raise UserError(f"{name}: no grader is called {grader!r}; the graders are {', '.join(GRADERS)}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the task file {path} cannot be read: {error}; give an existing JSONL file") from None
    prompts = [_line(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"the task file {path} is empty; write one JSON object with prompt and answer a line")
    return _own(Path(path).stem, prompts, grader or None)


def _line(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); write one JSON object with prompt and answer a line") from None
    if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys():
        raise UserError(f'{where} lacks prompt or answer; a line looks like {{"prompt": "3+4=", "answer": "7"}}')
    prompt, answer = row["prompt"], str(row["answer"])
    if isinstance(prompt, str):
        return _prompt(prompt, answer)
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        raise UserError(f"{where}: prompt is neither a text nor a list of messages with role and content")
    return Prompt(messages=tuple(prompt), answer=answer, language=row.get("language"), domain=row.get("domain"))


def _from_hub(name: str) -> Task:
    task = HUB_TASKS[name]
    say(f"task {name}: {task.id} at {task.revision[:7]}, licence: {task.licence}")
    subsets = [_rows(name, task, subset) for subset in task.subsets]
    # One row of each subset in turn, so that the first questions are of all subjects.
    rows = [row for turn in zip_longest(*subsets) for row in turn if row is not None]
    asked = [pair for pair in map(task.ask, rows) if pair is not None]
    return Task(
        name, _once(name, (_prompt(f"{text}\n\n{task.suffix}", answer) for text, answer in asked)), grader_of(name)
    )


def _rows(name: str, task: HubTask, subset: str | None) -> list[Row]:
    import datasets
    import httpx

    try:
        return list(datasets.load_dataset(task.id, subset, split=task.split, revision=task.revision))
    except (OSError, ValueError, httpx.HTTPError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the task {name} needs the data set {task.id} at {task.revision[:7]}, which could not be had ({first}); "
            "run once where the hub can be reached, or give the questions as a file that ends in .jsonl "
            "with prompt and answer"
        ) from None
