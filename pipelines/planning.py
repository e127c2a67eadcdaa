"""From a configuration and words for devices to a plan: shapes and tables are looked up, nothing is downloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from distill.config import RunConfig
from distill.errors import UserError
from distill.family import Shape, resolve, shape_in, shape_of
from distill.hardware import Pool, load_devices, parse_pool
from pipelines.layouts import Pair
from pipelines.plan import POOL_OPTIONS, Plan, choose_devices, make_plan
from pipelines.workload import usual_lengths


def planned(
    config: RunConfig,
    *,
    gpus: str | None = None,
    gpus_teacher: str | None = None,
    gpus_student: str | None = None,
    hardware: Path | None = None,
    price: float | None = None,
    lengths: Mapping[str, float | None] | None = None,
    processes: int | None = None,
    machines: int = 1,
    roles_at_once: int = 1,
    options: tuple[str, str, str] = POOL_OPTIONS,
    asked: Sequence[str] = (),
) -> Plan:
    """The plan of ``config``. ``lengths`` are tokens of prompt, think and no_think; None where the usual ones hold.
    ``processes`` fixes how many the student has, ``machines`` on how many it has them, as many on each, where no GPUs
    are named; ``roles_at_once`` how many of the teacher's roles have servers up at
    the same time; ``options`` are what the three pools of GPUs are called where the user named them, ``asked`` words
    that the run's command has beside its models.

    Raises UserError for devices that nobody knows, models whose shape cannot be looked up, and where nothing fits.
    """
    numbers = {"--price": price, **{f"--{name}-tokens": value for name, value in (lengths or {}).items()}}
    for option, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise UserError(f"{option.replace('_', '-')} is {number}; it takes a finite number")
    known = load_devices(hardware)

    def pool(text: str | None, option: str) -> Pool | None:
        return None if text is None else parse_pool(text, known, option=option)

    devices = choose_devices(
        shared=pool(gpus, options[0]),
        teacher=pool(gpus_teacher, options[1]),
        student=pool(gpus_student, options[2]),
        price=price,
        options=options,
    )
    if devices is not None:
        devices = replace(devices, roles_at_once=roles_at_once)
    pair = Pair(teacher=_shape(config.teacher.model, "teacher"), student=_shape(config.student.model, "student"))
    said = {name: value for name, value in (lengths or {}).items() if value is not None}
    spoken = replace(usual_lengths(config), **said, longest=None) if said else None
    return make_plan(
        config,
        pair,
        known,
        devices,
        price=price,
        lengths=spoken,
        processes=processes,
        machines=machines,
        asked=asked,
    )


def _shape(model: str, role: str) -> Shape:
    found = known_shape(model)
    if found is not None:
        return found
    resolve(model, role="teacher" if role == "teacher" else "student")  # says what is wrong with a name
    raise UserError(
        f"--{role} {model}: its shape is not known before it is downloaded; download it and name the folder, or name a "
        f"size of the family"
    )


def known_shape(model: str) -> Shape | None:
    """Of a size or an embedded model, or of what a folder's config.json says; None where that is not known before a
    model is downloaded. Raises UserError for a config.json that describes no model."""
    shape = shape_of(model)
    config = Path(model) / "config.json"
    if shape is not None or not config.is_file():
        return shape
    try:
        return shape_in(json.loads(config.read_text(encoding="utf-8")), config)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{config} describes no model that a plan can be made for: {error!r}") from None
