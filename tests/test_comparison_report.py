"""The page about a comparison: what it says of each outcome, and the numbers of real, tiny runs in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Elements

from distill.errors import UserError
from eval.compare import Arm, compare
from eval.comparison_report import differences, table, verdict
from eval.page import count
from eval.report import write_report
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run

SMALL = (
    "evaluation.num_questions=4",
    "evaluation.samples=2",
    "evaluation.references=false",
    "evaluation.curve={every: 1, num_questions: 4}",
)
SHORT = {"think": {"max_new_tokens": 8}, "no_think": {"max_new_tokens": 4}}
STAGES = {
    "off_policy": {"kind": "off_policy", "num_prompts": 16, "epochs": 1, "batch_size": 8, "sampling": SHORT},
    "on_policy": {"kind": "on_policy", "steps": 2, "prompts_per_step": 4, "sampling": SHORT},
    "rl": {"kind": "grpo", "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "sampling": SHORT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real comparison of two seeds, and a second start that is called something awful and whose runs are gone."""
    folder = tmp_path_factory.mktemp("comparison") / "first"
    for arm, stage in STAGES.items():
        for seed in (0, 1):
            config = resolve_run(
                recipe="embedded",
                student=None if arm == "off_policy" else str(folder / "low" / f"off_policy-seed{seed}" / "student"),
                assignments=[
                    *SMALL,
                    f"store={folder.parent}/store",
                    f"stages={json.dumps({'off_policy': None, 'on_policy': None} | {arm: stage})}",
                ],
                seed=seed,
            )
            run(config, folder / "low" / f"{arm}-seed{seed}", command=["a test"])
    arms = [Arm(arm, arm, tuple(folder / "low" / f"{arm}-seed{seed}" for seed in (0, 1))) for arm in STAGES]
    found = compare(arms, headline=("on_policy", "rl"))
    made_up = comparison()
    made_up["arms"][HOSTILE] = arm_of(0.3, 0.3, 1e11)
    (folder / "comparison.json").write_text(json.dumps({**found, "starts": {"low": found, HOSTILE: made_up}}))
    # It does not lie where it was made.
    return Path(shutil.move(folder, folder.parent / "moved"))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def entry(task: str, mode: str, metric: str, mean: float) -> dict[str, Any]:
    ends = [max(mean - 0.04, 0), min(mean + 0.04, 1)]
    counts = {"num_questions": 100, "num_samples": 400}
    return {"checkpoint": "x", "task": task, "mode": mode, "metric": metric, "mean": mean, "ci95": ends, **counts}


def arm_of(mean: float, passed: float, flops: float) -> dict[str, Any]:
    scores = [
        entry("embedded", "think", "avg@4", mean),
        entry("embedded", "think", "pass@4", mean + 0.02),
        entry("embedded", "no_think", "avg@4", mean / 2),
        entry("embedded-pass", "think", "avg@128", mean + 0.01),
        entry("embedded-pass", "think", "pass@64", passed),
    ]
    return {"scores": scores, "flops": flops, "device_seconds": {"student_train": 90.0}, "runs": ["gone/rl-seed0"]}


def difference(a: str, b: str, value: float, ci95: list[float], metric: str = "avg@4") -> dict[str, Any]:
    return {"a": a, "b": b, "task": "embedded", "mode": "think", "metric": metric, "difference": value, "ci95": ci95}


def ratio(value: float | None, ci95: list[float] | None, *, reached: int = 3, seeds: int = 3) -> dict[str, Any]:
    found = {"a": "on_policy", "b": "rl", "ratio": value, "ci95": ci95, "num_reached": reached}
    return {"compute_at_equal_score": {**found, "by_seed": [{}] * seeds}}


def equal(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    by_arm = {
        name: {"mean": sum(seeds) / len(seeds), "by_seed": seeds}
        for name, seeds in (("on_policy", ours), ("rl", theirs))
    }
    return {"score_at_equal_compute": {"flops": 1e12, "arms": by_arm}}


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "arms": {
            "off_policy": arm_of(0.41, 0.8, 3e11),
            "on_policy": arm_of(0.95, 0.93, 1e12),
            "rl": arm_of(0.6, 0.81, 9e12),
        },
        "paired": [
            difference("rl", "off_policy", 0.19, [0.1, 0.28]),
            difference("rl", "on_policy", -0.35, [-0.4, -0.3]),
        ],
        **ratio(0.062, [0.04, 0.096]),
        **equal([0.9, 0.92, 0.94], [0.7, 0.7, 0.7]),
        "seeds": 3,
    } | changes


def test_the_page_nests_is_escaped_and_needs_nothing_from_outside(page: str) -> None:
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object"}
    assert "<script>" not in page and "&lt;script&gt;alert(" in page and not set("\x00\u202e") & set(page)
    assert "http" not in page and "url(" not in page


def test_the_table_has_the_shape_of_table_21() -> None:
    found = table(comparison())
    assert found["columns"] == ["embedded, thinking: pass@1 (pass@64)", "embedded, non-thinking: pass@1"]
    names = [row["name"] for row in found["rows"]]
    assert names == ["off-policy distillation (the start)", "+ on-policy distillation", "+ reinforcement learning"]
    (average, passed), (other, nothing) = found["rows"][1]["cells"]
    # pass@64 is that of the many samples to few questions, pass@1 that of all questions.
    assert (average["mean"], passed["mean"], other["mean"], nothing) == (0.95, 0.93, 0.475, None)
    assert (found["rows"][1]["flops"], found["rows"][1]["total"]) == (1e12, 90.0)


def test_the_interval_at_equal_compute_stands_below_its_score() -> None:
    found = equal([0.9, 0.92, 0.94], [0.7, 0.7, 0.7])
    found["score_at_equal_compute"]["arms"]["on_policy"]["ci95"] = [0.87, 0.97]
    start, ours, theirs = (row["equal"] for row in table(comparison(**found))["rows"])
    assert start is None and (ours["mean"], ours["ci95"]) == (pytest.approx(0.92), [0.87, 0.97])
    assert theirs["ci95"] is None, "documents of earlier versions have none"


def test_the_numbers_of_the_runs_stand_in_the_table(page: str, folder: Path) -> None:
    found = json.loads((folder / "comparison.json").read_text())["arms"]["rl"]
    row = next(line for line in page.splitlines() if "<strong>+ reinforcement learning</strong>" in line)
    for score in found["scores"]:
        if score["metric"] == "avg@2":
            assert f"<strong>{100 * score['mean']:.1f} %</strong>" in row
    assert f"<td>{count(found['flops'])}</td>" in row and found["flops"] > 0


def test_the_curves_of_the_runs_are_there_thin_by_seed_and_thick_in_the_mean(page: str) -> None:
    (figure,) = re.findall("<figure>.*?</figure>", page, flags=re.DOTALL)
    assert "embedded-validation, thinking" in figure and "off-policy" not in figure, "the start's own way is no arm's"
    assert len(re.findall(r'<polyline class="s\d thin"', figure)) == 4
    assert len(re.findall(r'<polyline class="s\d thick"', figure)) == 2
    assert figure.count('class="s5 dashed"') == 1, "where all begin"


def test_members_are_linked_from_where_the_page_lies(page: str, folder: Path) -> None:
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links[0] == "low/off_policy-seed0/report.html" and len(links) == 6
    assert all((folder / link).exists() for link in links)
    assert "rl-seed0 (no report there)" in page


def test_good_news_is_said_with_its_interval() -> None:
    first, second = verdict(comparison())
    assert first == (
        "On-policy distillation reached the best score of reinforcement learning with 0.062 of its FLOPs (3 seeds, "
        "95 % interval 0.04 to 0.096)."
    )
    # Differences .20, .22, .24: Student's t of two degrees of freedom, 4.303, times .02 / sqrt(3).
    assert second == (
        "For the 1.00e+12 FLOPs that it spent in all, it scores 22.0 points higher than reinforcement learning does "
        "for as many (validation questions, 95 % interval over seeds +17.0 to +27.0)."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (ratio(2.5, [1.5, 4.0]), "needed 2.5 times the FLOPs of reinforcement learning"),
        (ratio(0.8, [0.4, 1.6]), "0.8 of its FLOPs (3 seeds, 95 % interval 0.4 to 1.6), which may be chance."),
        (ratio(0.1, None, reached=1, seeds=1), "(1 seed, no interval)."),
        (ratio(None, None, reached=2), "with 2 of 3 seeds, so there is no ratio."),
        (ratio(None, None), "has nothing to catch up with"),
        (equal([0.5, 0.51, 0.5], [0.6, 0.61, 0.6]), "10.0 points lower"),
        (equal([0.5, 0.7, 0.6], [0.6, 0.6, 0.6]), "which may be chance."),
        (equal([0.5], [0.6]), "10.0 points lower than reinforcement learning does for as many (1 seed, no interval)."),
        ({"paired": [difference("rl", "off_policy", 0.02, [-0.03, 0.07])]}, "(embedded, thinking), so it is a weak"),
    ],
)
def test_bad_news_is_said_as_plainly(changes: dict[str, Any], words: str) -> None:
    assert words in " ".join(verdict(comparison(**changes)))


def test_a_baseline_is_weak_by_its_score_alone() -> None:
    unsure = difference("rl", "off_policy", 0.0, [-0.1, 0.1], metric="pass@64")
    assert "weak" not in " ".join(verdict(comparison(paired=[unsure])))


def test_a_missing_score_at_equal_compute_is_not_made_up() -> None:
    found = equal([0.5], [0.6])
    found["score_at_equal_compute"]["arms"]["rl"]["mean"] = None
    assert len(verdict(comparison(**found))) == 1
    assert "no compute" in verdict(comparison(compute_at_equal_score=None, score_at_equal_compute=None))[0]


def test_differences_stand_on_one_scale_and_are_told_as_on_policy_s_lead() -> None:
    wide, lead = differences(
        [difference("rl", "a", 0.2, [0.0, 0.4]), difference("rl", "on_policy", -0.1, [-0.2, -0.05])]
    )
    assert (wide["place"], wide["left"], wide["width"], wide["certain"], wide["is_headline"]) == (
        75,
        50,
        50,
        False,
        False,
    )
    assert (lead["a"], lead["b"]) == ("on-policy distillation", "reinforcement learning")
    assert (lead["difference"], lead["ci95"], lead["certain"], lead["is_headline"]) == (0.1, [0.05, 0.2], True, True)
    assert (lead["place"], lead["left"], lead["width"]) == (62.5, 56.25, 18.75)


def test_a_damaged_comparison_is_a_sentence(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"arms": {}}'):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(UserError, match="is no comparison"):
            write_report(tmp_path)
