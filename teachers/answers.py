"""A teacher's responses to many requests: looked up where they are stored, generated where they are missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import DistillError
from distill.progress import Bar, track
from distill.sampler import Sampler
from distill.types import Request, Rollout
from teachers.store import ResponseStore, TeacherIdentity, response_key

__all__ = ["Answers", "TeacherIdentity", "answer"]

STORE_SECONDS = 30.0
"""Of a chunk that takes longer, what is finished is stored now and then: the most work that a killed process loses."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The responses in the order of the requests, their keys in the store, and which ones cost nothing this time.

    ``reused`` is False for what was generated now, and for what an earlier, interrupted attempt of the same run
    generated: a run that is resumed counts the same costs as one that was never interrupted.
    """

    rollouts: tuple[Rollout, ...]
    keys: tuple[str, ...]
    reused: tuple[bool, ...]

    @property
    def paid(self) -> list[Rollout]:
        """What this run generated. A request that is there twice is answered, and paid for, once."""
        return self._different(reused=False)

    @property
    def num_reused(self) -> int:
        return len(self._different(reused=True))

    @property
    def num_generated(self) -> int:
        return len(self.paid)

    @property
    def reused_tokens(self) -> int:
        """Response tokens that were there."""
        return sum(len(rollout.response_ids) for rollout in self._different(reused=True))

    @property
    def generated_tokens(self) -> int:
        """Response tokens that this run paid for."""
        return sum(len(rollout.response_ids) for rollout in self.paid)

    def _different(self, *, reused: bool) -> list[Rollout]:
        """Those that cost nothing, or those that did, each of them once."""
        each = dict(zip(self.keys, zip(self.rollouts, self.reused, strict=True), strict=True))
        return [rollout for rollout, was_reused in each.values() if was_reused is reused]


def answer(
    requests: Sequence[Request],
    store: ResponseStore,
    sampler: Sampler,
    *,
    identity: TeacherIdentity,
    run: str = "",
    chunk: int = 256,
    description: str = "teacher responses",
) -> Answers:
    """The teacher's response to every request.

    What is missing is generated ``chunk`` requests at a time and stored after each chunk, every ``STORE_SECONDS``
    within it and when the sampler is stopped, so that an interrupted generation goes on where it was. What is returned
    is what the store holds, also where another process was faster. ``run`` labels what this run generates; give a
    resumed run the label it had.
    """
    keys = tuple(response_key(identity, request) for request in requests)
    kept = store.get(identity, requests)
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in kept}
    if missing:
        with track(description, len(keys), "responses", done=len(keys) - len(missing)) as bar:
            waiting = list(missing.values())
            for start in range(0, len(waiting), chunk):
                asked = waiting[start : start + chunk]
                _generate(asked, store, sampler, bar, identity=identity, run=run)
                # Read back: another process may have stored its response to the same request first.
                kept |= store.get(identity, asked)
        store.compact()
        lost = [key for key in keys if key not in kept]
        if lost:
            raise DistillError(
                f"the response store {store.root} does not give back what was just stored ({len(lost)} responses); "
                f"its disk may be failing: name another folder with --store or DISTILL_STORE"
            )
    return Answers(
        rollouts=tuple(kept[key].rollout for key in keys),
        keys=keys,
        reused=tuple(key not in missing and (not run or kept[key].run != run) for key in keys),
    )


def _generate(
    requests: Sequence[Request],
    store: ResponseStore,
    sampler: Sampler,
    bar: Bar,
    *,
    identity: TeacherIdentity,
    run: str,
) -> None:
    finished: list[Rollout] = []
    kept_at = time.monotonic()

    def keep() -> None:
        nonlocal kept_at
        store.put(identity, finished, run=run)
        finished.clear()
        kept_at = time.monotonic()

    def note(rollout: Rollout) -> None:
        finished.append(rollout)
        bar.advance()
        if time.monotonic() - kept_at >= STORE_SECONDS:
            keep()  # a process that is killed stores nothing any more

    try:
        sampler.generate(requests, note)
    finally:
        # Interrupted or not, what was finished is kept.
        keep()
