"""A job before it runs: the configurations of its runs, resolved once and for all, and what its schedule block says.

It is resolved where and when somebody adds it, so a file that is edited later, or removed, changes no job that is
there. A worker reads it back from the queue and imports nothing heavy for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.jobs import JobFile, ScheduleSettings, checked_name, read_job

if TYPE_CHECKING:
    from distill.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of a job: its resolved configuration, and the folder it has below the job's (empty for the only one)."""

    folder: str
    config: Mapping[str, Any]

    @property
    def prompts(self) -> Path | None:
        """The file or folder that its prompts come from, if they come from one."""
        prompts = self.config["prompts"]
        return Path(os.path.expanduser(prompts["path"])) if prompts["kind"] == "file" else None


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a job is. ``cwd`` is the folder in which it was added and in which it runs; ``out`` holds its runs'."""

    name: str
    cwd: Path
    out: Path
    settings: ScheduleSettings
    runs: tuple[RunSpec, ...]
    share_teacher: bool

    def to_text(self) -> str:
        document = {
            "name": self.name,
            "cwd": str(self.cwd),
            "out": str(self.out),
            "schedule": self.settings.model_dump(mode="json"),
            "runs": [{"folder": run.folder, "config": run.config} for run in self.runs],
            "share_teacher": self.share_teacher,
        }
        return json.dumps(document)

    @classmethod
    def from_text(cls, text: str) -> JobSpec:
        """What ``to_text`` wrote, perhaps an older one: it was right then, and is not judged by today's rules."""
        document = json.loads(text)
        return cls(
            name=document["name"],
            cwd=Path(document["cwd"]),
            out=Path(document["out"]),
            settings=ScheduleSettings.model_construct(**document["schedule"]),
            runs=tuple(RunSpec(run["folder"], run["config"]) for run in document["runs"]),
            share_teacher=document["share_teacher"],
        )


def resolve_job(
    path: Path,
    *,
    name: str | None = None,
    out: Path | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> JobSpec:
    """The job that a file means here and now; ``schedule`` wins over its schedule block.

    Without a name it has the file's. Raises UserError for anything that is wrong with it or with one of its runs.
    """
    from distill.recipe import validate_as

    job = read_job(path)
    given = {key: value for key, value in (schedule or {}).items() if value is not None}
    written = job.schedule.model_dump(exclude_unset=True)
    settings = validate_as(ScheduleSettings, {**written, **given}, where=f"the job file {path}, schedule")
    name = checked_name(path.stem if name is None else name)
    configs = resolve_runs(job, path)
    check_new_data(settings, configs, path)
    for config in configs:
        config.check_teachers()
    return JobSpec(
        name=name,
        cwd=Path.cwd(),
        out=(Path("runs") / name if out is None else out).absolute(),
        settings=settings,
        runs=tuple(
            RunSpec("" if job.sweep is None else str(config.name), config.model_dump(mode="json")) for config in configs
        ),
        share_teacher=job.sweep is not None and job.sweep.share_teacher,
    )


def resolve_runs(job: JobFile, path: Path, *, is_here: bool = True) -> list[RunConfig]:
    """The configurations of the job's runs, each right in itself and all of them beside each other.

    Files of runs that are not ``is_here`` are not looked for. Raises UserError for anything that is wrong.
    """
    from pipelines.resolution import check_names, resolve_recipe

    places = [""] if job.sweep is None else [f", sweep.runs.{number}" for number in range(len(job.sweep.runs))]
    where = [f"the job file {path}{place}" for place in places]
    configs = [resolve_recipe(tree, where=at) for tree, at in zip(job.recipes(), where, strict=True)]
    for config in configs:
        check_names(config, is_here=is_here)
    if job.sweep is not None:
        _check_sweep(configs, where, job.sweep.share_teacher)
    return configs


def is_teacher_ours(config: RunConfig) -> bool:
    """Whether the runs would start servers of their own."""
    urls = config.teacher.urls
    return config.teacher.backend == "vllm" and not urls.generate and not urls.score


def check_new_data(settings: ScheduleSettings, configs: Sequence[RunConfig], path: Path) -> None:
    """Raises UserError where the schedule waits for prompts to grow, and they cannot."""
    kinds = {config.prompts.kind for config in configs}
    if settings.when == "new_data" and kinds != {"file"}:
        other = ", ".join(sorted(kinds - {"file"}))
        raise UserError(
            f"the job file {path}: schedule.when is new_data, and prompts.kind is {other}, which does not grow; set it "
            "to file, or schedule.when to always"
        )


def _check_sweep(configs: Sequence[RunConfig], where: Sequence[str], share_teacher: bool) -> None:
    """The runs of a sweep have one teacher, and each one a folder of its own."""
    folders: dict[str, str] = {}
    first = configs[0]
    for config, place in zip(configs, where, strict=True):
        if (config.teacher, config.specialists) != (first.teacher, first.specialists):
            raise UserError(f"{place} has another teacher than the first run; a sweep has one, set it at the top")
        folder = str(config.name)
        if folder in folders:
            raise UserError(f"{place} is called {folder}, as {folders[folder]} is; give each its own name")
        folders[folder] = place
    for domain, settings in first.specialists.items():
        if share_teacher and settings.backend == "vllm" and not settings.urls.score:
            raise UserError(
                f"{where[0]} has specialists.{domain} behind vLLM, and a sweep shares its teacher's servers alone; set "
                f"specialists.{domain}.urls, or sweep.share_teacher to false"
            )
