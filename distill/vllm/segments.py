"""A response through vLLM, a segment at a time: what to ask for next, and whether what came back answers it.

The thinking budget is kept here, the way ``distill.sampler`` keeps it: the response is asked for in segments, and where
thinking is open at the budget, the early-stop string is appended as forced tokens and the answer is asked for.
Neither a server's interface nor vLLM itself is known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import DistillError
from distill.response import Growing, is_thinking
from distill.seeding import derive
from distill.types import Request
from distill.vllm.limits import check_drawable

_MODELS_OWN: dict[str, Any] = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    # The stop tokens of a question alone: what the model's own files say of its end is no part of a request.
    "ignore_eos": True,
    "logprobs": 0,
}
"""What every question has: nothing changes the distribution but what the request says, and each token is scored."""


@dataclass(frozen=True, slots=True)
class Question:
    """What vLLM is asked for; ``sampling`` are the words of its SamplingParams."""

    prompt: list[int]
    sampling: dict[str, Any]

    @property
    def load(self) -> int:
        """The most tokens that are read and written for it."""
        return len(self.prompt) + int(self.sampling["max_tokens"])


@dataclass(frozen=True, slots=True)
class Segment:
    """An answer: sampled tokens, and the log-probability of each prompt token but the first if that was asked for."""

    ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def to_read(sequence: Sequence[int]) -> Question:
    """A question for the log-probability of each token but the first, given those before it."""
    # A token has to be said too; its seed keeps it from the engine's own random stream.
    sampling = {"max_tokens": 1, "temperature": 1.0, "seed": 0, "stop_token_ids": [], "prompt_logprobs": 0}
    return Question(list(sequence), {**_MODELS_OWN, **sampling})


@dataclass
class SegmentedResponse(Growing):
    """One that grows a segment at a time."""

    num_segments: int = 0

    def next_question(self) -> Question:
        """The tokens up to the budget, or all that are left."""
        sampling = self.request.sampling
        budget = sampling.thinking_budget
        stops = list(self.encoder.stop_ids)
        left = sampling.max_new_tokens - len(self.ids)
        if budget is not None and len(self.ids) < budget:
            left = min(left, budget - len(self.ids))
        elif budget is not None:
            # Past the budget, a thinking block that opens is closed at once.
            stops.append(self.encoder.think_open_id)
        # A response whose last tokens were forced is asked for one token more, for their log-probabilities alone.
        num_unscored = len(self.ids) - len(self.logprobs)
        return Question(
            [*self.request.prompt_ids, *self.ids],
            {
                **_MODELS_OWN,
                "max_tokens": max(1, left),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "presence_penalty": sampling.presence_penalty,
                "seed": self.request.seed if self.num_segments == 0 else derive(self.request.seed, self.num_segments),
                "stop_token_ids": stops,
                **({"prompt_logprobs": 0} if num_unscored else {}),
            },
        )

    def append(self, segment: Segment) -> None:
        self.num_segments += 1
        limit = self.request.sampling.max_new_tokens
        if num_unscored := len(self.ids) - len(self.logprobs):
            self.logprobs += segment.prompt_logprobs[-num_unscored:]
        if len(self.ids) == limit:
            self.finish_reason = "length"
            return
        self.ids += segment.ids
        self.logprobs += segment.logprobs
        self.forced += [False] * len(segment.ids)
        if segment.ids[-1] in self.encoder.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= limit:
            self.finish_reason = "length"
        elif self._thinks_past_budget():
            forced = self.encoder.early_stop_ids[: limit - len(self.ids)]
            self.ids += forced
            self.forced += [True] * len(forced)

    def _thinks_past_budget(self) -> bool:
        budget = self.request.sampling.thinking_budget
        if budget is None or len(self.ids) < budget:
            return False
        return is_thinking([*self.request.prompt_ids, *self.ids], self.encoder)


def refuse_unsupported(request: Request) -> None:
    """Raise UserError for a request that vLLM cannot answer."""
    check_drawable(
        request.sampling,
        where="a request",
        instead="sample in this process (teacher.backend=local, sampler.backend=transformers)",
    )


def checked(segment: Segment, reason: str | None, question: Question, *, who: str, vocabulary: int) -> Segment:
    """``segment``, which ended for ``reason``. Raises DistillError where it does not answer ``question``."""
    ids, num_said = segment.ids, len(segment.logprobs)
    most, stops = question.sampling["max_tokens"], question.sampling["stop_token_ids"]
    if reason not in ("stop", "length"):
        raise DistillError(f"{who} ended a response for the reason {reason!r}, neither 'stop' nor 'length'")
    if not 0 < len(ids) <= most or len(ids) != num_said:
        raise DistillError(
            f"{who} returned {len(ids)} tokens and {num_said} log-probabilities, and was asked for up to {most} of both"
        )
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise DistillError(
            f"{who} returned token ids beyond the model's {vocabulary} rows (up to {max(ids)}); it holds another model"
        )
    if (last := ids[-1]) not in stops and (reason == "stop" or len(ids) < most):
        raise DistillError(
            f"{who} ended a response ({reason}) after {len(ids)} of {most} tokens with token {last}, "
            f"and the stop tokens it was given are {stops}; does its --max-model-len hold the longest "
            f"prompt and response?"
        )
    logprobs = [*segment.logprobs, *segment.prompt_logprobs]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        raise DistillError(f"{who} returned log-probabilities that are not finite: the model's numbers overflow")
    return Segment(ids, [float(value) for value in segment.logprobs], segment.prompt_logprobs)
