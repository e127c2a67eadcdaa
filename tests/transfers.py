"""What is asked of every way by which the trainer's weights get to whoever speaks with them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from distill.types import Request
from students.student import Student
from students.vllm_sampler import VllmSampler, WeightsError


def train(student: Student, seed: int) -> None:
    """What an optimiser step does to whoever holds a copy of the weights, and more of it: in place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                # Adapters begin as ones that change nothing.
                scale = 0.02 * float(parameter.float().std()) if parameter.any() else 0.1
                parameter += (scale * torch.randn(parameter.shape, generator=draw)).to(parameter)
    student.num_changes += 1


def check_weights_that_never_left(learner: Student, speaker: VllmSampler, asked: Sequence[Request]) -> None:
    """They are caught; so the speaker has a copy, which does not learn behind our back."""
    speaker.generate(asked)

    class Nothing:
        def send(self) -> None:
            """A transfer that says it is done."""

    speaker.sync = Nothing()
    train(learner, 7)
    with pytest.raises(WeightsError, match="does not hold the student's weights"):
        speaker.generate(asked)
