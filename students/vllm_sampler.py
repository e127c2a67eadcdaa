"""The student through vLLM: new weights are sent before it speaks, and checked to have arrived.

vLLM's own ways to take new weights have left wrong ones without a word, and a run on stale or broken weights looks like
one that learns badly. So after each transfer a few probe sequences are scored by both, token by token, and two things
stop the run with both numbers: a difference above the tolerance, and scores of the sampler that stood still while the
trainer's moved. In bfloat16 the first lets many lost transfers pass, the second none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distill.sampler import OnFinished
from distill.seeding import derive
from distill.types import Prompt, Request, Rollout, Sampling
from students.ranks import ALONE, Ranks
from students.rescoring import rescore
from students.sleep import Sleep
from students.student import Student
from students.weight_sync import WeightsError, WeightSync

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""The largest difference in log-probability of one token between two implementations of the same weights."""
NUM_PROBES, PROBE_TOKENS = 4, 32
_OTHERS = "set another sampler.sync or sampler.place, or sampler.backend to transformers and sampler.staleness to 0"
MOVED_SHARE = 0.5
"""The trainer's weights have moved where the scores of more than this share of the probes' tokens are others.

A few weights that change in bfloat16's last digit may change the scores of two probes by the rounding of one
implementation, and none by the other's. Where more than half changed on one side, a sixth or more did on the other.
"""


@dataclass(frozen=True, slots=True)
class Gap:
    """Where trainer and sampler differ most: their log-probabilities of one token of one probe."""

    probe: int
    token: int
    trainer: float
    sampler: float

    @property
    def size(self) -> float:
        return abs(self.trainer - self.sampler)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the probes' tokens but the first of each, [NUM_PROBES, PROBE_TOKENS - 1] by either."""

    trainer: NDArray[np.float64]
    sampler: NDArray[np.float64]

    def gap(self) -> Gap:
        """The largest difference, or one that is not finite."""
        sizes = np.abs(self.trainer - self.sampler)
        probe, token = np.unravel_index(np.where(np.isfinite(sizes), sizes, np.inf).argmax(), sizes.shape)
        trainer, sampler = float(self.trainer[probe, token]), float(self.sampler[probe, token])
        return Gap(int(probe), int(token) + 1, trainer, sampler)

    def stood_still(self, since: Scores) -> bool:
        """Whether the sampler's scores are the very numbers of ``since``, and the trainer's are not."""
        moved = self.trainer != since.trainer
        return bool(moved.mean() > MOVED_SHARE and np.array_equal(self.sampler, since.sampler))


class Speaker(Protocol):
    """A vLLM that speaks with whatever weights it has: a server, or an engine in this process."""

    vocabulary: int
    weight_version: int
    model: str | None
    """The name of the model that speaks; None where there is one alone, or the server's own."""

    def ready(self) -> None: ...

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]: ...

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...

    def forget_prefixes(self) -> None: ...


class Keeping:
    """A sampler with weights of its own, and a block in which it takes no others."""

    _keeps = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block no weights are sent: it speaks, and its responses are stamped, as it stands."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False


class VllmSampler(Keeping):
    """Samples ``student`` through ``vllm``, which gets its weights by ``sync``.

    With ``sleep`` that rests whenever it has answered, and takes the weights anew before it speaks again.
    ``tolerance`` is in nats, for one token. The probes are sequences of random tokens: every row of the embeddings and
    every layer counts, and a checkpoint that was not trained yet has no responses of its own.

    Several processes (``ranks``) share one server: the main process sends and checks for all, the others wait for it
    and then ask for themselves. Whenever the student has changed, all of them call ``take_weights`` or ``generate``.
    """

    def __init__(
        self,
        student: Student,
        vllm: Speaker,
        sync: WeightSync,
        *,
        tolerance: float,
        sleep: Sleep | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        assert sleep is None or ranks.count == 1, "nobody knows when the last of several processes has its answers"
        self.student, self.vllm, self.sync, self.tolerance = student, vllm, sync, tolerance
        self.sleep, self.ranks = sleep, ranks
        self.weight_version = 0
        self.probes = _probes(vllm.vocabulary)
        self._synced: int | None = None
        self._gap: float | None = None
        self._moved: Scores | None = None
        """Those of the last transfer that changed the sampler's: steps that change next to nothing add up."""
        self._facts: dict[str, float] = {}

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """Raises WeightsError where vLLM does not hold the student's weights after they were sent."""
        if not self._keeps:
            self.take_weights()
        rollouts = self.vllm.generate(requests, on_finished)
        if self.sleep is not None:
            self.sleep.begin()
            self._synced = None
        return rollouts

    def take_weights(self) -> Mapping[str, float]:
        """The gap of the weights that it speaks with, in nats, on the process that checks them.

        Raises WeightsError where vLLM does not hold the student's weights after they were sent.
        """
        if self._synced != self.student.num_changes:
            with self.ranks.together():
                if self.ranks.is_main:
                    self._bring_up_to_date()
            self.vllm.model = self.ranks.from_main(self.vllm.model)
            self._synced = self.student.num_changes
        self.vllm.weight_version = self.weight_version
        return {} if self._gap is None else {"sampler.gap": self._gap}

    def facts(self) -> Mapping[str, float]:
        """The gap after the last transfer, in nats, and the transfer's seconds, the check among them."""
        facts, self._facts = self._facts, {}
        return facts

    def _bring_up_to_date(self) -> None:
        if self._gap is None:
            # What the trainer holds in reserve is not free to a vLLM that starts on its GPU.
            torch.cuda.empty_cache()
        self.vllm.ready()  # its start is not the transfer's time
        started = time.perf_counter()
        if self.sleep is not None:
            self.sleep.wake_weights()
        self.vllm.model = self.sync.send()
        if self.sleep is not None:
            self.sleep.wake_cache()
        # What the old weights made of a prompt is no use to the new ones.
        self.vllm.forget_prefixes()
        scores = self._scores()
        gap = scores.gap()
        if not gap.size <= self.tolerance:  # NaN is no agreement
            raise WeightsError(
                f"the sampler does not hold the student's weights after they were sent (step {self.weight_version}): "
                f"it gives token {gap.token} of probe {gap.probe} the log-probability {gap.sampler:.6f}, the trainer "
                f"gives it {gap.trainer:.6f}; the gap of {gap.size:.2g} is above sampler.tolerance {self.tolerance:g}; "
                f"{self._way_out(gap)}"
            )
        if self._moved is not None and scores.stood_still(self._moved):
            change = np.abs(scores.trainer - self._moved.trainer).max()
            raise WeightsError(
                f"the sampler does not hold the student's weights after they were sent (step {self.weight_version}): "
                f"since an earlier transfer the trainer's log-probabilities of the probes' tokens have changed by up "
                f"to {change:.2g}, the sampler's by exactly 0; {_OTHERS}"
            )
        if self._moved is None or not np.array_equal(scores.sampler, self._moved.sampler):
            self._moved = scores
        self._gap = gap.size
        self._facts = {"sampler.gap": gap.size, "sampler.sync_seconds": time.perf_counter() - started}

    def _way_out(self, gap: Gap) -> str:
        if self.student.dtype == torch.bfloat16 and np.isfinite(gap.size):
            return f"where the rounding of bfloat16 alone explains it, raise sampler.tolerance; otherwise {_OTHERS}"
        return _OTHERS

    def _scores(self) -> Scores:
        said = self.vllm.read([probe.prompt_ids + probe.response_ids for probe in self.probes])
        trained = [scored.token_R.tolist() for scored in rescore(self.student, self.probes)]
        return Scores(np.array(trained), np.array(said))


def _probes(vocabulary: int) -> list[Rollout]:
    """Sequences as responses that begin after their first token: the shape in which the trainer scores."""
    draw = np.random.default_rng(derive(0, "probes"))
    found = []
    for _ in range(NUM_PROBES):
        first, *rest = draw.integers(vocabulary, size=PROBE_TOKENS).tolist()
        request = Request(Prompt(()), "no_think", "hard", (first,), Sampling(PROBE_TOKENS), 0)
        blank = (0.0,) * len(rest)
        found.append(Rollout(request, tuple(rest), (False,) * len(rest), blank, "length", "probe"))
    return found
