"""A speaker behind a vLLM server: requests become responses over /v1/completions, token ids both ways.

The thinking budget is kept here, the way ``distill.sampler`` keeps it: the response is asked for in segments, and where
thinking is open at the budget, the early-stop string is appended as forced tokens and the answer is asked for.
A response depends on its request and the weights alone, but not on the same random numbers as in this process: the
same request has another response here, drawn from the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from distill.encode import Encoder
from distill.errors import DistillError, UserError
from distill.sampler import OnFinished
from distill.seeding import derive
from distill.types import FinishReason, Request, Rollout
from distill.vllm.client import Client, Job


class RemoteSampler:
    """Turns requests into responses through servers that were started to generate.

    ``vocabulary`` is the model's number of rows; ``width`` of the client is the number of responses under way at once.
    """

    def __init__(self, client: Client, encoder: Encoder, *, speaker: str, vocabulary: int) -> None:
        self.client, self.encoder, self.speaker, self.vocabulary = client, encoder, speaker, vocabulary
        self.weight_version = 0
        """Stamped on the rollouts."""
        self.model: str | None = None
        """The name of the model to ask for; None is the server's own, others are adapters of it."""

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """One rollout a request, in the order of the requests; ``on_finished`` sees each as soon as it ends.

        Raises DistillError for a reply that does not answer what was asked, StoppedError where no server answers.
        """
        for request in requests:
            _refuse_unsupported(request)
        rollouts: dict[int, Rollout] = {}
        jobs = [Job((place, request), 1) for place, request in enumerate(requests)]
        for (place, _), rollout in self.client.each(jobs, self._ask):
            rollouts[place] = rollout
            if on_finished is not None:
                on_finished(rollout)
        return [rollouts[place] for place in range(len(requests))]

    async def _ask(self, numbered: tuple[int, Request]) -> Rollout:
        _, request = numbered
        response = _Response(request, self.encoder)
        while response.finish_reason is None:
            body = self._named(response.next_body())
            url, answer = await self.client.post(
                "/v1/completions",
                body,
                load=len(body["prompt"]) + body["max_tokens"],
                is_broken_off=_is_aborted,
            )
            segment = _read_segment(answer.json(), body, url=url, vocabulary=self.vocabulary)
            response.append(segment)
        return Rollout(
            request=request,
            response_ids=tuple(response.ids),
            forced=tuple(response.forced),
            logprobs=tuple(response.logprobs),
            finish_reason=response.finish_reason,
            speaker=self.speaker,
            weight_version=self.weight_version,
        )

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token but the first of each sequence, given those before it."""
        found: dict[int, list[float]] = {}
        jobs = [Job((place, sequence), 1) for place, sequence in enumerate(sequences)]
        for (place, _), logprobs in self.client.each(jobs, self._read):
            found[place] = logprobs
        return [found[place] for place in range(len(sequences))]

    async def _read(self, numbered: tuple[int, Sequence[int]]) -> list[float]:
        _, sequence = numbered
        body = self._named(
            {
                "prompt": list(sequence),
                "max_tokens": 1,
                "prompt_logprobs": 0,
                "logprobs": 0,
                "return_token_ids": True,
                "add_special_tokens": False,
                "temperature": 1.0,
                "stop_token_ids": [],
                "ignore_eos": True,
            }
        )
        url, answer = await self.client.post("/v1/completions", body, load=len(sequence) + 1, is_broken_off=_is_aborted)
        return _read_segment(answer.json(), body, url=url, vocabulary=self.vocabulary).prompt_logprobs

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self.model is None else {"model": self.model, **body}


@dataclass(frozen=True, slots=True)
class _Segment:
    """What one reply holds: sampled tokens, and the log-probabilities of the prompt's last tokens if asked for."""

    ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


@dataclass
class _Response:
    """One response while it grows, a segment at a time."""

    request: Request
    encoder: Encoder
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_segments: int = 0

    def next_body(self) -> dict[str, Any]:
        """What to ask for next: the tokens up to the budget, or all that are left."""
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
        return {
            "prompt": [*self.request.prompt_ids, *self.ids],
            "max_tokens": max(1, left),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": self.request.seed if self.num_segments == 0 else derive(self.request.seed, self.num_segments),
            "stop_token_ids": stops,
            # These alone: what the model's own files say of its end is no part of a request.
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            **({"prompt_logprobs": 0} if num_unscored else {}),
        }

    def append(self, segment: _Segment) -> None:
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
        marks = [token for token in self.ids if token in (self.encoder.think_open_id, self.encoder.think_close_id)]
        is_thinking = bool(marks) and marks[-1] == self.encoder.think_open_id
        return budget is not None and len(self.ids) >= budget and is_thinking


def _refuse_unsupported(request: Request) -> None:
    if request.sampling.presence_penalty and request.sampling.thinking_budget is not None:
        raise UserError(
            "vLLM cannot keep a presence penalty across a thinking budget (the penalty would forget what was said "
            "before the cut); set presence_penalty to 0 or thinking_budget to null, or sample in this process "
            "(teacher.backend=local, sampler.backend=transformers)"
        )


def _read_segment(document: Any, body: dict[str, Any], *, url: str, vocabulary: int) -> _Segment:
    """A reply of /v1/completions, checked against what was asked. Raises DistillError that says what is wrong."""
    prompt = body["prompt"]
    try:
        (choice,) = document["choices"]
        ids, said = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        num_said, last = len(said), ids[-1]
        reason, echoed = choice["finish_reason"], choice["prompt_token_ids"]
        prompt_logprobs = _prompt_logprobs(choice["prompt_logprobs"], prompt) if "prompt_logprobs" in body else []
    except (KeyError, IndexError, TypeError, ValueError):
        raise DistillError(
            f"{url} answered /v1/completions without token ids and their log-probabilities; it has to be a vLLM server "
            f"(0.32 or newer), not another one with the same interface"
        ) from None
    if echoed != prompt:
        raise DistillError(
            f"{url} answered another prompt than it was sent ({len(echoed or [])} tokens instead of {len(prompt)})"
        )
    if reason not in ("stop", "length"):
        raise DistillError(f"{url} ended a response for the reason {reason!r}, neither 'stop' nor 'length'")
    if len(ids) > body["max_tokens"] or len(ids) != num_said:
        raise DistillError(
            f"{url} returned {len(ids)} tokens and {num_said} log-probabilities, and was asked for up to "
            f"{body['max_tokens']} of both"
        )
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise DistillError(
            f"{url} returned token ids beyond the model's {vocabulary} rows (up to {max(ids)}); it holds another model"
        )
    if last not in body["stop_token_ids"] and (reason == "stop" or len(ids) < body["max_tokens"]):
        raise DistillError(
            f"{url} ended a response ({reason}) after {len(ids)} of {body['max_tokens']} tokens with token {last}, "
            f"and the stop tokens it was given are {body['stop_token_ids']}; does its --max-model-len hold the longest "
            f"prompt and response?"
        )
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in [*said, *prompt_logprobs]):
        raise DistillError(f"{url} returned log-probabilities that are not finite: the model's numbers overflow")
    return _Segment(ids, [float(value) for value in said], prompt_logprobs)


def _is_aborted(answer: httpx.Response) -> bool:
    """A server that is being ended aborts what it is saying."""
    return b'"finish_reason":"abort"' in answer.content


def _prompt_logprobs(entries: Any, prompt: Sequence[int]) -> list[float]:
    """The log-probability of each prompt token but the first, which nothing precedes."""
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], prompt[1:], strict=True)]
