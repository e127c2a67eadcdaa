"""A teacher behind a vLLM pooling server: the same interface and the same exact signal as a teacher in this process.

The server returns the last hidden states, after the final norm; the teacher's ``lm_head``, loaded alone, makes logits
of them inside the loss. 8 to 10 KB a token travel instead of 151,936 log-probabilities. Every reply is checked before
use: a row for each token, the width, the number type, finite values, and the length that the final norm gives every
state, which states of another model or states that were scaled do not have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import torch
from torch import Tensor

from distill.checkpoint import Checkpoint, final_norm, lm_head
from distill.errors import DistillError
from distill.types import HiddenStates, Rollout
from distill.vllm.client import Client
from teachers.hearing import HearingTeacher, ScoringRequest

Wire = Literal["bf16", "fp32", "fp8"]
"""The number type in which hidden states travel. bf16 halves the bytes, and changes nothing where the model is bf16.
fp8 halves them again and is lossy: e4m3 without a scale, four significant bits and nothing beyond 448."""

REPLY_BYTES = 2 * 2**30
"""Most bytes of states in the replies under way at once, all servers together."""
NORM_TOLERANCE: dict[Wire, float] = {"bf16": 0.02, "fp32": 0.02, "fp8": 0.1}
"""Relative error of a state's length that rounding may cause."""

_WAY_OUT = "serve this teacher with `distill teacher serve --role score` (vLLM 0.32 or newer)"
_VLLM_NAME = {"bf16": "bfloat16", "fp32": "float32", "fp8": "fp8_e4m3"}
_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


class RemoteTeacher(HearingTeacher[Tensor]):
    """Scores rollouts with a model that a pooling server holds.

    ``dtype`` and ``device`` are those of the head and of the states that ``score`` returns.
    """

    def __init__(
        self, client: Client, checkpoint: Checkpoint, *, wire: Wire, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(client, self._ask)
        self.wire, self.name = wire, checkpoint.name
        self.dtype, self.device = dtype, device
        self.head_VD = lm_head(checkpoint, dtype).to(device)
        """The LM head's weight, [vocabulary, d]."""
        norm_D = final_norm(checkpoint)
        self._scale_D = torch.where(norm_D != 0, norm_D.float().square().reciprocal(), 0.0) / len(norm_D)
        """What squares of a state's entries are weighed by so that they come to one; see ``_check_length``."""
        # A weight of zero hides its share of the sum, which can then be anything up to one.
        self._hides = not bool(norm_D.all())

    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        """The last hidden states that predict each response token, rows P-1 .. P+R-2, in the order of ``rollouts``.

        Raises DistillError for a reply that cannot be the teacher's, StoppedError where no server answers.
        """
        return [
            HiddenStates(states_Rd.to(self.device, self.dtype), self.name)
            for states_Rd in self._hearing.answers(rollouts)
        ]

    async def _ask(self, request: ScoringRequest) -> list[Tensor]:
        inputs = request.inputs
        url, answer = await self.client.post(
            "/pooling",
            {
                "input": inputs,
                "task": "token_embed",
                "use_activation": False,
                "encoding_format": "bytes",
                "embed_dtype": _VLLM_NAME[self.wire],
                "endianness": "little",
            },
            load=request.num_tokens,
        )
        sequences = read_states(answer, [len(ids) for ids in inputs], width=len(self._scale_D), wire=self.wire, url=url)
        for states_Td in sequences:
            self._check_length(states_Td, url)
        return [
            # A copy, so that the rows of the prompts are not kept with those of the responses.
            states_Td[len(rollout.prompt_ids) - 1 :].clone()
            for states_Td, rollout in zip(sequences, request.rollouts, strict=True)
        ]

    def _check_length(self, states_Td: Tensor, url: str) -> None:
        """An RMS norm leaves rows whose root mean square is one once its weight is taken out."""
        # One product: a reply is checked on the core on which the student may be speaking.
        rms_T = (states_Td.float().square() @ self._scale_D).sqrt()
        tolerance = NORM_TOLERANCE[self.wire]
        low = 0.0 if self._hides else 1 - tolerance
        if not low <= float(rms_T.min()) <= float(rms_T.max()) <= 1 + tolerance:
            rms = float(rms_T[(rms_T - 1).abs().argmax()])
            raise DistillError(
                f"{url} returned states that the final norm of {self.name} does not make (root mean square {rms:.3g} "
                f"instead of 1): the server holds another model, or scales its states to unit length; start it with "
                f"`distill teacher serve --role score` for this teacher"
            )


def state_bytes(checkpoint: Checkpoint, wire: Wire) -> int:
    """Bytes of one token's state on the wire."""
    return checkpoint.shape.width * _DTYPE[wire].itemsize


def read_states(answer: httpx.Response, lengths: Sequence[int], *, width: int, wire: Wire, url: str) -> list[Tensor]:
    """The states [T, width] of every sequence in a reply of ``/pooling``, each checked against what was asked.

    Raises DistillError that says what the reply holds and what it should.
    """
    dtype = _DTYPE[wire]
    items = _items(answer, url)
    if len(items) != len(lengths):
        raise DistillError(
            f"{url} returned states of {len(items)} sequences and was asked for {len(lengths)}; {_WAY_OUT}"
        )
    needed = sum(lengths) * width * dtype.itemsize
    for item, length in zip(items, lengths, strict=True):
        if item.get("embed_dtype") != _VLLM_NAME[wire]:
            raise DistillError(
                f"{url} returned states in {item.get('embed_dtype')} and was asked for {_VLLM_NAME[wire]}; {_WAY_OUT}"
            )
        shape = item.get("shape")
        if shape != [length, width]:
            raise DistillError(
                f"{url} returned states of shape {shape} for a sequence of {length} tokens, and [{length}, {width}] is "
                f"what this teacher has; the server holds another model or cuts sequences off: {_WAY_OUT}"
            )
    body = bytearray(answer.content)
    if len(body) != needed:
        raise DistillError(f"{url} returned {len(body)} bytes of states and announced {needed}; {_WAY_OUT}")
    states_Nd = torch.frombuffer(body, dtype=dtype).view(-1, width)
    if wire == "fp8":
        states_Nd = states_Nd.to(torch.bfloat16)  # exact, and arithmetic exists for it
    # The sum is finite only if every number is, and is found many times faster.
    if not bool(states_Nd.sum().isfinite()) and not bool(states_Nd.isfinite().all()):
        row = int((~states_Nd.isfinite()).any(dim=1).nonzero()[0])
        raise DistillError(
            f"{url} returned states that are not finite (row {row} of {len(states_Nd)}): the teacher's numbers "
            f"overflow; serve it in bfloat16 or float32"
        )
    return list(states_Nd.split(list(lengths)))


def _items(answer: httpx.Response, url: str) -> list[dict[str, Any]]:
    """What the reply's header says of each sequence, in the order of the request."""
    try:
        items = sorted(json.loads(answer.headers["metadata"])["data"], key=lambda item: item["index"])
        starts = [item["start"] for item in items]
        ends = [item["end"] for item in items]
    except (KeyError, TypeError, ValueError):
        raise DistillError(f"{url} answered /pooling without a readable metadata header; {_WAY_OUT}") from None
    if starts != [0, *ends[:-1]][: len(items)]:
        raise DistillError(
            f"{url} returned blocks of states that do not follow each other (they start at {starts}); {_WAY_OUT}"
        )
    return items
