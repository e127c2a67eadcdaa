"""The nouns every package shares. Read this file first.

The flow of one example, from prompt to gradient:

    Prompt --encode--> Request --speak--> Rollout --judge--> Example --collate--> rows of one loss

One record travels; parallel lists never do. Token ids are produced once (``Request.prompt_ids``,
``Rollout.response_ids``) and travel; text is never tokenised again between two hops.
This module imports neither torch nor transformers: a configuration can be read and printed without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["think", "no_think"]
"""Thinking or non-thinking, the two modes of every Qwen3 model."""

Switch = Literal["hard", "soft"]
"""How the mode is asked for: ``hard`` through the template (``enable_thinking``), ``soft`` by a flag in a message."""

FinishReason = Literal["stop", "length"]
"""Why a response ended: the model said a stop token, or the token limit was reached (the response is truncated)."""

MODES: tuple[Mode, ...] = ("think", "no_think")

COLDEST = 1e-6
"""The lowest temperature. The most probable token is certain there; logits divided by much less overflow."""

Message = Mapping[str, Any]
"""One turn of a conversation, as chat templates take it: at least ``role`` and ``content``."""


def content_hash(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``; equal content has an equal hash on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer.

    >>> prompt = Prompt(messages=({"role": "user", "content": "3+4="},), answer="7")
    >>> prompt.id[:8]
    'da955451'

    ``mode`` is None where the stage may choose; ``answer`` is the reference for grading, if there is one.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    mode: Mode | None = None
    language: str | None = None
    domain: str | None = None

    @property
    def id(self) -> str:
        """Content hash of the messages: the same question has the same id in every file and every run."""
        return content_hash([dict(message) for message in self.messages])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The defaults draw from the model's own distribution, as on-policy methods need.

    ``top_k`` 0 and ``top_p`` 1 leave the distribution whole. ``presence_penalty`` is subtracted once from the logit
    of every token that the response already holds. ``thinking_budget`` is the number of response tokens after which
    an open thinking block is closed by the early-stop string (forced tokens); None never forces.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    thinking_budget: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A rendered and tokenised prompt, ready for a sampler.

    ``seed`` alone decides the response (with the weights): neither the batch around it nor its place in it does.
    """

    prompt: Prompt
    mode: Mode
    switch: Switch
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """A request and the response that was spoken to it.

    ``response_ids`` include the stop token when one was sampled. ``forced`` marks tokens that were put there (the
    early-stop string) and are no samples of the speaker. ``logprobs`` are the speaker's log-probabilities of the
    response tokens at temperature 1 over the whole vocabulary, whatever the sampling was. All three have length R.

    >>> rollout.prompt_ids, rollout.response_ids      # P = 3 prompt rows, R = 2 response tokens
    ((11, 12, 13), (55, 2))

    The state that predicts response token i is row P-1+i of the whole sequence: rows P-1 .. P+R-2.
    """

    request: Request
    response_ids: tuple[int, ...]
    forced: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    speaker: str
    weight_version: int = 0

    def __post_init__(self) -> None:
        lengths = {len(self.response_ids), len(self.forced), len(self.logprobs)}
        assert len(lengths) == 1, f"a rollout's per-token fields differ in length: {lengths}"
        assert self.response_ids, "a response holds at least one token"

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def read_ids(self) -> tuple[int, ...]:
        """What a model reads to predict every response token, P+R-1: the row of the last would predict what follows."""
        return self.request.prompt_ids + self.response_ids[:-1]

    @property
    def mode(self) -> Mode:
        return self.request.mode

    @property
    def switch(self) -> Switch:
        return self.request.switch

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """True for the tokens that the speaker chose itself; forced tokens teach nothing about its policy."""
        return tuple(not forced for forced in self.forced)


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The exact signal: the teacher's last hidden states after the final norm, one row a response token.

    ``states_Rd`` is [R, d_teacher]; ``states_Rd @ lm_head.T`` are the teacher's logits for the response tokens.
    ``teacher`` names whose ``lm_head`` makes logits of them.
    """

    states_Rd: Tensor
    teacher: str


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's log-probabilities of k tokens a position, and the probability mass of all the others.

    The k are the teacher's most probable ones, or those that the student chose; they are distinct. ``ids_RK`` and
    ``logprobs_RK`` are [R, k]; ``tail_logprob_R`` is [R], log of one minus the sum of the k.
    """

    ids_RK: Tensor
    logprobs_RK: Tensor
    tail_logprob_R: Tensor


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """The teacher's log-probabilities of the response tokens, [R]."""

    logprobs_R: Tensor


@dataclass(frozen=True, slots=True)
class ActionLogprobs:
    """A policy's log-probabilities of response tokens, [R]: of the token itself, and of the action that it was.

    They differ at the response's end, where any of the family's stop tokens would have been the same action.
    """

    token_R: Tensor
    action_R: Tensor


@dataclass(frozen=True, slots=True)
class Advantage:
    """How much better a response was than the others of its group, and what its loss compares with.

    ``value`` holds for every token of the response. ``old`` is the policy before the first optimiser step on this
    batch; None where that is the policy that is trained. ``anchor`` is a distribution to stay near, if there is one.
    """

    value: float
    old: ActionLogprobs | None = None
    anchor: HiddenStates | None = None


Signal = HiddenStates | TopK | SampledLogprobs | Advantage


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout with what its judge said (None where nobody judges, as in off-policy distillation)."""

    rollout: Rollout
    signal: Signal | None = None
