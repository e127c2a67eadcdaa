"""What a comparison comes to: each arm's scores over its seeds, paired differences, and compute against score.

Reads finished run directories alone. An arm is one way to go on from a start; its runs differ in their seed, and run n
of every arm has the same one. Scores are pooled over seeds and questions, since both were drawn (``eval.seeds``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.journal import read_json
from distill.progress import say
from distill.recipe import parse_yaml
from eval.curves import Curve, Point, compute_at_equal_score_over_seeds, score_at_compute
from eval.evaluation import Evaluation
from eval.seeds import pooled_difference, pooled_score, seeds_half_width
from eval.statistics import Scores, estimate, paired_difference, pass_at_k_scores

Key = tuple[str, str, str]
"""Task, mode and metric."""

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """Finished runs of one arm, a seed each, in the order of the seeds; ``stage`` is the one that makes the arm, and
    the checkpoint at its end is what is compared."""

    name: str
    stage: str
    folders: tuple[Path, ...]


def compare(arms: Sequence[Arm], *, headline: tuple[str, str] | None = None) -> Document:
    """The comparison of ``arms`` as one JSON document.

    ``headline`` names the arm that should need little compute and the one that it is measured against; None leaves
    compute against score out. Raises UserError for a run that is not finished or arms that cannot be compared, which
    is so too where two have no score in common.
    """
    assert len({arm.name for arm in arms}) == len(arms), "arms are told apart by their names"
    scores = {arm.name: [_scores(folder, arm.stage) for folder in arm.folders] for arm in arms}
    _check_common(scores)
    document: Document = {
        "arms": {arm.name: _described(arm, scores[arm.name]) for arm in arms},
        "paired": [entry for a, b in combinations(scores, 2) for entry in _paired(b, a, scores)],
        "compute_at_equal_score": None,
        "score_at_equal_compute": None,
        "seeds": max(len(arm.folders) for arm in arms),
    }
    if headline is not None:
        by_name = {arm.name: arm for arm in arms}
        document["compute_at_equal_score"] = _compute_at_equal_score(*(by_name[name] for name in headline))
        document["score_at_equal_compute"] = _score_at_equal_compute(arms, by_name[headline[0]])
    return document


def _check_common(scores: Mapping[str, Sequence[Mapping[Key, Scores]]]) -> None:
    """Say which scores some of the runs lack. Raises UserError for two arms without any that both have."""
    for a, b in combinations(scores, 2):
        ours, theirs = _shared(scores[a]), _shared(scores[b])
        if not set(ours) & set(theirs):
            raise UserError(
                f"{a} and {b} have no score in common: {a} has {_listed(ours)}, and {b} {_listed(theirs)}; give both "
                "runs the same evaluation.tasks, modes and samples"
            )
    runs = [run for arm in scores.values() for run in arm]
    lacking = [key for key in dict.fromkeys(key for run in runs for key in run) if not all(key in run for run in runs)]
    if lacking:
        say(f"not compared, as not every run has it: {_listed(lacking)}")


def _listed(keys: Sequence[Key]) -> str:
    shown = [f"{metric} of {task} ({mode})" for task, mode, metric in keys[:4]]
    return ", ".join(shown) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") if shown else "none"


def read_curve(folder: Path, stage: str) -> list[Point]:
    """The learning curve of one stage of a run: the validation score in the first mode. Empty where none was
    recorded."""
    path = folder / "curve.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = [point for point in map(json.loads, lines) if point["stage"] == stage]
    return [Point(point["flops"], point["scores"][0]["mean"]) for point in points]


def stage_flops(folder: Path, stage: str) -> float:
    """FLOPs of one stage of a run, all roles together; examinations are no part of it."""
    return sum(float(cost["flops"]) for cost in _costs(folder, stage).values())


def _costs(folder: Path, stage: str) -> dict[str, Any]:
    document = read_json(folder / "costs.json")
    return {
        role: found["stages"][stage]
        for role, found in document.items()
        if role != "evaluate" and stage in found["stages"]
    }


def _scores(folder: Path, checkpoint: str) -> dict[Key, Scores]:
    """Every metric of the run's checkpoint, question by question."""
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} holds no finished run; give its command again to finish it, then compare")
    found: dict[Key, Scores] = {}
    for file in sorted((folder / "eval").glob("*.json")):
        document = read_json(file)
        # Beside examinations of tasks lie those of mode switching, which have no questions to pair.
        if document.get("checkpoint") != checkpoint or "samples_per_question" not in document:
            continue
        evaluation = Evaluation.from_json(document)
        if evaluation.sampling.thinking_budget is not None:
            continue
        for metric in evaluation.metrics:
            kind, _, k = metric.partition("@")
            of_metric = pass_at_k_scores(evaluation.scores, int(k)) if kind == "pass" else evaluation.scores
            found[evaluation.task, evaluation.mode, metric] = of_metric
    if not found:
        raise UserError(f"{folder} has no scores of its checkpoint {checkpoint!r}; was its eval folder moved?")
    return found


def _described(arm: Arm, runs: Sequence[Mapping[Key, Scores]]) -> Document:
    costs = [_costs(folder, arm.stage) for folder in arm.folders]
    roles = dict.fromkeys(role for cost in costs for role in cost)
    return {
        "runs": [str(folder) for folder in arm.folders],
        "scores": [_entry(arm.stage, key, runs) for key in _shared(runs)],
        # Means over the seeds, of the arm's own stage: its start was paid for by all.
        "flops": _mean(sum(role["flops"] for role in cost.values()) for cost in costs),
        "tokens": _mean(sum(role["tokens"] for role in cost.values()) for cost in costs),
        "device_seconds": {
            role: _mean(cost[role]["seconds"] if role in cost else 0.0 for cost in costs) for role in roles
        },
    }


def _shared(runs: Sequence[Mapping[Key, Scores]]) -> list[Key]:
    return [key for key in runs[0] if all(key in run for run in runs)]


def _entry(checkpoint: str, key: Key, runs: Sequence[Mapping[Key, Scores]]) -> Document:
    """As in ``summary.json``, pooled over the seeds, whose own means are in ``by_seed``."""
    task, mode, metric = key
    entry: Document = {"checkpoint": checkpoint, "task": task, "mode": mode, "metric": metric}
    # All responses: a question's pass@k is one number that was made of many.
    count = {"num_samples": sum(_num_samples(run, task, mode) for run in runs)}
    if len(runs) == 1:
        single = estimate(runs[0][key])
        return entry | single.entry | count | {"by_seed": [single.mean]}
    pooled = pooled_score([run[key] for run in runs])
    return entry | {
        "mean": pooled.mean,
        "ci95": list(pooled.ci95),
        "num_questions": pooled.num_questions,
        **count,
        "by_seed": list(pooled.by_seed),
    }


def _num_samples(run: Mapping[Key, Scores], task: str, mode: str) -> int:
    """Responses of an examination: those that its avg@K is the mean of."""
    means = (scores for key, scores in run.items() if key[:2] == (task, mode) and key[2].startswith("avg@"))
    return sum(len(row) for scores in means for row in scores.values())


def _paired(a: str, b: str, scores: Mapping[str, Sequence[Mapping[Key, Scores]]]) -> list[Document]:
    """How much higher ``a`` scores than ``b``."""
    in_b = _shared(scores[b])
    entries = []
    for task, mode, metric in (key for key in _shared(scores[a]) if key in in_b):
        ours, theirs = ([run[task, mode, metric] for run in scores[name]] for name in (a, b))
        if len(ours) == 1 == len(theirs):
            single = paired_difference(ours[0], theirs[0])
            difference, ci95 = single.mean, single.ci95
        else:
            pooled = pooled_difference(ours, theirs)
            difference, ci95 = pooled.mean, pooled.ci95
        entries.append(
            {"a": a, "b": b, "task": task, "mode": mode, "metric": metric, "difference": difference, "ci95": list(ci95)}
        )
    return entries


def _curves(arm: Arm) -> list[list[Point]]:
    return [read_curve(folder, arm.stage) for folder in arm.folders]


def _goal(folder: Path, stage: str) -> float | None:
    """The validation score at which a run was told to end its stage."""
    tree = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), where=str(folder / "config.yaml"))
    goal = tree.get("stop", {}).get(stage, {}).get("score")
    return None if goal is None else float(goal)


def _up_to(curve: Curve, goal: float | None) -> list[Point]:
    """The curve as if no score counted beyond ``goal``."""
    return list(curve) if goal is None else [replace(point, score=min(point.score, goal)) for point in curve]


def _compute_at_equal_score(ours: Arm, theirs: Arm) -> Document:
    """FLOPs of our first checkpoint at or above their best, over FLOPs of theirs; by the validation scores.

    A run that was stopped when it reached a goal is compared at the goal: it had no chance to show more.
    """
    goals = [_goal(folder, theirs.stage) for folder in theirs.folders]
    stopped = [_up_to(curve, goal) for curve, goal in zip(_curves(theirs), goals, strict=True)]
    found = compute_at_equal_score_over_seeds(_curves(ours), stopped)
    return {
        "a": ours.name,
        "b": theirs.name,
        "ratio": found.ratio,
        "ci95": None if found.ci95 is None else list(found.ci95),
        "num_reached": found.num_reached,
        "by_seed": [
            {
                "score": crossing.best.score,
                "b_reached_its_goal": goal is not None and crossing.best.score >= goal,
                "flops_b": crossing.best.flops,
                "flops_a": None if crossing.reached is None else crossing.reached.flops,
                "ratio": crossing.ratio,
            }
            for crossing, goal in zip(found.by_seed, goals, strict=True)
        ],
    }


def _score_at_equal_compute(arms: Sequence[Arm], ours: Arm) -> Document:
    """Each arm's best validation score for at most what ``ours`` spent in all, seed by seed and over the seeds; null
    where the first checkpoint already cost more. Arms without curves are not there."""
    budgets = [curve[-1].flops for curve in _curves(ours)]
    shown = {}
    for arm in arms:
        curves = _curves(arm)
        if not all(curves):
            continue
        points = [score_at_compute(curve, budget) for curve, budget in zip(curves, budgets, strict=True)]
        by_seed = [None if point is None else point.score for point in points]
        known = [score for score in by_seed if score is not None]
        shown[arm.name] = {**_over_seeds(known if len(known) == len(by_seed) else ()), "by_seed": by_seed}
    return {"flops": _mean(budgets), "arms": shown}


def _over_seeds(scores: Sequence[float]) -> Document:
    """The mean of the seeds' scores with its interval for other seeds, which a single one has none of."""
    if not scores:
        return {"mean": None, "ci95": None}
    mean, half = _mean(scores), seeds_half_width(scores)
    return {"mean": mean, "ci95": None if half is None else [max(0.0, mean - half), min(1.0, mean + half)]}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
