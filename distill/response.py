"""One response while it grows, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distill.chat import THINK_OPEN
from distill.types import FinishReason, Request, Rollout

if TYPE_CHECKING:
    from distill.encode import Encoder


def is_thinking(ids: Sequence[int], encoder: Encoder) -> bool:
    """Whether thinking is open behind ``ids``, a prompt and what was said so far.

    The last mark of the turn under way decides: some templates open the thinking in the prompt. What earlier turns
    hold, a question about the marks themselves for one, ended with them.
    """
    for token in reversed(ids):
        if token == encoder.think_open_id:
            return True
        if token == encoder.think_close_id or token in encoder.stop_ids:
            return False
    return False


def opening(rollout: Rollout, encoder: Encoder) -> str:
    """What to read before a response: the tag, where its prompt left the thinking open, else nothing.

    Without it thinking that never ends would be read as an answer.
    """
    return THINK_OPEN if is_thinking(rollout.prompt_ids, encoder) else ""


@dataclass
class Growing:
    """One response while it grows, in whichever pieces."""

    request: Request
    encoder: Encoder
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def rollout(self, speaker: str, weight_version: int) -> Rollout:
        assert self.finish_reason is not None
        return Rollout(
            request=self.request,
            response_ids=tuple(self.ids),
            forced=tuple(self.forced),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            speaker=speaker,
            weight_version=weight_version,
        )


@dataclass
class Response(Growing):
    """One that grows token by token; ``index`` is its request's place."""

    index: int = field(kw_only=True)
    thinking: bool = field(init=False)
    pending: list[int] = field(default_factory=list)
    """Tokens of the early-stop string that are still to be forced."""

    def __post_init__(self) -> None:
        self.thinking = is_thinking(self.request.prompt_ids, self.encoder)
        self._random = np.random.Generator(np.random.Philox(key=self.request.seed))
        self._uniforms: list[float] = []

    @property
    def length(self) -> int:
        """Tokens of prompt and response so far."""
        return len(self.request.prompt_ids) + len(self.ids)

    @property
    def limit(self) -> int:
        """The most tokens that prompt and response can have."""
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def uniform(self) -> float:
        """The next number of the request's own random stream."""
        if not self._uniforms:
            self._uniforms = self._random.random(64)[::-1].tolist()
        return self._uniforms.pop()

    def append(self, token: int, logprob: float) -> None:
        forced = bool(self.pending)
        if forced:
            self.pending.pop(0)
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.forced.append(forced)
        self._follow_thinking(token)
        if token in self.encoder.stop_ids and not forced:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _follow_thinking(self, token: int) -> None:
        budget = self.request.sampling.thinking_budget
        if token == self.encoder.think_open_id:
            self.thinking = True
        elif token == self.encoder.think_close_id:
            self.thinking = False
        if self.thinking and budget is not None and len(self.ids) >= budget and not self.pending:
            self.pending = list(self.encoder.early_stop_ids)
            self.thinking = False
