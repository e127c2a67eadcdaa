"""What of a stage's steps runs beside what, as ``pipelines.batches`` has it, and how long a step is by the clock.

At staleness 0 a step samples, has the responses judged and learns. A teacher behind servers judges what has ended while
the rest is still being spoken; one in the student's processes, or one that the student has to ask (``chosen``), judges
when all has been said. At staleness 1 the next batch is spoken meanwhile, and a step is as long as whoever takes
longest: the sampler, the teacher's servers, or the trainer with all that it does itself. A sampler on the trainer's
own GPU takes turns with it there.

The first batch of a stage is waited for in every case, and behind the last one nobody speaks. Responses are taken to
end one after the other: where all end at once, a step takes at least half of sampling, scoring and training together.
This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.costs import CostRole
from pipelines.layouts import Layout, own_devices

DOING: dict[CostRole, str] = {
    "student_sample": "sampling",
    "teacher_score": "scoring",
    "student_score": "rescoring",
    "student_train": "training",
}
"""What a step does, in the order in which it does it where nothing overlaps."""


@dataclass(frozen=True, slots=True)
class Step:
    """How the ``num`` steps of a stage follow each other.

    ``seconds`` are those of one behind which another comes, ``hidden`` those of each role, in all steps together, that
    pass while something longer goes on; ``order`` says in words what was taken to run beside what.
    """

    stage: str
    num: int
    seconds: float
    hidden: Mapping[CostRole, float]
    order: str


def step_of(stage: str, spent: Mapping[CostRole, float], num: int, layout: Layout) -> Step:
    """Of a stage in which the student speaks; ``spent`` are each role's seconds in all of its ``num`` steps."""
    each = {role: spent[role] / num for role in DOING if role in spent}
    is_ahead = layout.config.sampler.staleness == 1
    judges_apart = layout.teacher.backend == "vllm" and layout.config.teacher.signal != "chosen"
    apart: list[CostRole] = ["teacher_score"] if judges_apart and "teacher_score" in each else []
    own = [role for role in each if role not in ("student_sample", *apart)]
    if not is_ahead:
        # Rescoring asks the student, and what the teacher says is collected behind it.
        spoken: list[CostRole] = ["student_sample", *(role for role in own if apart and role == "student_score")]
        beside = [spoken, apart] if apart else [spoken]
        then = [role for role in own if role not in spoken]
        hidden = _hidden(each, beside, num)
        return Step(stage, num, _longest(each, beside) + _sum(each, then), hidden, _in_words(beside, then))
    # A sampler without devices of its own takes turns with the trainer.
    has_own = own_devices(layout.config, on_gpu=layout.student_pool.device.kind == "gpu")
    lanes = [["student_sample"], own] if has_own else [["student_sample", *own]]
    lanes += [apart] if apart else []
    hidden = _hidden(each, lanes, num - 1)
    # The first batch is judged while it is spoken, and nothing is trained on yet.
    for role, seconds in _hidden(each, [["student_sample"], apart], 1).items() if apart else ():
        hidden[role] = hidden.get(role, 0.0) + seconds
    return Step(stage, num, _longest(each, lanes), hidden, _in_words(lanes, (), is_ahead=True))


def _sum(each: Mapping[CostRole, float], roles: Sequence[CostRole]) -> float:
    return sum(each[role] for role in roles)


def _longest(each: Mapping[CostRole, float], lanes: Sequence[Sequence[CostRole]]) -> float:
    return max(_sum(each, lane) for lane in lanes)


def _hidden(each: Mapping[CostRole, float], lanes: Sequence[Sequence[CostRole]], num: int) -> dict[CostRole, float]:
    """Seconds of all that stands in another lane than the longest, ``num`` times."""
    longest = max(lanes, key=lambda lane: _sum(each, lane))
    return {role: num * each[role] for lane in lanes if lane is not longest for role in lane}


def _in_words(beside: Sequence[Sequence[CostRole]], then: Sequence[CostRole], *, is_ahead: bool = False) -> str:
    """``sampling beside scoring, then training``."""
    names = DOING | ({"student_sample": "sampling the next batch"} if is_ahead else {})
    lanes = [" and ".join(names[role] for role in lane) for lane in beside]
    return ", then ".join([" beside ".join(lanes), *(names[role] for role in then)])
