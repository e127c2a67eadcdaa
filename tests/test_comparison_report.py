"""The page about a comparison: what it says of each outcome, and the numbers of real, tiny runs in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Elements

from distill.errors import UserError
from eval.comparison_report import differences, verdict
from eval.report import write_report
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run

SMALL = (
    "evaluation.num_questions=4",
    "evaluation.references=false",
    "evaluation.curve={every: 1, num_questions: 4}",
)
SHORT = {"think": {"max_new_tokens": 8}, "no_think": {"max_new_tokens": 4}}
ON_POLICY = {"kind": "on_policy", "steps": 2, "prompts_per_step": 4, "sampling": SHORT}
RL = {"kind": "grpo", "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "sampling": SHORT}


def entry(task: str, mode: str, metric: str, mean: float) -> dict[str, Any]:
    ends = [max(mean - 0.04, 0), min(mean + 0.04, 1)]
    counts = {"num_questions": 100, "num_samples": 400}
    return {"checkpoint": "x", "task": task, "mode": mode, "metric": metric, "mean": mean, "ci95": ends, **counts}


def arm(mean: float, passed: float, flops: float, *runs: str) -> dict[str, Any]:
    scores = [
        entry("embedded", "think", "avg@4", mean),
        entry("embedded", "think", "pass@4", mean + 0.02),
        entry("embedded", "no_think", "avg@4", mean / 2),
        entry("embedded-pass", "think", "avg@128", mean + 0.01),
        entry("embedded-pass", "think", "pass@64", passed),
    ]
    return {"scores": scores, "flops": flops, "device_seconds": {"student_train": 90.0}, "runs": list(runs)}


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "arms": {"off_policy": arm(0.41, 0.8, 0), "on_policy": arm(0.95, 0.93, 1e12), "rl": arm(0.6, 0.81, 9e12)},
        "paired": [difference("on_policy", "rl", 0.35, [0.3, 0.4]), difference("rl", "off_policy", 0.19, [0.1, 0.28])],
        "compute_at_equal_score": {"ratio": 0.062, "ci95": [0.04, 0.096]},
        "score_at_equal_compute": {"difference": 0.21, "ci95": [0.15, 0.27]},
        "seeds": 3,
    } | changes


def difference(a: str, b: str, value: float, ci95: list[float] | None) -> dict[str, Any]:
    return {"a": a, "b": b, "task": "embedded", "mode": "think", "difference": value, "ci95": ci95}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of real runs, two seeds each; its scores are made up."""
    folder = tmp_path_factory.mktemp("comparison") / HOSTILE.replace("/", "").replace("\x00", "")
    for name, stage in (("on_policy", ON_POLICY), ("rl", RL)):
        for seed in (0, 1):
            stages = f"stages={json.dumps({'off_policy': None, 'on_policy': None} | {name: stage})}"
            config = resolve_run(assignments=[*SMALL, f"store={folder.parent}/store", stages], seed=seed)
            run(config, folder / f"{name} seed{seed}", command=["a test"])
    found = comparison()
    for name in ("on_policy", "rl"):
        found["arms"][name]["runs"] = [f"{name} seed0", f"{name} seed1"]
    found["arms"]["rl"]["runs"].append("gone")
    found["arms"][HOSTILE] = arm(0.3, 0.3, 1e11)
    (folder / "comparison.json").write_text(json.dumps({"starts": {"40 %": found, HOSTILE: comparison()}}))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_nests_is_escaped_and_needs_nothing_from_outside(page: str) -> None:
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object"}
    assert "<script>" not in page and "&lt;script&gt;alert(" in page and not set("\x00\u202e") & set(page)
    assert "http" not in page and "url(" not in page


def test_the_table_has_the_shape_of_table_21(page: str) -> None:
    assert "<th>embedded, thinking: pass@1 (pass@64)</th><th>embedded, non-thinking: pass@1</th><th>FLOPs</th>" in page
    row = next(line for line in page.splitlines() if "<strong>+ on-policy distillation</strong>" in line)
    assert "<strong>95.0 %</strong> (93.0 %)" in row, "pass@64 is that of the many samples to few questions"
    assert "91.0 to 99.0" in row and "<td>1.00e+12</td><td>1 min 30 s</td>" in row
    assert "embedded-pass" not in page


def test_the_curves_of_real_runs_are_there_thin_by_seed_and_thick_in_the_mean(page: str) -> None:
    assert "Learning curves over FLOPs" in page and "embedded-validation, thinking" in page
    figure = page[page.index("<figcaption>embedded-validation, thinking") :].partition("</figure>")[0]
    assert len(re.findall(r'<(?:polyline|circle) class="s\d thin"', figure)) == 4
    assert len(re.findall(r'<polyline class="s\d thick"', figure)) == 2
    assert figure.count('class="s5 dashed"') == 1, "where all begin"


def test_members_are_linked_from_where_the_page_lies(page: str, folder: Path) -> None:
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links[0] == "on_policy%20seed0/report.html" and len(links) == 4
    assert "gone (no report there)" in page
    assert (folder / "on_policy seed0" / "report.html").exists()


def test_good_news_is_said_with_its_interval() -> None:
    first, second = verdict(comparison())
    assert first == (
        "On-policy distillation reached reinforcement learning's best score with 0.062 of its FLOPs (3 seeds, 95 % "
        "interval 0.04 to 0.096)."
    )
    assert second == "At equal compute it scores 21.0 points higher (95 % interval +15.0 to +27.0)."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute_at_equal_score": {"ratio": 2.5, "ci95": [1.5, 4.0]}}, "needed 2.5 times the FLOPs"),
        ({"compute_at_equal_score": {"ratio": 0.8, "ci95": [0.4, 1.6]}}, "0.8 of its FLOPs"),
        ({"compute_at_equal_score": {"ratio": 0.8, "ci95": [0.4, 1.6]}}, "1.6), which may be chance."),
        ({"compute_at_equal_score": {"ratio": 0.1, "ci95": None}, "seeds": 1}, "(1 seed, no interval)."),
        ({"compute_at_equal_score": {"ratio": None, "ci95": None}}, "did not reach reinforcement learning's best"),
        ({"score_at_equal_compute": {"difference": -0.1, "ci95": [-0.2, -0.05]}}, "10.0 points lower"),
        ({"score_at_equal_compute": {"difference": 0.01, "ci95": [-0.02, 0.04]}}, "+4.0), which may be chance."),
        ({"paired": [difference("rl", "off_policy", 0.02, [-0.03, 0.07])]}, "(embedded, thinking), so it is a weak"),
    ],
)
def test_bad_news_is_said_as_plainly(changes: dict[str, Any], words: str) -> None:
    assert words in " ".join(verdict(comparison(**changes)))


def test_a_missing_score_at_equal_compute_is_not_made_up() -> None:
    assert len(verdict(comparison(score_at_equal_compute={"difference": None, "ci95": None}))) == 1


def test_differences_stand_on_one_scale() -> None:
    wide, narrow = differences([difference("a", "b", 0.2, [0.0, 0.4]), difference("a", "b", -0.1, [-0.2, -0.05])])
    assert (wide["place"], wide["left"], wide["width"], wide["certain"]) == (75.0, 50.0, 50.0, False)
    assert (narrow["place"], narrow["left"], narrow["certain"]) == (37.5, 25.0, True)


def test_a_damaged_comparison_is_a_sentence(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"arms": {}}'):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(UserError, match="is no comparison"):
            write_report(tmp_path)
