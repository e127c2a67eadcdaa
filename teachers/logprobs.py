"""Teachers whose servers somebody else started to generate: log-probabilities of the prompt's tokens, as JSON.

A response is sent as part of the prompt of ``/v1/completions``, and vLLM's ``prompt_logprobs`` asks for the
log-probabilities of each of its tokens and of the k most probable ones. All rows are computed and travel, those of the
prompt too; the ones of the response are kept. Every reply is checked before use: an entry for each token that names
this very token, k others, finite values, probabilities that sum to one at most.

Left out on purpose: servers with the plain interface of OpenAI. ``echo`` with ``logprobs`` gives the most probable
tokens as text there, and different ids can have the same text; such a server is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, UserError
from distill.topk import tail_of
from distill.types import Rollout, SampledLogprobs, Signal, TopK
from distill.vllm.client import Client
from distill.vllm.refusal import RefusedError, document_of
from teachers.hearing import HearingTeacher, ScoringRequest

MASS_TOLERANCE = 0.01
"""How far above one the probabilities of distinct tokens may sum, by rounding of a 16-bit teacher."""


class LogprobTeacher(HearingTeacher[Signal]):
    """Scores rollouts with a server that generates.

    ``k`` most probable tokens are asked for: signals are ``TopK``. With 0 it is the sampled token alone, and signals
    are ``SampledLogprobs``. ``vocabulary`` is the student's number of rows.
    """

    head_VD: None = None

    def __init__(self, client: Client, *, name: str, vocabulary: int, k: int, device: torch.device) -> None:
        super().__init__(client, self._ask)
        self.name, self.vocabulary, self.k, self.device = name, vocabulary, k, device

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        """In the order of ``rollouts``; a row for each response token, in float32.

        Raises UserError for a server that cannot give the signal, DistillError for a reply that is none, StoppedError
        where no server answers.
        """
        return self._hearing.answers(rollouts)

    async def _ask(self, request: ScoringRequest) -> list[Signal]:
        sequences = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in request.rollouts]
        body = {
            "prompt": sequences,
            "prompt_logprobs": self.k,
            # Something has to be said; one token, the most probable one, is the least.
            "max_tokens": 1,
            "temperature": 0.0,
            "add_special_tokens": False,
        }
        try:
            url, answer = await self.client.post("/v1/completions", body, load=request.num_tokens)
        except RefusedError as refusal:
            if "logprobs" in refusal.complaint and "max allowed" in refusal.complaint:
                raise UserError(
                    f"{refusal.url} gives fewer than teacher.top_k={self.k} log-probabilities a token "
                    f"({refusal.complaint}); start it with --max-logprobs {self.k}, or lower teacher.top_k"
                ) from None
            raise
        found = _entries(document_of(answer, url), sequences, url)
        return [
            self._signal(entries[len(rollout.prompt_ids) :], rollout.response_ids, url)
            for entries, rollout in zip(found, request.rollouts, strict=True)
        ]

    def _signal(self, entries: Sequence[Any], said: Sequence[int], url: str) -> Signal:
        rows = [_row(entry, token, self.k, url) for entry, token in zip(entries, said, strict=True)]
        logprobs_RK = torch.tensor([list(row.values()) for row in rows], device=self.device)
        check_logprobs(logprobs_RK, url)
        if self.k == 0:
            return SampledLogprobs(logprobs_RK[:, 0])
        ids_RK = torch.tensor([list(row) for row in rows], device=self.device)
        if int(ids_RK.max()) >= self.vocabulary:
            raise DistillError(
                f"{url} returned token ids beyond the {self.vocabulary} rows of the vocabulary (up to "
                f"{int(ids_RK.max())}); it holds another model"
            )
        order_RK = logprobs_RK.argsort(stable=True, dim=-1, descending=True)
        logprobs_RK = logprobs_RK.gather(-1, order_RK)
        return TopK(ids_RK.gather(-1, order_RK), logprobs_RK, tail_of(logprobs_RK))


def check_logprobs(logprobs_RK: Tensor, url: str) -> None:
    """Raise DistillError for numbers that cannot be log-probabilities of distinct tokens."""
    if not bool(logprobs_RK.isfinite().all()):
        raise DistillError(f"{url} returned log-probabilities that are not finite: the teacher's numbers overflow")
    mass = float(logprobs_RK.double().exp().sum(-1).max())
    if mass > 1 + MASS_TOLERANCE:
        raise DistillError(
            f"{url} returned numbers that are no log-probabilities (the probabilities of one token's alternatives sum "
            f"to {mass:.3g}); start it with --logprobs-mode raw_logprobs"
        )


def _entries(document: Any, sequences: Sequence[Sequence[int]], url: str) -> list[list[Any]]:
    """What a reply says of every token of every sequence, in the order in which they were sent."""
    try:
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        found = [choice.get("prompt_logprobs") for choice in choices]
    except (KeyError, TypeError, AttributeError):
        raise DistillError(f"{url} answered /v1/completions with a document that has no choices") from None
    if any(entries is None for entries in found):
        raise UserError(
            f"{url} does not answer prompt_logprobs, so it is no vLLM server and cannot give the signals topk and "
            f"sampled: with echo, the plain interface names alternatives by their text, which does not tell ids apart; "
            f"serve the teacher with vLLM"
        )
    lengths = [len(entries) for entries in found]
    if lengths != [len(sequence) for sequence in sequences]:
        raise DistillError(
            f"{url} returned log-probabilities of {lengths} tokens and was asked for "
            f"{[len(sequence) for sequence in sequences]}"
        )
    return found


def _row(entry: Any, token: int, k: int, url: str) -> dict[int, float]:
    """The k most probable ids of one position with their log-probabilities; with k 0, the token's own.

    vLLM puts the token that stands there into the entry, whether it is among the k or not.
    """
    try:
        row = {int(name): float(fact["logprob"]) for name, fact in entry.items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise DistillError(f"{url} returned an entry of prompt_logprobs that cannot be read: {entry!r:.200}") from None
    if token not in row:
        raise DistillError(f"{url} returned log-probabilities of another token than the {token} it was sent")
    if k and len(row) == k + 1:
        del row[token]
    if len(row) != max(1, k):
        raise DistillError(
            f"{url} returned {len(row)} log-probabilities of one token, and was asked for the {k} most probable ones"
        )
    return row
