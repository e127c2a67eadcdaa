"""What a hired teacher really is: checks that ask it, where ``pipelines.preflight`` reads what it says of itself.

A few responses of the teacher, from the store or fresh, are scored. Their log-probabilities, as whoever spoke them
reported them, must be those that the judge's states and the trainer's own copy of the LM head give now; a server that
holds other weights than the checkpoint's, another model of the same width or states that were scaled does not pass.
Every server that somebody else runs is asked alone: one replica of several may be the stale one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill.chat import switch_in
from distill.encode import Encoder
from distill.errors import DistillError, UserError
from distill.types import (
    MODES,
    Advantage,
    HiddenStates,
    Prompt,
    Request,
    Rollout,
    SampledLogprobs,
    Sampling,
    Signal,
    TopK,
)
from pipelines.preflight import CHECKS, Finding, skipped

if TYPE_CHECKING:
    from torch import Tensor

    from distill.checkpoint import Checkpoint
    from pipelines.hiring import Hired

NUM_PROBES = 4
PROBE_TOKENS = 32
"""Longest response that is drawn for a probe."""
PROBE_TEMPERATURE = 2.0
"""Probes are drawn hot: where a model is certain every log-probability is near zero, with the wrong weights as well. At
this temperature weights that are a tenth off move them 40 times as far as at 1, rounding to 16 bits 20 times as far."""
MOST_TOKENS = 256
"""Of a longer response only the first tokens are scored."""
REFERENCE_BYTES = 2**30
"""Weights of at most this size are loaded into this process and compared with what a server computes."""

EXACT_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 0.1
"""Differences that pass, in float32 all the way and where 16 bits are on the way: the mean of log-probabilities' in
nats, and the relative one of hidden states. Rounding the embedded teacher to bfloat16 makes about 0.015 of either."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A teacher to ask: ``said`` are responses of its own by where they come from, ``needed`` the longest sequence."""

    checkpoint: Checkpoint
    hired: Hired
    said: Mapping[str, Sequence[Rollout]]
    needed: int

    @property
    def rollouts(self) -> list[Rollout]:
        return [_head(rollout) for rollouts in self.said.values() for rollout in rollouts]

    @property
    def tolerance(self) -> float:
        return EXACT_TOLERANCE if self.hired.is_exact else ROUNDED_TOLERANCE


Ask = Callable[[Probe], str]


def refuse_unknown(skip: Collection[str]) -> None:
    """Raises UserError, naming the nearest, for a name that is no check's."""
    known = (*CHECKS, *PROBES)
    for name in skip:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"there is no check {name!r} to skip; did you mean {near}? Known: {', '.join(known)}")


def probe_requests(prompts: Sequence[Prompt], encoder: Encoder, *, max_new_tokens: int) -> list[Request]:
    """What a teacher is asked for: short and unlikely answers in both modes."""
    return [
        encoder.request(
            prompt,
            mode=prompt.mode or switch_in(prompt.messages) or MODES[number % len(MODES)],
            switch="hard" if switch_in(prompt.messages) is None else "soft",
            sampling=Sampling(min(PROBE_TOKENS, max_new_tokens), temperature=PROBE_TEMPERATURE),
            seed=number,
        )
        for number, prompt in enumerate(prompts)
    ]


def ask_teacher(probe: Probe, *, names: Collection[str] | None = None, skip: Collection[str]) -> Iterator[Finding]:
    """What every check of ``PROBES`` (or those of ``names``) found. Raises UserError at the first that fails."""
    teacher = probe.checkpoint.name
    for name, ask in PROBES.items():
        if names is None or name in names:
            yield skipped(name, teacher) if name in skip else Finding(name, teacher, ask(probe))


def check_repeat(probe: Probe) -> str:
    """Scored together and each alone, the same tokens have the same log-probabilities."""
    gaps = []
    for where in probe.hired.judged_at:
        alone = [logprobs_R for rollout in probe.rollouts for logprobs_R in _judged(probe, where, [rollout])]
        gaps.append(_Gap.between(_judged(probe, where, probe.rollouts), alone))
        if gaps[-1].mean > probe.tolerance:
            raise UserError(
                f"{where} scores the same tokens differently each time ({gaps[-1]}; rounding makes at most "
                f"{probe.tolerance} in the mean): its numbers depend on what else it is asked. Start it with another "
                f"dtype or attention backend, or go on with --skip-preflight repeat"
            )
    worst = max(gaps, key=lambda gap: gap.mean)
    return f"scored twice: {worst}" + (", more than rounding should make" if 10 * worst.mean > probe.tolerance else "")


def check_servers(probe: Probe) -> str:
    """The servers that somebody else runs take the longest prompt and response together."""
    clients = [client for client in (*probe.hired.judged_at.values(), *probe.hired.spoken_at.values()) if client]
    limits = {replica.url: replica.longest for client in clients for replica in client.replicas}
    limits = {url: longest for url, longest in limits.items() if url in probe.hired.foreign}
    for url, longest in limits.items():
        if longest is not None and longest < probe.needed:
            raise UserError(
                f"{url} takes {longest} tokens, and this run's longest prompt and response together are "
                f"{probe.needed}; start it with --max-model-len {probe.needed}, or lower max_prompt_tokens or "
                f"the longest of stages.*.sampling.*.max_new_tokens and evaluation.sampling.*.max_new_tokens"
            )
    known = [longest for longest in limits.values() if longest is not None]
    if not limits:
        return "none that somebody else runs"
    return f"{probe.needed} tokens at most" + (f", within {min(known)}" if known else ", and they do not say how many")


def check_weights(probe: Probe) -> str:
    """What a server computes is what the checkpoint's weights give in this process, where they are small enough."""
    from distill.checkpoint import load_model
    from teachers.local import LocalTeacher

    if all(client is None for client in probe.hired.judged_at.values()):
        return "the weights are in this process"
    num_bytes = sum(file.stat().st_size for file in set(probe.checkpoint.weight_files.values()))
    if num_bytes > REFERENCE_BYTES:
        told = "".join(f"; {url} says that it serves {model}" for url, model in _served(probe).items())
        return f"{num_bytes / 1e9:.0f} GB are too large to be loaded here for a comparison; see responses{told}"
    import torch

    model = load_model(probe.checkpoint, torch.float32, "cpu")
    reference = LocalTeacher(model, name=probe.checkpoint.name, batch_tokens=4096)
    expected = reference.score(probe.rollouts)
    found = []
    for where in probe.hired.judged_at:
        found.append(_distance(probe, _score(probe, where, probe.rollouts), expected, reference.head_VD))
        if found[-1].value > probe.tolerance:
            raise UserError(
                f"{where} does not hold the weights of {probe.checkpoint.name}: {found[-1]} off what "
                f"{probe.checkpoint.path} gives, and rounding makes at most {probe.tolerance}; start it again from "
                f"this checkpoint, or name the one that it serves with --teacher"
            )
    return f"{max(found, key=lambda distance: distance.value)} off the checkpoint in this process"


def _served(probe: Probe) -> dict[str, str]:
    """The name that each server which judges gives its model, by URL."""
    clients = [client for client in probe.hired.judged_at.values() if client is not None]
    replicas = [replica for client in clients for replica in client.replicas]
    return {replica.url: replica.model for replica in replicas if replica.model is not None}


def check_responses(probe: Probe) -> str:
    """The log-probabilities that came with the teacher's responses are those that its judge gives them now."""
    gaps = []
    for where in probe.hired.judged_at:
        for source, rollouts in probe.said.items():
            heads = [_head(rollout) for rollout in rollouts]
            reported = [_tensor(rollout.logprobs) for rollout in heads]
            gaps.append(_Gap.between(_judged(probe, where, heads), reported))
            if gaps[-1].mean > probe.tolerance:
                raise UserError(
                    f"what {where} makes of responses from {source} is not what was reported when they were spoken "
                    f"({gaps[-1]}; rounding makes at most {probe.tolerance} in the mean): one of the two holds other "
                    f"weights than {probe.checkpoint.name}. Start both again from this checkpoint; where the stored "
                    f"responses are the wrong ones, remove their collection (`distill responses ls`) or name another "
                    f"--store"
                )
    return f"{max(gaps, key=lambda gap: gap.mean)} from what was reported ({' and '.join(probe.said)})"


PROBES: dict[str, Ask] = {
    "repeat": check_repeat,
    "servers": check_servers,
    "weights": check_weights,
    "responses": check_responses,
}
"""The catalogue, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class _Distance:
    """How far a judge is from the checkpoint, and in what that was measured."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


def _distance(probe: Probe, signals: Sequence[Signal], expected: Sequence[HiddenStates], head_VD: Tensor) -> _Distance:
    """In the states themselves where the judge gives them: that says more than the probabilities of some tokens."""
    import torch

    states = [signal.states_Rd.float().cpu() for signal in signals if isinstance(signal, HiddenStates)]
    if len(states) < len(signals):
        gap = _Gap.between(_logprobs(signals, probe.rollouts, None), _logprobs(expected, probe.rollouts, head_VD))
        return _Distance(gap.mean, str(gap))
    states_Nd, expected_Nd = torch.cat(states), torch.cat([signal.states_Rd for signal in expected])
    error = float((states_Nd - expected_Nd).norm() / expected_Nd.norm())
    return _Distance(error, f"hidden states {error:.2g} of their size")


@dataclass(frozen=True, slots=True)
class _Gap:
    """How far two sets of log-probabilities of the same tokens are from each other, in nats."""

    mean: float
    largest: float
    num_tokens: int

    @classmethod
    def between(cls, one: Sequence[Tensor], other: Sequence[Tensor]) -> _Gap:
        """Of the tokens that both know (NaN where one does not)."""
        import torch

        gap_N = (torch.cat(list(one)) - torch.cat(list(other))).abs()
        gap_N = gap_N[~gap_N.isnan()]
        return cls(float(gap_N.mean()), float(gap_N.max()), len(gap_N)) if len(gap_N) else cls(0.0, 0.0, 0)

    def __str__(self) -> str:
        if not self.num_tokens:
            return "nothing (the signal holds none of the probes' tokens)"
        return f"{self.mean:.2g} nats in the mean, {self.largest:.2g} at most, of {self.num_tokens} tokens"


def _score(probe: Probe, where: str, rollouts: Sequence[Rollout]) -> Sequence[Signal]:
    """What the judge says. A reply that is refused is for the user to mend where somebody else runs the server."""
    try:
        return probe.hired.judge_at(where, rollouts)
    except DistillError as error:
        if where in probe.hired.foreign and error.exit_code == 1:
            raise UserError(str(error)) from error
        raise


def _judged(probe: Probe, where: str, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """The log-probabilities [R] of the response tokens that the judge's signal gives now."""
    return _logprobs(_score(probe, where, rollouts), rollouts, probe.hired.judge.head_VD)


def _logprobs(signals: Sequence[Signal], rollouts: Sequence[Rollout], head_VD: Tensor | None) -> list[Tensor]:
    """Log-probabilities [R] of the response tokens; of hidden states with the trainer's own copy of the head.

    NaN for a token that is none of those the signal holds.
    """
    import torch

    found = []
    for rollout, signal in zip(rollouts, signals, strict=True):
        ids_R1 = torch.tensor(rollout.response_ids)[:, None]
        match signal:
            case HiddenStates():
                assert head_VD is not None
                logprobs_RV = (signal.states_Rd.float() @ head_VD.float().T).log_softmax(dim=-1)
                found.append(logprobs_RV.gather(1, ids_R1.to(logprobs_RV.device))[:, 0].cpu())
            case TopK():
                is_said_RK = signal.ids_RK.cpu() == ids_R1
                logprobs_R = (signal.logprobs_RK.float().cpu() * is_said_RK).nan_to_num(0.0).sum(dim=1)
                found.append(torch.where(is_said_RK.any(dim=1), logprobs_R, torch.nan))
            case SampledLogprobs():
                found.append(signal.logprobs_R.float().cpu())
            case Advantage():
                raise AssertionError("no teacher gives an advantage")
    return found


def _tensor(values: Sequence[float]) -> Tensor:
    import torch

    return torch.tensor(values)


def _head(rollout: Rollout) -> Rollout:
    """The response's first tokens."""
    cut = slice(MOST_TOKENS)
    return replace(
        rollout,
        response_ids=rollout.response_ids[cut],
        forced=rollout.forced[cut],
        logprobs=rollout.logprobs[cut],
    )
