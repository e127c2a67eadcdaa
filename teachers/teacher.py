"""What a judge is to everyone else, wherever its model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from distill.spans import Span
from distill.types import HiddenStates, Rollout, Signal


class Teacher(Protocol):
    """Says of every response token what its signal holds (``teacher.signal`` in a run's configuration)."""

    @property
    def name(self) -> str: ...

    @property
    def head_VD(self) -> Tensor | None:
        """The LM head's weight, [vocabulary, d], that makes logits of hidden states; None for other signals."""
        ...

    @property
    def hears(self) -> bool:
        """Whether a response that was heard of is judged in the background, so that ``score`` merely waits for it."""
        ...

    def hear(self, rollout: Rollout) -> None:
        """Take note of a response that has ended; it may be judged in the background from now on.

        What ``score`` returns does not depend on it.
        """
        ...

    def check(self) -> None:
        """Raise what went wrong in the background with what was heard since the last ``heard_all``."""
        ...

    def heard_all(self) -> None:
        """Nothing else of this batch is coming: whatever waits for company may be judged now."""
        ...

    def break_off(self) -> None:
        """The batch that is being spoken will not be whole: drop what was heard since the last ``heard_all``."""
        ...

    def forget(self) -> None:
        """Drop all that was heard: nobody is going to ask for it."""
        ...

    def worked(self) -> Sequence[Span]:
        """When it worked on what ``score`` gave since this was asked last, besides while ``score`` was called."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[Signal]:
        """One signal a rollout, in their order, with a row for each response token."""
        ...


class ExactTeacher(Teacher, Protocol):
    """Gives the exact signal: hidden states, and the head that makes its logits of them."""

    @property
    def head_VD(self) -> Tensor:
        """The LM head's weight, [vocabulary, d]."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        """The last hidden states (after the final norm) that predict each response token, rows P-1 .. P+R-2.

        In the order of ``rollouts``; each [R, d] in the head's dtype.
        """
        ...


class DeafTeacher:
    """One that begins to judge when it is asked, and not before."""

    hears = False

    def hear(self, rollout: Rollout) -> None:
        """Nothing is judged in the background."""

    def check(self) -> None:
        """Nothing goes wrong there."""

    def heard_all(self) -> None:
        """Nothing was kept."""

    def break_off(self) -> None:
        """Nothing was kept."""

    def forget(self) -> None:
        """Nothing was kept."""

    def worked(self) -> list[Span]:
        """None but while ``score`` is called."""
        return []
