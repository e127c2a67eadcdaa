"""A job file: a run's configuration, when it runs (``schedule``) and, where it is several runs, which (``sweep``).

What a cluster has to know about it (``launch``) is in ``distill.clusters``. Everything beside the blocks is a recipe
as ``distill run --recipe`` takes it. The words of ``schedule`` are those of a Kubernetes CronJob and Job in this
project's spelling, so that one file says the same to a worker and to a cluster.
Pure configuration: what comes due and what is done about it is in ``pipelines``.

Left out on purpose: the run's own settings under other names. What a run is, its recipe says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, PositiveInt, field_validator, model_validator

from distill.clusters import LaunchSettings
from distill.errors import UserError
from distill.recipe import load_recipe, merge, validate_as
from distill.settings import PositiveFloat, Settings

BLOCKS = ("schedule", "sweep", "launch")
"""The keys of a job file that a recipe does not have."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_timezones = cache(available_timezones)

YEAR = 366 * 86400
"""Seconds; a longer wait is a mistake in the unit."""

_LONGEST_CRON = 200  # characters; more is no expression that somebody has written


class ScheduleSettings(Settings):
    """When the job runs and what is done when something is in its way. Each text names Kubernetes' own word."""

    cron: str | None = None
    """Five fields, ``minute hour day month weekday`` (CronJob ``schedule``). Null: it runs when it is asked to."""
    timezone: str = "UTC"
    """The clock that ``cron`` speaks of, by its IANA name such as Europe/Berlin (``timeZone``). As Debian's cron does
    it, a time that the clock skips in spring runs right after the gap, one that it repeats in autumn runs once."""
    concurrency_policy: Literal["forbid", "allow", "replace"] = "forbid"
    """A run comes due while an earlier one is not finished (``concurrencyPolicy``): leave the new one out, run both, or
    stop the old one."""
    starting_deadline_seconds: Annotated[PositiveInt, Field(le=YEAR)] | None = None
    """A run that has not started so long after it came due is left out (``startingDeadlineSeconds``)."""
    catch_up: Literal["latest", "none"] = "latest"
    """Runs came due while no worker looked: run the last of them, or none. The others are left out. (A CronJob does
    ``latest``.)"""
    backoff_limit: Annotated[int, Field(ge=0)] = 6
    """Retries after failures (``backoffLimit``). Exit code 2 is never retried, 75 always, and a job that a worker lost
    is no failure."""
    backoff_seconds: PositiveFloat = 10.0
    """Wait before the first retry; it doubles each time. (Kubernetes waits 10 s too, and has no setting.)"""
    backoff_cap_seconds: PositiveFloat = 360.0
    """Longest wait before a retry."""
    active_deadline_seconds: PositiveInt | None = None
    """Time limit over all attempts (``activeDeadlineSeconds``); only time at work counts. A job that reaches it stops
    with a checkpoint and has failed."""
    termination_grace_period_seconds: Annotated[PositiveFloat, Field(le=YEAR)] = 600.0
    """What a job gets to write its checkpoint when it is asked to stop (``terminationGracePeriodSeconds``); then it is
    killed."""
    gpu_slots: PositiveInt = 1
    """GPUs of the machine that the job has for itself (``resources.limits`` of ``nvidia.com/gpu``); on a machine
    without any, its share of the worker's slots."""
    when: Literal["always", "new_data"] = "always"
    """``new_data``: only if the prompts, a file or a folder, grew since the last run that was done."""
    start_from: Literal["configured", "last"] = "configured"
    """``last``: the student starts from the one that the last run left, where there is one."""

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str | None) -> str | None:
        if cron is None:
            return None
        from cronsim import CronSim, CronSimError

        if len(cron.split()) != 5 or len(cron) > _LONGEST_CRON:
            raise ValueError("a cron expression has five fields: minute hour day month weekday, as in '0 2 * * *'")
        try:
            next(CronSim(cron, datetime(2024, 1, 1)))
        except CronSimError as error:
            raise ValueError(f"{str(error)[:1].lower()}{str(error)[1:]}; write it as in '0 2 * * *'") from None
        except StopIteration:
            raise ValueError("such a time never comes") from None
        return " ".join(cron.split())

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, timezone: str) -> str:
        known = _timezones()
        if timezone not in known:
            near = difflib.get_close_matches(timezone, known, n=1, cutoff=0.0)
            raise ValueError(f"no such time zone; did you mean {near[0]}?")
        return timezone

    @property
    def of_schedules(self) -> list[str]:
        """What is set of due times and of the jobs before, which a job has none of that somebody queues himself."""
        names = ("cron", "concurrency_policy", "starting_deadline_seconds", "catch_up", "when", "start_from")
        return [name for name, value in self if name in names and value != type(self).model_fields[name].default]

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)


class SweepSettings(Settings):
    """Several runs of one teacher in one job, one after the other."""

    runs: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """What each run lays over the recipe, for example ``{student: {model: 0.6B}}``. ``name`` names its folder."""
    share_teacher: bool = True
    """A teacher behind vLLM that the recipe names no ``teacher.urls`` for: one set of servers, both roles at once, for
    all runs. False lets every run start and end its own, one role at a time, on fewer GPUs."""

    @model_validator(mode="after")
    def _check_overlays(self) -> Self:
        for number, overlay in enumerate(self.runs):
            for key in (*BLOCKS, "store", "extends"):
                if key in overlay:
                    raise ValueError(f"runs.{number} has a key {key}, which is the whole job's; move it to the top")
        return self


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job file that was read: the recipe, not yet resolved, and the blocks beside it."""

    recipe: Mapping[str, Any]
    schedule: ScheduleSettings
    sweep: SweepSettings | None
    launch: LaunchSettings

    def recipes(self) -> list[dict[str, Any]]:
        """The recipe of each of the job's runs."""
        if self.sweep is None:
            return [dict(self.recipe)]
        return [merge(self.recipe, overlay) for overlay in self.sweep.runs]


def read_job(path: Path) -> JobFile:
    """The job file at ``path``; a recipe without the blocks is one too. Raises UserError for what is wrong."""
    return split_job(load_recipe(path), where=f"the job file {path}")


def split_job(tree: Mapping[str, Any], *, where: str) -> JobFile:
    """A job file's blocks, checked, apart from its recipe, which is checked when it is resolved."""
    schedule, sweep, launch = (tree.get(block) for block in BLOCKS)
    return JobFile(
        recipe={key: value for key, value in tree.items() if key not in BLOCKS},
        schedule=validate_as(ScheduleSettings, {} if schedule is None else schedule, where=f"{where}, schedule"),
        sweep=None if sweep is None else validate_as(SweepSettings, sweep, where=f"{where}, sweep"),
        launch=validate_as(LaunchSettings, {} if launch is None else launch, where=f"{where}, launch"),
    )


def checked_name(name: str) -> str:
    """``name`` as one of a schedule or job, which is also a folder's. Raises UserError where it cannot be."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name: letters, digits, '.', '_' and '-', a letter or digit first (--name)")
    return name
