"""When each part of a step worked, and on how many devices: the phases of the pipeline sample -> score -> train.

A phase is busy while it works on a step's batch, wherever that is: in this process, behind a server, in the background
of another phase. So phases overlap, and their seconds may come to more than the step's own. A step is as long as its
longest phase where everything else hides behind it: ``overlap_efficiency`` is that phase's seconds over the step's.
One batch ahead, some of a batch's work is done while the step before is timed, so that a single step's figure may be
above 1; of many steps together it is not.

``seconds.*`` are something else: what the step itself waited for or did, one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.config import RunConfig
from distill.model_config import TeacherSettings
from distill.spans import Span, after, length, united

PHASES = ("sample", "score", "sync", "train")
"""``score`` is whatever judges: the teacher, the verifier, and passes of the student over what it said. ``sync`` is
sending new weights to a sampler that has its own, and checking that they arrived."""


SHOWN_GAP = 0.01
"""Share of a step below which a pause is not shown in its timeline."""
SHOWN_WORK = 0.001
"""Share of a step below which work is not: a sampler without weights of its own takes new ones in no time."""


@dataclass
class Clock:
    """Keeps the phases of one stage in one process. ``devices`` are how many each phase occupies."""

    devices: Mapping[str, int]
    begun: float = field(default_factory=time.perf_counter)
    _ended: dict[str, float] = field(default_factory=dict)

    def metrics(self, spans: Mapping[str, Sequence[Span]], *, wall: float) -> dict[str, Any]:
        """Metrics of a step that took ``wall`` seconds, whose phases worked in ``spans``.

        What a phase did before it was done with the step before counts for that one: a request that waits for its turn
        occupies nobody.
        """
        busy: dict[str, float] = {}
        timeline: dict[str, list[list[float]]] = {}
        for phase in PHASES:
            own = after(united(spans.get(phase, ())), self._ended.get(phase, -math.inf))
            if own:
                self._ended[phase] = own[-1][1]
            busy[phase] = length(own)
            # A bar of many thin ones is shown as one: a line of metrics stays a line.
            whole = united(own, gap=SHOWN_GAP * wall)
            timeline[phase] = [
                [round(begin - self.begun, 4), round(end - self.begun, 4)]
                for begin, end in whole
                if end - begin > SHOWN_WORK * wall
            ]
        return {
            **{f"busy.{phase}": seconds for phase, seconds in busy.items()},
            **{f"device_seconds.{phase}": seconds * self.devices[phase] for phase, seconds in busy.items()},
            "overlap_efficiency": max(busy.values()) / wall,
            "timeline": timeline,
        }


def devices_of(config: RunConfig, num_processes: int, *, teacher_judges: bool) -> dict[str, int]:
    """How many devices each phase of a stage occupies: the student's processes, and what servers have of their own.

    Somebody else's server counts as one device: it does not say how many it has. Where no teacher judges, the
    student's processes do.
    """
    sampler = config.sampler
    own = len(sampler.devices) or 1
    teachers = {config.teacher, *config.specialists.values()}
    served = [_served(teacher) for teacher in teachers] if teacher_judges else [0]
    return {
        "sample": num_processes if sampler.backend == "transformers" else own,
        "score": sum(served) + (num_processes if 0 in served else 0),
        "sync": num_processes,
        "train": num_processes,
    }


def _served(teacher: TeacherSettings) -> int:
    """Devices of a teacher's servers; 0 where it is in the student's processes."""
    if teacher.backend == "local":
        return 0
    judges = teacher.urls.score or (teacher.urls.generate if teacher.signal != "hidden" else ())
    return len(judges) or teacher.replicas * teacher.tensor_parallel * teacher.pipeline_parallel


def reproducible(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of metrics.jsonl holds besides times: the same when the run is made again."""
    timed = {"seconds", "busy", "device_seconds", "overlap_efficiency", "timeline"}
    return {
        name: value
        for name, value in row.items()
        if name.partition(".")[0] not in timed and name != "sampler.sync_seconds"
    }
