"""A speaker that is a vLLM engine in this process: requests become responses, one step of the engine after the other.

The same requests to an engine with the same weights and an empty prefix cache give the same bits: nothing but their
order decides how they are batched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from distill import interrupt
from distill.encode import Encoder
from distill.sampler import OnFinished
from distill.types import Request, Rollout
from distill.vllm.engine import Engine
from distill.vllm.segments import Question, Segment, SegmentedResponse, refuse_unsupported, to_read


class EngineSampler:
    """Turns requests into responses, at most ``width`` of them under way at once."""

    def __init__(self, engine: Engine, encoder: Encoder, *, speaker: str, width: int) -> None:
        self.engine, self.encoder, self.speaker, self.width = engine, encoder, speaker, width
        self.vocabulary = engine.launch.checkpoint.shape.vocabulary
        self.weight_version = 0
        """Stamped on the rollouts."""
        self.model: str | None = None
        """The engine's own, the only one."""

    def ready(self) -> None:
        """Have the engine started."""
        self.engine.start()

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """One rollout a request, in the order of the requests; ``on_finished`` sees each as soon as it ends.

        Raises DistillError for an answer that is none.
        """
        for request in requests:
            refuse_unsupported(request)
        growing = [SegmentedResponse(request, self.encoder) for request in requests]
        rollouts: dict[int, Rollout] = {}

        def follow(place: int, segment: Segment) -> Question | None:
            response = growing[place]
            response.append(segment)
            if response.finish_reason is None:
                return response.next_question()
            rollouts[place] = response.rollout(self.speaker, self.weight_version)
            if on_finished is not None:
                on_finished(rollouts[place])
            return None

        self._converse([response.next_question() for response in growing], follow)
        return [rollouts[place] for place in range(len(requests))]

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token but the first of each sequence, given those before it."""
        found: dict[int, list[float]] = {}

        def note(place: int, segment: Segment) -> None:
            found[place] = segment.prompt_logprobs

        self._converse([to_read(sequence) for sequence in sequences], note)
        return [found[place] for place in range(len(sequences))]

    def forget_prefixes(self) -> None:
        """Empty the engine's prefix cache."""
        self.engine.forget_prefixes()

    def _converse(self, first: Sequence[Question], follow: Callable[[int, Segment], Question | None]) -> None:
        """Ask the ``first`` questions, and after each answer whatever ``follow`` makes of it, until it is None."""
        self.engine.start()
        waiting = deque(enumerate(first))
        try:
            while waiting or self.engine.num_asked:
                while waiting and self.engine.num_asked < self.width:
                    self.engine.ask(*waiting.popleft())
                interrupt.check()
                for place, segment in self.engine.step():
                    following = follow(place, segment)
                    if following is not None:
                        self.engine.ask(place, following)
        finally:
            self.engine.drop()
