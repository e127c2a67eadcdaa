"""Where a run stands, and its checkpoints: written on the way, taken up by a run that is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill.costs import CostAccount, CostRole
from distill.journal import Journal, StoredTensors, read_json, write_json
from distill.progress import say
from pipelines.meter import Meter
from students.ranks import Ranks
from students.student import Student

STEP_ROLES = ("student_sample", "teacher_score", "student_score", "verify", "student_train")
"""Roles whose costs belong to optimiser steps: on a resume they go back to the checkpoint, with the steps."""


@dataclass
class Position:
    """Where a run stands: ``step`` finished steps in stage number ``stage``, ``global_step`` in all."""

    stage: int = 0
    step: int = 0
    global_step: int = 0


class Savepoints:
    """The checkpoints of one run. ``export`` writes the student, with the given weights, as a plain checkpoint."""

    def __init__(
        self,
        journal: Journal,
        student: Student,
        meter: Meter,
        ranks: Ranks,
        *,
        export: Callable[[Path, dict[str, Tensor]], None],
    ) -> None:
        self.journal, self.student, self.meter, self.ranks, self.export = journal, student, meter, ranks, export
        self._moments: Mapping[str, Tensor] = {}
        """What the optimiser had at the checkpoint that this process resumes from."""

    def write(self, position: Position, stage: str, *, stage_end: bool) -> None:
        """Put one down, after a step of the stage called ``stage`` or at its end."""
        assert self.student.optimiser is not None
        weights = self.student.weights()
        tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"optimiser/{name}": tensor for name, tensor in self.student.optimiser.state().items()}
        state = {
            "stage": position.stage + stage_end,
            "step": 0 if stage_end else position.step,
            "stage_end": stage_end,
            "stage_name": stage,
            "costs": self.meter.account.state(),
        }
        with self.ranks.together():
            self.journal.write_checkpoint(
                position.global_step, state, tensors, lambda folder: self.export(folder, weights)
            )
            self.write_costs()

    def resume(self) -> Position:
        """Take up the newest checkpoint: weights, moments, costs; drop the metrics of steps that are done again."""
        costs_file = self.journal.path / "costs.json"
        account = CostAccount.from_json(read_json(costs_file)) if costs_file.exists() else CostAccount()
        found = self.journal.last_checkpoint()
        state, step_costs = (
            ({}, CostAccount()) if found is None else (found[0], CostAccount.from_state(found[0]["costs"]))
        )
        self.meter.account.entries = {
            role: stages for role, stages in account.entries.items() if not _is_of_steps(role)
        } | {role: stages for role, stages in step_costs.entries.items() if _is_of_steps(role)}
        self.meter.account.peak_bytes = account.peak_bytes
        if found is None:
            self.journal.keep_steps(0)
            return Position()
        file = found[1] / "training.safetensors"
        self.student.load_weights(StoredTensors(file, "weights/"))
        if not state["stage_end"]:
            self._moments = StoredTensors(file, "optimiser/")
        self.journal.keep_steps(state["global_step"], ended=state["stage_name"] if state["stage_end"] else None)
        say(f"resuming after step {state['global_step']} ({state['stage_name']})")
        return Position(state["stage"], state["step"], state["global_step"])

    def give_back_moments(self) -> None:
        """To the optimiser of the stage in which the run was resumed, once."""
        if self._moments:
            assert self.student.optimiser is not None
            self.student.optimiser.load_state(self._moments)
            self._moments = {}

    def write_costs(self) -> None:
        if self.ranks.is_main:
            write_json(self.journal.path / "costs.json", self.meter.account.to_json())


def _is_of_steps(role: CostRole) -> bool:
    return role.partition(".")[0] in STEP_ROLES
