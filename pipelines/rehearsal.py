"""What a run would refuse at once, found without beginning it: ``distill run --dry-run``.

Names are looked up, and files of the user's read: prompts, questions, the configuration and the headers of model
folders, what lies where the run and its responses would. Nothing is made, no hub and no server is asked, and no torch
is imported. So prompts are not measured against ``max_prompt_tokens``, which takes a tokenizer, and devices are not
asked for what the student's optimiser needs: the run may be planned for others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from distill.adapters import check_adapters
from distill.checkpoint import read_folder
from distill.comparison import ComparisonConfig
from distill.config import RunConfig
from distill.errors import UserError
from distill.prompt_config import FilePrompts
from distill.prompt_files import file_prompts
from distill.run_folder import check_place, refuse_other
from eval.switching import TASK as MODE_SWITCHING
from eval.tasks import check_task, load_task
from pipelines.resolution import check_names
from pipelines.tracker import check_tracker
from teachers.store import root_of

if TYPE_CHECKING:
    from pipelines.comparison import Member


def rehearse(config: RunConfig, out: Path, *, processes: int) -> None:
    """Raises UserError where a run of ``config`` in ``out`` would, before it has loaded a model."""
    config.check_processes(processes)
    check_tracker(config.tracker)
    _check_place(out, "config.yaml", config)
    _check_run(config, has_student=True)


def rehearse_comparison(config: ComparisonConfig, runs: Iterable[tuple[Member, RunConfig]], out: Path) -> None:
    """The same of a comparison with these runs; all but the first of each chain begin with what that one leaves."""
    from pipelines.comparison import OFF_POLICY

    _check_place(out, "comparison.yaml", config)
    seen = set()
    for member, run in runs:
        has_student = member.arm == OFF_POLICY
        same = (has_student, run.teacher, run.student, run.prompts, run.evaluation)
        if (key := repr(same)) not in seen:
            seen.add(key)
            _check_run(run, has_student=has_student)


def _check_run(config: RunConfig, *, has_student: bool) -> None:
    config.check_teachers()
    check_names(config, has_student=has_student)
    models = [teacher.model for teacher in (config.teacher, *config.specialists.values())]
    if has_student and os.path.isdir(config.student.model):
        check_adapters(config.student, read_folder(Path(config.student.model))[1])
    for model in dict.fromkeys(models):
        if os.path.isdir(model):
            read_folder(Path(model))
    _check_can_be_made(
        root_of(config.store), "the response store {} cannot be made: {}; name a folder with --store or DISTILL_STORE"
    )
    if isinstance(config.prompts, FilePrompts):
        for _ in file_prompts(config.prompts):
            pass
    curve = config.evaluation.curve
    for task in (*(config.evaluation.tasks or ()), *([curve.task] if curve and curve.task else ())):
        if task != MODE_SWITCHING and check_task(task).path is not None:
            load_task(task, num_questions=config.evaluation.num_questions, samples=config.evaluation.samples)


def _check_place(out: Path, marker: str, config: RunConfig | ComparisonConfig) -> None:
    check_place(out, marker=marker)
    _check_can_be_made(out, "--out {} cannot be written: {}; name another folder")
    if (out / marker).exists():
        refuse_other(out / marker, config)


def _check_can_be_made(folder: Path, sentence: str) -> None:
    """Raises UserError with ``sentence`` where no folder can be here, or nothing be put into it."""
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(sentence.format(folder, error.strerror)) from None
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        code = errno.EEXIST if there == folder.absolute() else errno.ENOTDIR
        raise UserError(sentence.format(folder, os.strerror(code)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(sentence.format(folder, os.strerror(errno.EACCES)))
