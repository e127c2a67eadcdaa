"""What a job runs with, laid down once before its first attempt; every later attempt finds the same.

    FOLDER/NAME.yaml    the recipe of each run
    FOLDER/prompts/     a copy of the prompts, if they come from files: those that are there now
    FOLDER/job.json     which recipe goes where, and when the job was created; written last

Prompts are copied because a run that is resumed refuses prompts that have changed meanwhile, and the files of a
schedule that waits for new data do change.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError
from distill.journal import read_json, write_atomically, write_json, writing
from distill.progress import say
from distill.prompt_files import prompt_files
from pipelines.job import RunSpec
from pipelines.queue import Job, Queue


def prepare(queue: Queue, job: Job, *, last: Job | None) -> None:
    """Lay down what ``job`` runs with; ``last`` is the one of its schedule that was done last, if there is one.

    Raises UserError where its prompts are gone or the folder is another job's, DistillError where the disk refuses.
    """
    folder = queue.job_folder(job.id)
    if (folder / "job.json").exists():
        # A queue.db that was removed begins again at number 1, and the folders may have stayed.
        if read_json(folder / "job.json").get("created") != job.created:
            raise UserError(
                f"{folder} holds what another job of this number runs with, of a queue.db that is no more; move it "
                f"away, then distill queue retry {job.id}"
            )
        return
    copies = _copy_prompts(job, folder / "prompts")
    entries = []
    for run in job.spec.runs:
        recipe = folder / f"{run.folder or 'run'}.yaml"
        write_atomically(recipe, yaml.safe_dump(_config(job, run, copies, last), sort_keys=False, allow_unicode=True))
        entries.append({"recipe": str(recipe), "out": str(job.out / run.folder)})
    document = {"created": job.created, "runs": entries, "share_teacher": job.spec.share_teacher}
    write_json(folder / "job.json", document)


def _config(job: Job, run: RunSpec, copies: dict[Path, Path], last: Job | None) -> dict[str, Any]:
    config = dict(run.config)
    if run.prompts is not None:
        config["prompts"] = {**config["prompts"], "path": str(copies[run.prompts])}
    if last is not None and job.spec.settings.start_from == "last":
        if _begins_as(last, run):
            config["student"] = {**config["student"], "model": str(last.out / run.folder / "student"), "revision": None}
        else:
            say(
                f"job {job.id} ({job.name}): {job.out / run.folder} starts from its configured student "
                f"{config['student']['model']}: job {last.id}, the last that was done, has no run of this name with it"
            )
    return config


def _begins_as(last: Job, run: RunSpec) -> bool:
    """Whether ``last`` has a run of this name that was configured with the same student.

    A schedule that was added anew may have another one, or runs that there were not.
    """
    student = run.config["student"]
    wanted = run.folder, student["model"], student.get("revision")
    return wanted in [
        (one.folder, one.config["student"]["model"], one.config["student"].get("revision")) for one in last.spec.runs
    ]


def _copy_prompts(job: Job, target: Path) -> dict[Path, Path]:
    """Where the copy of each run's prompts is."""
    sources = list(dict.fromkeys(run.prompts for run in job.spec.runs if run.prompts is not None))
    copies = {source: target / f"{number}-{source.name}" for number, source in enumerate(sources)}
    if not sources or target.exists():
        return copies
    # A name of its own: a worker that is slow may find another one at the same job.
    temporary = target.with_name(f".prompts-{uuid.uuid4().hex}.tmp")
    with writing(target):
        temporary.mkdir(parents=True)
        for source, copy in copies.items():
            found = prompt_files(job.spec.cwd / source)
            place = temporary / copy.name
            if (job.spec.cwd / source).is_dir():
                place.mkdir()
                for file in found:
                    _copy(file, place / file.name)
            else:
                _copy(found[0], place)
        temporary.rename(target)
    return copies


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise UserError(f"the prompts {source} have been removed; put them back, then distill queue retry") from None


def distill_run(folder: Path) -> list[str]:
    """The command of the job that ``prepare`` laid down in ``folder``: a run, or a sweep of several."""
    runs = read_json(folder / "job.json")["runs"]
    if len(runs) == 1:
        return run_command(runs[0])
    return [sys.executable, "-m", "pipelines.sweep", str(folder / "job.json")]


def run_command(entry: dict[str, str]) -> list[str]:
    """``distill run`` of one entry of job.json."""
    return [sys.executable, "-m", "distill.cli", "run", "--recipe", entry["recipe"], "--out", entry["out"]]
