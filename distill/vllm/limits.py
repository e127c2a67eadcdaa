"""What vLLM can draw: said of a whole configuration before anything starts, and of a request before it is asked."""

from __future__ import annotations

from distill.errors import UserError
from distill.types import Sampling

COLDEST, HOTTEST = 0.01, 2.0
"""Temperatures that vLLM draws at: above them it refuses, and below them it takes the lowest without an error."""
LARGEST_PENALTY = 2.0


def check_drawable(sampling: Sampling, *, where: str, instead: str) -> None:
    """Raises UserError for what vLLM cannot draw. ``where`` is what it was asked in, ``instead`` what to set else."""
    if not COLDEST <= sampling.temperature <= HOTTEST:
        raise UserError(
            f"{where}: temperature is {sampling.temperature}, and vLLM draws at {COLDEST} to {HOTTEST}; set it to one "
            f"of these, or {instead}"
        )
    if not abs(sampling.presence_penalty) <= LARGEST_PENALTY:
        raise UserError(
            f"{where}: presence_penalty is {sampling.presence_penalty}, and vLLM's is at most {LARGEST_PENALTY} either "
            f"way; set it to one of these, or {instead}"
        )
    if sampling.presence_penalty and sampling.thinking_budget is not None:
        raise UserError(
            f"{where}: vLLM cannot keep a presence penalty across a thinking budget (the penalty would forget what was "
            f"said before the cut); set presence_penalty to 0 or leave out the budget, or {instead}"
        )
