"""What one examination found: scores with their intervals, rates, lengths and costs, by question and in slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from distill.costs import sequence_flops
from distill.family import Shape
from distill.types import Mode, Sampling, Switch
from eval.samples import Row
from eval.statistics import Estimate, Scores, estimate, pass_at_k_estimate

SLICED_BY = ("language", "domain")
"""Columns of a question by which its score is also given, where the questions have them."""


@dataclass(frozen=True, slots=True)
class Leakage:
    """Thinking where none was asked for: ``share`` of the responses that think, and the mean length of that thinking
    in tokens over all responses (0 where there is none)."""

    share: Estimate
    mean_length: float

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share.to_json(), "mean_length": self.mean_length}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Leakage:
        return cls(Estimate.from_json(document["share"]), document["mean_length"])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an examination found. Shares and lengths are over samples; lengths and counts are in response tokens.

    ``closure``: a thinking block was closed, by the response or by its prompt, and none opened again.
    ``truncation``: the token limit was reached.
    ``nonempty_thinking``: something is thought. ``num_unclosed`` responses ended while they were thinking, and
    ``num_broken`` could not be had, decoded or graded; both count as wrong. ``flops`` are those of one forward pass
    over prompts and responses, None where the model's shape was not given. ``metrics`` holds ``avg@K`` and, for K > 1
    samples a question, ``pass@k``. ``slices`` holds the first metric by language and by domain, where the questions
    have them. ``leakage`` is None in thinking mode.
    """

    checkpoint: str
    task: str
    mode: Mode
    settings_hash: str
    sampling: Sampling
    seed: int
    samples_per_question: int
    scores: Mapping[str, tuple[float, ...]]
    metrics: Mapping[str, Estimate]
    closure: float
    truncation: float
    nonempty_thinking: float
    mean_length: float
    mean_thinking_length: float
    num_broken: int
    num_tokens: int
    num_prompt_tokens: int
    flops: float | None
    seconds: float
    num_unclosed: int = 0
    switch: Switch = "hard"
    leakage: Leakage | None = None
    slices: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One object a metric, as in the ``scores`` of ``summary.json``; ``num_samples`` counts all responses.

        Those of an examination under a thinking budget name it as ``thinking_budget``.
        """
        return [self._entry(metric, result) for metric, result in self.metrics.items()]

    @property
    def slice_entries(self) -> list[dict[str, Any]]:
        """The first metric for each language and domain: entries with ``slice`` (the column) and ``value``."""
        metric = next(iter(self.metrics))
        return [
            {**self._entry(metric, result), "slice": column, "value": value}
            for column, found in self.slices.items()
            for value, result in found.items()
        ]

    def _entry(self, metric: str, result: Estimate) -> dict[str, Any]:
        budget = self.sampling.thinking_budget
        return {
            "checkpoint": self.checkpoint,
            "task": self.task,
            "mode": self.mode,
            "metric": metric,
            **result.entry,
            **({} if budget is None else {"thinking_budget": budget}),
        }

    def with_pass_at(self, pass_at: Sequence[int]) -> Self:
        """The same examination with pass@k for each of ``pass_at`` (empty: for k = the number of samples)."""
        return replace(self, metrics=_metrics(self.scores, self.samples_per_question, pass_at))

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; ``from_json`` gives an equal evaluation back."""
        return asdict(self) | {
            "scores": {key: list(row) for key, row in self.scores.items()},
            "metrics": [
                {**entry, "standard_error": result.standard_error}
                for entry, result in zip(self.entries, self.metrics.values(), strict=True)
            ],
            "leakage": None if self.leakage is None else self.leakage.to_json(),
            "slices": {
                column: {value: result.to_json() for value, result in found.items()}
                for column, found in self.slices.items()
            },
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        leakage = document.get("leakage")
        found = {
            "scores": {key: tuple(row) for key, row in document["scores"].items()},
            "metrics": {entry["metric"]: Estimate.from_json(entry) for entry in document["metrics"]},
            "sampling": Sampling(**document["sampling"]),
            "leakage": None if leakage is None else Leakage.from_json(leakage),
            "slices": {
                column: {value: Estimate.from_json(entry) for value, entry in values.items()}
                for column, values in document.get("slices", {}).items()
            },
        }
        return cls(**{**document, **found})


def summarise(
    rows: Sequence[Row],
    *,
    checkpoint: str,
    task: str,
    mode: Mode,
    switch: Switch,
    settings_hash: str,
    sampling: Sampling,
    seed: int,
    samples: int,
    pass_at: Sequence[int],
    shape: Shape | None,
) -> Evaluation:
    """The evaluation that the samples ``rows`` come to."""
    scores = _scores(rows, "correct")
    num_rows = len(rows)

    def share(values: list[bool]) -> float:
        return sum(values) / num_rows

    return Evaluation(
        checkpoint=checkpoint,
        task=task,
        mode=mode,
        settings_hash=settings_hash,
        sampling=sampling,
        seed=seed,
        samples_per_question=samples,
        scores=scores,
        metrics=_metrics(scores, samples, pass_at),
        closure=share([row["closed"] for row in rows]),
        truncation=share([row["finish_reason"] == "length" for row in rows]),
        nonempty_thinking=share([bool(row["thinking"].strip()) for row in rows]),
        mean_length=sum(row["num_tokens"] for row in rows) / num_rows,
        mean_thinking_length=sum(row["num_thinking_tokens"] for row in rows) / num_rows,
        num_broken=sum(row["broken"] for row in rows),
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_prompt_tokens=sum(row["num_prompt_tokens"] for row in rows),
        flops=None
        if shape is None
        else sum(sequence_flops(shape, row["num_prompt_tokens"], row["num_tokens"]) for row in rows),
        seconds=sum(row["seconds"] for row in rows),
        num_unclosed=sum(row["unclosed"] for row in rows),
        switch=switch,
        leakage=leakage(rows) if mode == "no_think" else None,
        slices={column: found for column in SLICED_BY if (found := _slices(rows, column))},
    )


def leakage(rows: Sequence[Row]) -> Leakage:
    """Of responses that were asked not to think (rows with prompt_id, thinking and num_thinking_tokens)."""
    leaks = [{**row, "leaks": bool(row["thinking"].strip())} for row in rows]
    num_leaked = sum(row["num_thinking_tokens"] for row in leaks if row["leaks"])
    return Leakage(estimate(_scores(leaks, "leaks")), num_leaked / len(rows))


def _metrics(scores: Scores, samples: int, pass_at: Sequence[int]) -> dict[str, Estimate]:
    ks = pass_at or ([samples] if samples > 1 else [])
    return {f"avg@{samples}": estimate(scores)} | {f"pass@{k}": pass_at_k_estimate(scores, k) for k in ks}


def _scores(rows: Sequence[Row], column: str) -> dict[str, tuple[float, ...]]:
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {key: tuple(row) for key, row in scores.items()}


def _slices(rows: Sequence[Row], column: str) -> dict[str, Estimate]:
    """The score by the column's values, in their order; questions without one are in no slice."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if row[column] is not None:
            parts.setdefault(row[column], []).append(row)
    return {value: estimate(_scores(parts[value], "correct")) for value in sorted(parts)}
