"""A speaker behind a vLLM server: requests become responses over /v1/completions, token ids both ways.

A response depends on its request and the weights alone, but not on the same random numbers as in this process: the
same request has another response here, drawn from the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from distill.encode import Encoder
from distill.errors import DistillError
from distill.sampler import OnFinished
from distill.types import Request, Rollout
from distill.vllm.client import Client, Job, ask
from distill.vllm.refusal import document_of
from distill.vllm.segments import Question, Segment, SegmentedResponse, checked, refuse_unsupported, to_read


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

    def ready(self) -> None:
        """Have a server to ask."""
        self.client.before()

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """One rollout a request, in the order of the requests; ``on_finished`` sees each as soon as it ends.

        Raises DistillError for a reply that does not answer what was asked, StoppedError where no server answers.
        """
        for request in requests:
            refuse_unsupported(request)
        rollouts: dict[int, Rollout] = {}
        jobs = [Job((place, request), 1) for place, request in enumerate(requests)]
        for (place, _), rollout in self.client.each(jobs, self._speak):
            rollouts[place] = rollout
            if on_finished is not None:
                on_finished(rollout)
        return [rollouts[place] for place in range(len(requests))]

    async def _speak(self, numbered: tuple[int, Request]) -> Rollout:
        _, request = numbered
        response = SegmentedResponse(request, self.encoder)
        while response.finish_reason is None:
            response.append(await self._ask(response.next_question()))
        return response.rollout(self.speaker, self.weight_version)

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token but the first of each sequence, given those before it.

        One sequence after the other: the same weights say the same numbers then, whatever the server would have read
        together.
        """
        found = []
        for sequence in sequences:
            ((_, logprobs),) = self.client.each([Job(sequence, 1)], self._read)
            found.append(logprobs)
        return found

    async def _read(self, sequence: Sequence[int]) -> list[float]:
        return (await self._ask(to_read(sequence))).prompt_logprobs

    async def _ask(self, question: Question) -> Segment:
        body = {
            **({} if self.model is None else {"model": self.model}),
            "prompt": question.prompt,
            **question.sampling,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        url, answer = await self.client.post("/v1/completions", body, load=question.load, is_broken_off=_is_aborted)
        return _read_segment(document_of(answer, url), question, url=url, vocabulary=self.vocabulary)

    def forget_prefixes(self) -> None:
        """Empty the server's prefix cache. Raises DistillError where it keeps some of it."""
        # A question that nobody waits for any longer may still hold keys and values: they are computed anew.
        said = ask(self.client, "/reset_prefix_cache?reset_running_requests=true", {})
        if not said["success"]:
            raise DistillError("the student's server cannot empty its prefix cache; its log says why")


def _read_segment(document: Any, question: Question, *, url: str, vocabulary: int) -> Segment:
    """A reply of /v1/completions, checked against what was asked. Raises DistillError that says what is wrong."""
    prompt = question.prompt
    try:
        (choice,) = document["choices"]
        ids, said = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, echoed = choice["finish_reason"], choice["prompt_token_ids"]
        wants_prompt = "prompt_logprobs" in question.sampling
        prompt_logprobs = _prompt_logprobs(choice["prompt_logprobs"], prompt) if wants_prompt else []
        segment = Segment(list(ids), list(said), prompt_logprobs)
        _ = segment.ids[-1]
    except (KeyError, IndexError, TypeError, ValueError):
        raise DistillError(
            f"{url} answered /v1/completions without token ids and their log-probabilities; it has to be a vLLM server "
            f"(0.32 or newer), not another one with the same interface"
        ) from None
    if echoed != prompt:
        raise DistillError(
            f"{url} answered another prompt than it was sent ({len(echoed or [])} tokens instead of {len(prompt)})"
        )
    return checked(segment, reason, question, who=url, vocabulary=vocabulary)


def _is_aborted(answer: httpx.Response) -> bool:
    """A server that is being ended aborts what it is saying."""
    return b'"finish_reason":"abort"' in answer.content


def _prompt_logprobs(entries: Any, prompt: Sequence[int]) -> list[float]:
    """The log-probability of each prompt token but the first, which nothing precedes."""
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], prompt[1:], strict=True)]
