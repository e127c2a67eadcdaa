"""Tasks: questions with reference answers, and the grader that decides.

Three kinds: the embedded task (unlimited, offline), questions with answers of one's own, and the report's sets
(``eval.published``). Left out on purpose: tasks whose grading runs a model's code, or asks a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill.embedded.task import DEFAULT_LENGTHS, MAX_OPERATIONS, lengths_up_to, questions
from distill.errors import UserError
from distill.evaluation_config import TaskSettings
from distill.progress import say
from distill.prompt_config import FilePrompts
from distill.prompt_files import file_prompts
from distill.types import MODES, Mode, Prompt
from eval.graders import GRADERS, as_number, grader_of
from eval.published import PUBLISHED, published_questions

EMBEDDED_QUESTIONS = 512
"""Questions of the embedded task where no number is asked for: a 95 % interval of at most +-4.3 points."""

MOST_EMBEDDED = 10_000
"""Questions of the embedded task at the most. They are drawn until one is new, so that more take minutes."""

MOST_RESPONSES = 1_000_000
"""Responses to a task in one mode at the most; all are held in memory."""

EMBEDDED_LONGEST = 96
"""Longest response of the embedded task; the report's limit would only feed a loop."""

_FORMULA = re.compile(r"[\\^_{}=$]|[\dxyz]\s*[-+*/(,]\s*[\dxyz]")
"""What is in a reference that a comparison of words would not do justice to."""

_EMBEDDED = re.compile(rf"embedded(?:-[1-{MAX_OPERATIONS}])?")

_OWN_FILE = re.compile(r"\.(?:jsonl|ndjson|parquet)(?:@\w+)?$")


@dataclass(frozen=True, slots=True)
class Task:
    """Questions to examine a checkpoint on. ``grader`` is a key of ``eval.graders.GRADERS``.

    ``instructions`` are what a question ends with, by mode; the questions themselves, and so their ids and the pairing
    of results, are the same in both. ``samples`` is the number of responses to a question and ``pass_at`` the k of
    pass@k; ``modes`` are None where the examination decides, and ``max_new_tokens`` is the report's longest response.
    """

    name: str
    prompts: tuple[Prompt, ...]
    grader: str
    instructions: Mapping[Mode, str] = field(default_factory=dict)
    samples: int = 1
    pass_at: tuple[int, ...] = ()
    modes: tuple[Mode, ...] | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        assert self.grader in GRADERS, f"unknown grader {self.grader}"
        assert all(prompt.answer is not None for prompt in self.prompts), "every question of a task has an answer"
        assert len({prompt.id for prompt in self.prompts}) == len(self.prompts), "a task asks every question once"

    def asked(self, prompt: Prompt, mode: Mode) -> Prompt:
        """The question as it is asked in ``mode``: with its instruction at the end of the last message."""
        instruction = self.instructions.get(mode)
        if not instruction:
            return prompt
        *before, last = prompt.messages
        return replace(prompt, messages=(*before, {**last, "content": f"{last['content']}\n\n{instruction}"}))


def settings_of(name: str) -> TaskSettings:
    """What the name alone of a task, ``FILE`` or ``FILE@GRADER`` means."""
    if not _OWN_FILE.search(name):
        return TaskSettings(name=name)
    path, _, grader = name.partition("@")
    return TaskSettings(path=path, grader=grader or None)


def check_task(wanted: str | TaskSettings) -> TaskSettings:
    """The settings that ``wanted`` means; nothing is read. Raises UserError for a name or grader that nobody knows."""
    settings = settings_of(wanted) if isinstance(wanted, str) else wanted
    name, grader = settings.name, settings.grader
    if grader is not None and grader not in GRADERS:
        raise UserError(
            f"{settings.label or name or settings.path}: no grader is called {grader!r}; the graders are "
            f"{', '.join(GRADERS)}"
        )
    if name is None or name in PUBLISHED:
        return settings
    if settings.path is not None:
        raise UserError(
            f"the task {name!r} takes no path; local copies are for {', '.join(PUBLISHED)}; leave the name out for "
            "questions of your own, and call them by a label"
        )
    if name == "mode_switching":
        raise UserError("mode_switching asks no questions of its own and takes no settings in a recipe; name it alone")
    if name != "prompts" and not _EMBEDDED.fullmatch(name):
        raise _unknown(name)
    return settings


def called(settings: TaskSettings) -> str:
    """What results call the task."""
    return settings.label or settings.name or Path(settings.path or "").stem


def check_samples(settings: TaskSettings, samples: int | None) -> None:
    """Raises UserError for a k of pass@k that is more than the responses to a question; nothing is read."""
    published = PUBLISHED.get(settings.name or "")
    _check_pass_at(settings, settings.samples or samples or (1 if published is None else published.samples))


def _check_pass_at(settings: TaskSettings, samples: int) -> None:
    highest = max(settings.pass_at, default=0)
    if highest > samples:
        raise UserError(
            f"the task {called(settings)}: pass@{highest} needs at least {highest} samples a question, and {samples} "
            f"{'is' if samples == 1 else 'are'} drawn; raise samples, or lower pass_at"
        )


def load_task(
    wanted: str | TaskSettings,
    *,
    num_questions: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    held_out: Sequence[Prompt] = (),
) -> Task:
    """The task that is ``wanted``, by name or with settings of its own, cut to its first ``num_questions``.

    The settings of its own win over ``num_questions`` and ``samples``, and these over what is usual for the task.

    ``embedded`` and ``embedded-N`` (chains of at most N operations) are drawn by ``seed``; ``prompts`` is
    ``held_out``, the caller's own; a file of one's own is a path that ends in ``.jsonl`` or ``.parquet`` (columns
    prompt and answer; ``FILE@GRADER`` names the grader); the other names are those of ``eval.published.PUBLISHED``.

    Raises UserError for an unknown name, a file that cannot be read, a set that cannot be had, a k of pass@k above the
    number of responses, and for more responses than anybody waits for.
    """
    settings = check_task(wanted)
    grader = settings.grader
    num_questions = settings.num_questions or num_questions
    task = _load(settings, num_questions, seed, held_out)
    num_asked, each = len(task.prompts[:num_questions]), settings.samples or samples or task.samples
    if num_asked * each > MOST_RESPONSES:
        raise UserError(
            f"the task {settings.label or task.name} is asked {num_asked:,} questions with {each:,} responses each, "
            f"and more than {MOST_RESPONSES:,} responses in one mode are not made; ask for fewer samples or questions"
        )
    _check_pass_at(settings, each)
    if num_questions is not None and num_questions > len(task.prompts):
        say(f"the task {task.name} has {len(task.prompts)} questions, fewer than the {num_questions} asked for")
    given = {mode: text for mode in MODES if (text := getattr(settings.instruction, mode)) is not None}
    return replace(
        task,
        name=settings.label or task.name,
        prompts=task.prompts[:num_questions],
        grader=grader or task.grader,
        instructions={**task.instructions, **given},
        samples=each,
        pass_at=settings.pass_at,
        modes=settings.modes,
    )


def _load(settings: TaskSettings, num_questions: int | None, seed: int, held_out: Sequence[Prompt]) -> Task:
    name = settings.name
    if name is None:
        return _from_file(settings)
    if name in PUBLISHED:
        published = PUBLISHED[name]
        prompts = published_questions(name, Path(settings.path) if settings.path else None)
        if not prompts:
            raise UserError(f"the task {name} has no questions in {settings.path or published.id}; check what it holds")
        return Task(
            name,
            _once(name, prompts),
            grader_of(name),
            dict.fromkeys(MODES, published.instruction),
            samples=published.samples,
            max_new_tokens=published.max_new_tokens,
        )
    if name == "prompts":
        answered = [prompt for prompt in held_out if prompt.answer is not None]
        if not answered:
            raise UserError("the task prompts needs prompts with answers: add an answer column, or name another task")
        return _own(name, answered)
    return _embedded(name, num_questions or EMBEDDED_QUESTIONS, seed)


def _unknown(name: str) -> UserError:
    known = ["embedded", *(f"embedded-{n}" for n in range(1, MAX_OPERATIONS)), "prompts", "mode_switching", *PUBLISHED]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(['embedded', 'prompts', *PUBLISHED])}"
    return UserError(f"no task is called {name!r}; {hint}; or give a file that ends in .jsonl or .parquet")


def _embedded(name: str, num_questions: int, seed: int) -> Task:
    if num_questions > MOST_EMBEDDED:
        raise UserError(
            f"the task {name} has {MOST_EMBEDDED:,} questions at the most, and {num_questions:,} are asked for; ask "
            "for fewer, or name another task"
        )
    lengths = DEFAULT_LENGTHS if name == "embedded" else lengths_up_to(int(name.removeprefix("embedded-")))
    drawn = questions(seed, num_questions, lengths=lengths, split="test")
    prompts = tuple(Prompt(({"role": "user", "content": question.text},), answer=question.answer) for question in drawn)
    return Task(name, prompts, "embedded", max_new_tokens=EMBEDDED_LONGEST)


def _once(name: str, prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts without repetitions of a question; the first stays."""
    unique: dict[str, Prompt] = {}
    num_repeated = sum(unique.setdefault(prompt.id, prompt) is not prompt for prompt in prompts)
    if num_repeated:
        say(f"the task {name} asks {num_repeated} questions more than once: each counts once")
    return tuple(unique.values())


def _own(name: str, prompts: Sequence[Prompt]) -> Task:
    """A task of one's own prompts; the references decide on the grader."""
    num_bound = sum(prompt.mode is not None for prompt in prompts)
    if num_bound:
        say(f"the task {name}: {num_bound} prompts name a mode; they are asked in every mode that is examined")
    return Task(name, _once(name, prompts), suited_grader([prompt.answer or "" for prompt in prompts]))


def suited_grader(answers: Sequence[str]) -> str:
    """The strictest grader that all ``answers`` suit: numbers, option letters, words, else mathematics."""
    if all(as_number(answer.rpartition("####")[2]) is not None for answer in answers):
        return "number"
    if all(re.fullmatch(r"[A-J]", answer.strip()) for answer in answers):
        return "choice"
    return "math" if any(_FORMULA.search(answer) for answer in answers) else "words"


def _from_file(settings: TaskSettings) -> Task:
    assert settings.path is not None, "settings without a name have a path"
    prompts = []
    files = FilePrompts(path=settings.path, prompt_column=settings.prompt_column, answer_column=settings.answer_column)
    for where, prompt in file_prompts(files):
        if prompt.answer is None:
            raise UserError(
                f"{where} has no {settings.answer_column}, and a task grades against it; a line looks like "
                '{"prompt": "3+4=", "answer": "7"}'
            )
        prompts.append(prompt)
    return _own(Path(settings.path).stem, prompts)
