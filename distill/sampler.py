"""Drawing responses: a decoding loop over a transformers model that returns what a trainer needs.

``generate`` of transformers returns no log-probabilities of the untouched distribution, cannot force the early-stop
string into a row, has no presence penalty, draws from one global random stream, pads every row to the longest prompt,
and decodes finished rows to the end. This loop does each of these, with the model's own forward pass and a cache of
our own. It batches continuously: a row that has ended makes room for a request that waits, whose prompt is read in the
same pass that decodes the others. A response depends on its request and the weights alone (up to rounding): every
request draws from a random stream of its own.

Shapes: B rows decoded together, V vocabulary rows, T tokens of one pass, d the model's width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from distill import interrupt
from distill.attention import PACKED, Packing, attention_keywords
from distill.draw import Draw
from distill.errors import NonFiniteError
from distill.fused_body import fused_body
from distill.kv_cache import Decoding, Group, SlotCache, arranged, groups_of, kernels
from distill.packed_linears import packed_linears
from distill.replay import replays, rounded_rows
from distill.response import Response
from distill.types import Request, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.encode import Encoder

SETTLE_SHARE = 1 / 32
"""Rows that have ended leave the batch, and others take their places, when they are this share of it."""
PREFILL_TOKENS = 8192
"""Most prompt tokens that are read in one pass, beyond the first prompt."""

OnFinished = Callable[[Rollout], None]


class Sampler(Protocol):
    """Whoever turns requests into responses."""

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """One rollout a request, in the order of the requests; ``on_finished`` sees each as soon as it ends."""
        ...


class StudentSampler(Sampler, Protocol):
    """A sampler of the model that is trained. It speaks with the weights that the model has when it is asked.

    ``weight_version`` counts the run's steps behind these weights, and is stamped on the rollouts.
    """

    weight_version: int

    def take_weights(self) -> Mapping[str, float]:
        """Take the model's weights as they are now, where it has none of its own yet or the model's have changed.

        What is known of the weights that it speaks with then, as metrics of the batch that they speak.
        """
        ...

    def facts(self) -> Mapping[str, float]:
        """Metrics of its own, of the time since it was asked for them last."""
        ...


class IndependentSampler(StudentSampler, Protocol):
    """A sampler whose weights are a copy, so that it can speak while the model is trained."""

    def keeping(self) -> AbstractContextManager[None]:
        """A block in which it speaks with the weights that it took last, whatever becomes of the model's."""
        ...


class TransformersSampler:
    """Decodes with a transformers causal language model in this process.

    At most ``batch`` rows are decoded together, and no more than their limits of ``cache_tokens`` allow.
    ``weight_version`` is stamped on the rollouts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        speaker: str,
        batch: int = 256,
        cache_tokens: int = 131072,
    ) -> None:
        self.model = model
        self.model.set_attn_implementation(PACKED)
        self.encoder = encoder
        self.speaker = speaker
        self.batch = batch
        self.cache_tokens = cache_tokens
        self.weight_version = 0

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        training = self.model.training
        rollouts: dict[int, Rollout] = {}
        self.model.eval()
        try:
            with closing(self._decode(requests)) as responses:
                for response in responses:
                    rollout = response.rollout(self.speaker, self.weight_version)
                    rollouts[response.index] = rollout
                    if on_finished is not None:
                        on_finished(rollout)
        finally:
            self.model.train(training)
        return [rollouts[index] for index in range(len(requests))]

    def take_weights(self) -> Mapping[str, float]:
        """Nothing: there is one copy of the weights."""
        return {}

    def facts(self) -> Mapping[str, float]:
        """None: there is one copy of the weights."""
        return {}

    def _decode(self, requests: Sequence[Request]) -> Generator[Response, None, None]:
        """Every request's response, as soon as it has ended."""
        responses = [Response(request, self.encoder, index=place) for place, request in enumerate(requests)]
        batch = _Batch(self.model, self.speaker)
        queue = _Queue(responses, self.batch, self.cache_tokens, batch.num_slots)
        try:
            while True:
                interrupt.check()
                batch.settle(queue)
                if not batch.responses:
                    return
                yield from batch.step()
        finally:
            batch.close()


class _Queue:
    """The responses that wait for a place in the batch, of ``most_rows`` rows and ``most_tokens`` at their limits.

    ``num_slots`` says how many slots of the cache so many rows take.
    """

    def __init__(
        self, responses: Sequence[Response], most_rows: int, most_tokens: int, num_slots: Callable[[int], int]
    ) -> None:
        # Who may speak longest begins: what is left for the end, when few rows are decoded together, is short.
        self._waiting = deque(sorted(responses, key=lambda response: -response.request.sampling.max_new_tokens))
        self._most_rows, self._most_tokens, self._num_slots = most_rows, most_tokens, num_slots
        self.has_more = False
        """Whether there was room for more of them than one pass should read."""

    def take(self, staying: Sequence[Response]) -> list[Response]:
        """As many as there is room for beside those who stay."""
        taken: list[Response] = []
        longest = max((response.limit for response in staying), default=0)
        num_tokens = 0
        self.has_more = False
        while self._waiting and len(staying) + len(taken) < self._most_rows:
            first = self._waiting[0]
            longest = max(longest, first.limit)
            num_rows = len(staying) + len(taken) + 1
            if num_rows > 1 and self._num_slots(num_rows) * longest > self._most_tokens:
                break
            if not (taken and first.request.prompt_ids == taken[-1].request.prompt_ids):
                num_tokens += len(first.request.prompt_ids)
            if taken and num_tokens > PREFILL_TOKENS:
                self.has_more = True
                break
            taken.append(self._waiting.popleft())
        # The longest first, as the cache likes them; samples of one prompt stay beside each other.
        return sorted(taken, key=lambda response: -len(response.request.prompt_ids))


class _Batch:
    """The responses that are decoded together; each one's keys and values are in the slot of its place."""

    def __init__(self, model: PreTrainedModel, speaker: str) -> None:
        self.speaker, self.responses = speaker, list[Response]()
        # Asked for once: looking these up takes longer than many an operation on a row.
        self._body, self._head = cast(nn.Module, model.get_decoder()), cast(nn.Module, model.get_output_embeddings())
        self._device, self._dtype = model.device, model.dtype
        self._vocabulary = int(model.config.vocab_size)
        self._packed = packed_linears(model)
        self._fused = fused_body(model, self._packed)
        self._cache = SlotCache()
        self._replays = replays(model, self._cache, self._decode)
        self._draw = Draw.of([], self._vocabulary, self._device)
        # Of the responses whose prompts have been read, the first ones: the newest token, and where it belongs.
        self._token_B = self._place_B = torch.empty(0, dtype=torch.long, device=self._device)
        self._lengths: list[int] = []
        """Places of each slot that the next pass fills or looks at."""
        self._longest = 0
        """The most places that a response can come to need."""

    def settle(self, queue: _Queue) -> None:
        """Lets those go that have ended and others take their places, if it is worth it."""
        staying = [slot for slot, response in enumerate(self.responses) if not response.finished]
        num_ended = len(self.responses) - len(staying)
        if self.responses and not queue.has_more and num_ended < max(1, SETTLE_SHARE * len(self.responses)):
            return
        order = arranged([self._lengths[slot] for slot in staying], self._cache.worth())
        sources = [staying[place] for place in order]
        self._lengths = [self._lengths[slot] for slot in sources]
        self._cache.move(sources, self._lengths)
        source_B = torch.tensor(sources, dtype=torch.long, device=self._device)
        self._token_B, self._place_B = self._token_B[source_B], self._place_B[source_B]
        self.responses = [self.responses[slot] for slot in sources]
        new = queue.take(self.responses)
        self.responses += new
        self._lengths += [response.length for response in new]
        samplings = [response.request.sampling for response in self.responses]
        self._draw = self._draw.followed_by(samplings, source_B, self._vocabulary)
        self._longest = max((response.limit for response in self.responses), default=0)

    def step(self) -> Iterator[Response]:
        """One token more for every response; those that it ends."""
        logits_BV = self._logits()
        if not logits_BV.amax().isfinite():
            raise NonFiniteError(f"the {self.speaker}'s logits are not finite: its weights are broken or diverged")
        uniform_B = torch.tensor([response.uniform() for response in self.responses], device=logits_BV.device)
        token_B, logprob_BV = self._draw(logits_BV, uniform_B)
        for place, response in enumerate(self.responses):
            if response.pending:
                token_B[place] = response.pending[0]
        logprob_B = logprob_BV.gather(1, token_B[:, None])[:, 0]
        self._draw.remember(token_B)
        self._token_B = token_B
        for response, token, logprob in zip(self.responses, token_B.tolist(), logprob_B.tolist(), strict=True):
            # One that has ended is decoded on until the batch settles, and nobody looks.
            if not response.finished:
                response.append(token, logprob)
                if response.finished:
                    yield response

    def num_slots(self, num_rows: int) -> int:
        """Of the cache, for so many rows."""
        return num_rows if self._replays is None else rounded_rows(num_rows)

    def close(self) -> None:
        """Give up what is held on the device beside tensors."""
        if self._replays is not None:
            self._replays.close()
            # It knows this batch, which holds the cache: they would wait for the garbage collector.
            self._replays = None

    def _logits(self) -> Tensor:
        """Logits [B, V] in fp32 of each response's next token, from one pass over what the model has not seen yet."""
        num_decoding = len(self._token_B)
        prompts = [response.request.prompt_ids for response in self.responses[num_decoding:]]
        self._cache.reserve(self.num_slots(len(self._lengths)), max(self._lengths), most_places=self._longest)
        if self._replays is not None and not prompts:
            hidden_Bd, next_B = self._replays.hidden(self._token_B, self._place_B, self._lengths), self._place_B + 1
        else:
            tokens = _Tokens.of(self._token_B, self._place_B, prompts)
            groups = groups_of(self._lengths[:num_decoding], self._cache.worth())
            hidden_Bd = self._pass(tokens, self._place_B, groups)[tokens.last_B]
            next_B = tokens.position_T[tokens.last_B] + 1
        # Those that have ended stay in the last place there is; no other row comes so far.
        self._place_B = next_B.clamp(max=self._longest - 1)
        self._lengths = [min(length + 1, self._longest) for length in self._lengths]
        with self._products():
            logits_BV: Tensor = self._head(hidden_Bd)
        return logits_BV.float()

    def _products(self) -> AbstractContextManager[None]:
        """Within it the model's products are made as they are made fastest."""
        return nullcontext() if self._packed is None else self._packed.in_use()

    def _decode(self, token_B: Tensor, place_B: Tensor, groups: Sequence[Group]) -> Tensor:
        """Last hidden states [B, d] of one new token of each slot."""
        return self._pass(_Tokens.of(token_B, place_B, []), place_B, groups)

    def _pass(self, tokens: _Tokens, place_B: Tensor, groups: Sequence[Group]) -> Tensor:
        """Last hidden states [T, d]; the first tokens are new ones of slots under way, at ``place_B``."""
        self._cache.expect(tokens.slot_W, tokens.place_W, tokens.source_W)
        decoding = Decoding.of(self._cache, groups, place_B, self._dtype)
        if self._fused is not None:
            return self._fused(tokens.id_T, tokens.position_T, decoding, tokens.packing)
        with kernels(self._device), self._products():
            hidden_Td: Tensor = self._body(
                input_ids=tokens.id_T[:, None],
                position_ids=tokens.position_T[:, None],
                past_key_values=self._cache,
                use_cache=True,
                **attention_keywords(self._device, packing=tokens.packing, decoding=decoding),
            ).last_hidden_state[:, 0]
        return hidden_Td


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What one pass reads, side by side: the newest token of each response under way, then the prompts that join.

    ``last_B`` is the token of each response after which it goes on. Token ``source_W[n]`` belongs into place
    ``place_W[n]`` of slot ``slot_W[n]``: a prompt that neighbours share is read once, and written to each one's slot.
    """

    id_T: Tensor
    position_T: Tensor
    last_B: Tensor
    slot_W: Tensor
    place_W: Tensor
    source_W: Tensor
    packing: Packing | None

    @classmethod
    def of(cls, token_B: Tensor, place_B: Tensor, prompts: Sequence[tuple[int, ...]]) -> _Tokens:
        device, num_decoding = token_B.device, len(token_B)
        slot_B = torch.arange(num_decoding, device=device)
        if not prompts:
            return cls(token_B, place_B, slot_B, slot_B, place_B, slot_B, None)
        ids: list[int] = []
        last: list[int] = []
        read: list[tuple[int, ...]] = []
        for prompt in prompts:
            if not (read and read[-1] == prompt):
                read.append(prompt)
                ids += prompt
            last.append(num_decoding + len(ids) - 1)

        def behind(of_decoding: Tensor, of_prompts: Iterable[int]) -> Tensor:
            return torch.cat((of_decoding, torch.tensor(list(of_prompts), device=device)))

        slots = [slot for slot, prompt in enumerate(prompts, start=num_decoding) for _ in prompt]
        places = [place for prompt in prompts for place in range(len(prompt))]
        sources = [end + 1 + back for end, prompt in zip(last, prompts, strict=True) for back in range(-len(prompt), 0)]
        return cls(
            id_T=behind(token_B, ids),
            position_T=behind(place_B, (place for prompt in read for place in range(len(prompt)))),
            last_B=behind(slot_B, last),
            slot_W=behind(slot_B, slots),
            place_W=behind(place_B, places),
            source_W=behind(slot_B, sources),
            packing=Packing.of([len(prompt) for prompt in read], device),
        )
