"""A teacher that is asked about the very tokens the student chose: the log-probabilities of k ids a position.

vLLM's ``/inference/v1/generate`` scores given ids along a prompt (``prompt_logprob_token_ids``, the rows from
``prompt_logprob_start`` on) and returns one array, so that only rows of the response are computed and travel, 4 bytes a
number. It needs a server with ``--enable-scale-out`` and vLLM's V2 model runner, which exists for GPUs: one without is
refused by name.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError, UserError
from distill.topk import tail_of
from distill.types import Rollout, TopK
from distill.vllm.client import Client, Job
from distill.vllm.refusal import RefusedError, document_of
from teachers.logprobs import check_logprobs
from teachers.reduced import Choose
from teachers.teacher import DeafTeacher

_Question = tuple[int, Rollout, Tensor]
"""A rollout's place in the caller's order, the rollout, and the ids [R, k] that are asked about."""


class ChosenTeacher(DeafTeacher):
    """Scores the ids that ``choose`` names; signals are ``TopK``.

    It hears nothing: what is asked about a response is known when all have been spoken.
    """

    head_VD: None = None

    def __init__(self, client: Client, *, name: str, choose: Choose, device: torch.device) -> None:
        self.client, self.name, self.choose, self.device = client, name, choose, device

    def score(self, rollouts: Sequence[Rollout]) -> list[TopK]:
        """In the order of ``rollouts``; a row for each response token, in float32.

        Raises UserError for a server that does not offer it, DistillError for a reply that is wrong, StoppedError
        where no server answers.
        """
        signals: dict[int, TopK] = {}
        jobs = [
            Job((place, rollout, ids_RK), len(rollout.prompt_ids) + len(rollout.response_ids))
            for place, (rollout, ids_RK) in enumerate(zip(rollouts, self.choose(rollouts), strict=True))
        ]
        for (place, _, _), signal in self.client.each(jobs, self._ask):
            signals[place] = signal
        return [signals[place] for place in range(len(rollouts))]

    async def _ask(self, question: _Question) -> TopK:
        _, rollout, ids_RK = question
        body = {
            "token_ids": [*rollout.prompt_ids, *rollout.response_ids],
            "sampling_params": {
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprob_token_ids": ids_RK.tolist(),
                # The row that predicts the first response token.
                "prompt_logprob_start": len(rollout.prompt_ids) - 1,
            },
        }
        load = len(rollout.prompt_ids) + len(rollout.response_ids)
        try:
            url, answer = await self.client.post("/inference/v1/generate", body, load=load)
        except RefusedError as refusal:
            _explain(refusal, ids_RK.shape[1])
        logprobs_RK = torch.from_numpy(_read(document_of(answer, url), tuple(ids_RK.shape), url)).to(self.device)
        check_logprobs(logprobs_RK, url)
        return TopK(ids_RK.to(self.device), logprobs_RK, tail_of(logprobs_RK))


def _explain(refusal: RefusedError, k: int) -> NoReturn:
    if "max allowed" in refusal.complaint:
        raise UserError(
            f"{refusal.url} gives fewer than teacher.top_k={k} log-probabilities a token ({refusal.complaint}); start "
            f"it with --max-logprobs {k}, or lower teacher.top_k"
        ) from None
    if "--enable-scale-out" in refusal.complaint:
        raise UserError(
            f"{refusal.url} is closed, and the signal chosen needs it; start the server with --enable-scale-out"
        ) from None
    if "prompt_logprob_token_ids" in refusal.complaint:
        raise UserError(
            f"{refusal.url} does not offer the signal chosen ({refusal.complaint}): it takes vLLM 0.32 or newer with "
            f"its V2 model runner, which exists for GPUs; set teacher.signal to hidden, which is exact, or to topk"
        ) from None
    raise refusal


def _read(document: Any, shape: tuple[int, ...], url: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The array of a reply, checked against what was asked."""
    try:
        encoded = document["prompt_token_id_logprobs"]
        array: np.ndarray[Any, Any] = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    except (KeyError, TypeError, ValueError, EOFError, binascii.Error):
        raise DistillError(
            f"{url} answered /inference/v1/generate without a readable array of log-probabilities; it has to be a vLLM "
            f"server (0.32 or newer)"
        ) from None
    if array.shape != shape or array.dtype != np.float32:
        raise DistillError(
            f"{url} returned log-probabilities {list(array.shape)} in {array.dtype} and was asked for {list(shape)} in "
            f"float32"
        )
    return array
