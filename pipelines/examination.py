"""Examining a checkpoint on everything it is examined on: ``distill eval``, and the examinations of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint, open_tokenizer
from distill.embedded.task import questions as embedded_questions
from distill.encode import Encoder
from distill.errors import UserError
from distill.evaluation_config import EvaluationSettings, TaskSettings
from distill.family import EMBEDDED_NAMES, ModelSource, Shape, resolve
from distill.progress import say
from distill.prompt_config import FilePrompts
from distill.prompt_files import file_prompts
from distill.sampler import Sampler, TransformersSampler
from distill.seeding import derive
from distill.stage_config import ModeSampling
from distill.types import MODES, Mode, Sampling
from distill.vllm.client import Client
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.served import served_model
from eval.budget import budget_curves
from eval.evaluation import Evaluation
from eval.report import write_report
from eval.run_files import LATER
from eval.runner import evaluate, refuse_namesakes
from eval.switching import NUM_DIALOGUES, NUM_TURNS, ModeSwitching, examine_switching
from eval.switching import TASK as MODE_SWITCHING
from eval.tasks import EMBEDDED_LONGEST, MOST_EMBEDDED, MOST_RESPONSES, Task, load_task
from pipelines.hiring import api_key

WIDTH = 256
"""Responses under way at once to a server."""

REPORTED_LIMIT = 32768
"""The report's longest response, in tokens, where a task has none of its own."""


Examined = Evaluation | ModeSwitching


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is examined: its name in results, what identifies its weights, and how to ask it.

    ``context`` is the most tokens that it takes, ``shape`` what its FLOPs are counted from; None where not known.
    """

    name: str
    sampler: Sampler
    encoder: Encoder
    weights: str = ""
    shape: Shape | None = None
    context: int | None = None


def examine_task(
    subject: Subject,
    task: Task,
    settings: EvaluationSettings,
    *,
    seed: int,
    out: Path | None,
    only_budgets: bool = False,
) -> list[Evaluation]:
    """``subject`` on ``task`` in every mode, and in thinking mode under every thinking budget of ``settings`` too.

    ``only_budgets`` leaves out thinking without a budget. Every checkpoint is asked with the same random numbers, so
    differences are the weights'.
    """

    def ask(mode: Mode, sampling: Sampling) -> Evaluation:
        return evaluate(
            task,
            mode,
            sampler=subject.sampler,
            encoder=subject.encoder,
            sampling=sampling,
            samples=task.samples,
            seed=derive(seed, "evaluate", task.name, mode),
            checkpoint=subject.name,
            out=out,
            weights=subject.weights,
            shape=subject.shape,
            pass_at=task.pass_at,
            context=subject.context,
        )

    found = []
    for mode in task.modes or settings.modes:
        sampling = settings.sampling.of(mode)
        if mode == "no_think" or not only_budgets:
            found.append(ask(mode, sampling))
        if mode == "think":
            found += [ask(mode, replace(sampling, thinking_budget=budget)) for budget in settings.budgets]
    return found


def examine_mode_switching(
    subject: Subject,
    settings: EvaluationSettings,
    *,
    questions: Sequence[str] = (),
    num: int | None = None,
    seed: int,
    out: Path | None,
) -> ModeSwitching:
    """``subject`` in ``num`` conversations over ``questions``; without any, over those of the embedded task."""
    num = num or NUM_DIALOGUES
    if not questions:
        questions = [question.text for question in embedded_questions(seed, num * NUM_TURNS, split="test")]
    return examine_switching(
        questions,
        num=num,
        sampler=subject.sampler,
        encoder=subject.encoder,
        sampling={mode: settings.sampling.of(mode) for mode in MODES},
        seed=derive(seed, "evaluate", MODE_SWITCHING),
        checkpoint=subject.name,
        out=out,
        weights=subject.weights,
        shape=subject.shape,
        context=subject.context,
    )


def examine(
    checkpoint: str,
    *,
    tasks: Sequence[TaskSettings],
    modes: Sequence[Mode],
    budgets: Sequence[int] = (),
    samples: int | None = None,
    num_questions: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Score ``checkpoint`` on every task, in each mode and under each thinking budget.

    ``checkpoint`` is a model folder, a run (its student), an embedded or size name, a hub id, or the URL of a vLLM
    server, whose model's ``tokenizer`` has to be named. Without ``samples`` and ``max_new_tokens`` they are the task's.

    The document holds ``checkpoint``, ``scores`` (entries as in ``summary.json``), ``slices`` (the same by language and
    domain), ``evaluations``, ``budget_curves`` (``eval.budget``) and ``mode_switching`` (``eval.switching``).
    Without ``out``, what is found of a run's student is kept in that run's eval/later, and its report is made again.
    Raises UserError for a checkpoint or task that cannot be had, and for an ``out`` that cannot be written.
    """
    if budgets and "think" not in modes:
        raise UserError("--budget cuts thinking, and --mode no_think asks for none; take --mode think or both")
    is_served = checkpoint.startswith(("http://", "https://"))
    source = None if is_served else _resolve(checkpoint)
    run = None if is_served or not _is_run(checkpoint) else Path(checkpoint)
    keeps = out is None and run is not None
    if run is not None and keeps:
        out = run / "eval" / LATER
    if out is not None:
        _claim(out)
    wanted = [one for one in tasks if one.name != MODE_SWITCHING]
    conversations = [_own_questions(one, num_questions) for one in tasks if one.name == MODE_SWITCHING]
    loaded = [load_task(one, num_questions=num_questions, samples=samples, seed=seed) for one in wanted]
    refuse_namesakes([*(task.name for task in loaded), *(MODE_SWITCHING for _ in conversations)])
    evaluations, switching = list[Evaluation](), list[ModeSwitching]()
    with _served(checkpoint, tokenizer) if source is None else _opened(checkpoint, source, tokenizer) as subject:
        for task in loaded:
            limit = max_new_tokens or task.max_new_tokens or REPORTED_LIMIT
            settings = _settings(limit, modes=modes, budgets=budgets)
            only = bool(budgets) and "no_think" not in modes
            evaluations += examine_task(subject, task, settings, seed=seed, out=out, only_budgets=only)
        for questions in conversations:
            settings = _settings(max_new_tokens or (REPORTED_LIMIT if questions else EMBEDDED_LONGEST), modes=modes)
            switching.append(
                examine_mode_switching(subject, settings, questions=questions, num=num_questions, seed=seed, out=out)
            )
    if run is not None and keeps:
        say(f"kept in {out}; report: {write_report(run)}")
    everything: list[Examined] = [*evaluations, *switching]
    return {
        "checkpoint": checkpoint if source is None else source.location,
        "scores": [entry for found in everything for entry in found.entries],
        "slices": [entry for found in evaluations for entry in found.slice_entries],
        "evaluations": [found.to_json() for found in evaluations],
        "budget_curves": budget_curves(evaluations),
        "mode_switching": [found.to_json() for found in switching],
    }


def _settings(limit: int, *, modes: Sequence[Mode], budgets: Sequence[int] = ()) -> EvaluationSettings:
    """The report's sampling, with responses of up to ``limit`` tokens."""
    report = EvaluationSettings()
    longest = {mode: getattr(report.sampling, mode).model_copy(update={"max_new_tokens": limit}) for mode in MODES}
    return EvaluationSettings(modes=tuple(modes), budgets=tuple(sorted(set(budgets))), sampling=ModeSampling(**longest))


def _own_questions(task: TaskSettings, num: int | None) -> list[str]:
    """The questions of one's own that ``num`` conversations are made of: what the user asks last in each prompt.

    Raises UserError for more conversations than anybody waits for.
    """
    most = (MOST_EMBEDDED if task.path is None else MOST_RESPONSES) // NUM_TURNS
    if num is not None and num > most:
        raise UserError(
            f"{MODE_SWITCHING} is {most:,} conversations at the most, and {num:,} are asked for; ask for fewer"
        )
    if task.path is None:
        return []
    prompts = file_prompts(FilePrompts(path=task.path, prompt_column=task.prompt_column))
    return list(dict.fromkeys(str(prompt.messages[-1]["content"]) for _, prompt in prompts))


@contextmanager
def _opened(checkpoint: str, source: ModelSource, tokenizer: str | None) -> Iterator[Subject]:
    """The model in this process."""
    if tokenizer is not None:
        raise UserError("--tokenizer is for a server's URL; a checkpoint is examined with its own tokenizer")
    opened = open_checkpoint(source)
    encoder = Encoder(load_tokenizer(opened))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(opened, dtype, device)
    yield Subject(
        Path(checkpoint).name,
        TransformersSampler(model, encoder, speaker=checkpoint),
        encoder,
        weights=opened.revision,
        shape=opened.shape,
        context=opened.max_positions,
    )


@contextmanager
def _served(url: str, tokenizer: str | None) -> Iterator[Subject]:
    """The model behind its server, for the time of the block."""
    if tokenizer is None:
        raise UserError(
            f"{url} needs --tokenizer: the size name, hub id or folder of the model that it serves; prompts are "
            "rendered with its chat template and sent as its token ids"
        )
    found, shape = open_tokenizer(resolve(tokenizer, role="teacher"))
    encoder = Encoder(found)
    key = api_key()
    model = served_model(url, api_key=key)
    vocabulary = shape.vocabulary if shape is not None else max(found.get_vocab().values()) + 1
    with Client([url], width=WIDTH, api_key=key) as client:
        yield Subject(
            Path(model.name).name,
            RemoteSampler(client, encoder, speaker=model.name, vocabulary=vocabulary),
            encoder,
            weights=f"{url} {model.name}",
            shape=shape,
            context=model.context,
        )


def _resolve(checkpoint: str) -> ModelSource:
    """A run means its student; a size name its post-trained model; the rest is what it says."""
    folder = Path(checkpoint)
    if _is_run(checkpoint):
        if not (folder / "student").is_dir():
            raise UserError(
                f"the run {folder} has no student yet; give the command of that run again to finish it, or name one of "
                f"its checkpoints ({folder}/checkpoints/step_N)"
            )
        folder = folder / "student"
        return ModelSource(checkpoint, "directory", str(folder.resolve()))
    return resolve(checkpoint, role="teacher", option="CHECKPOINT")


def _is_run(checkpoint: str) -> bool:
    return checkpoint not in EMBEDDED_NAMES and (Path(checkpoint) / "config.yaml").is_file()


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
