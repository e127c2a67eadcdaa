"""What a terminal of 80 columns shows of a run."""

from __future__ import annotations

import sys

import pytest

from distill.progress import track
from eval.table import print_scores, print_summary


def test_summary_fits_and_says_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scores = [
        {
            "checkpoint": checkpoint,
            "task": "embedded",
            "mode": mode,
            "metric": "avg@1",
            "mean": 1.0,
            "ci95": [0.456, 0.544],
            "num_questions": 512,
            "num_samples": 512,
        }
        for checkpoint in ("teacher", "start", "off_policy", "on_policy")
        for mode in ("think", "no_think")
    ]
    stage = {"tokens": 1_000_000, "flops": 3.25e12, "seconds": 61.04}
    costs = {
        "student_train": {**stage, "stages": {"off_policy": stage, "on_policy": stage}},
        "teacher_score": {**stage, "stages": {"on_policy": stage}},
        "evaluate": {**stage, "stages": {"on_policy": stage}},
    }
    print_summary({"run": "runs/x", "scores": scores, "gap_closed": {"think": 0.914, "no_think": None}, "costs": costs})
    shown = capsys.readouterr().out
    assert "\u2026" not in shown  # nothing is cut off
    assert max(map(len, shown.splitlines()[:-3])) <= 80
    assert "embedded, avg@1, 512 questions" in shown
    assert "off_policy" in shown and "45.6 - 54.4" in shown
    assert "1,000,000" in shown and "3.2e+12" in shown and "61.0" in shown  # of the off-policy stage
    assert "2,000,000" in shown and "6.5e+12" in shown  # of the on-policy stage: two roles, no examination
    assert "think: 91%" in shown and "no_think: no certain gap" in shown
    assert "Report: runs/x/report.html" in shown


def test_brackets_in_names_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders and files may be called so, and rich reads [red] as a colour and [/b] as a mistake."""
    entry = {
        "checkpoint": "on[red]",
        "task": "q[/b]",
        "mode": "think",
        "metric": "avg@1",
        "mean": 1.0,
        "ci95": [0.4, 1.0],
        "num_questions": 5,
        "num_samples": 5,
    }
    print_scores([entry])
    print_summary({"run": "runs/[/x]", "scores": [entry], "gap_closed": {}, "costs": {}})
    shown = capsys.readouterr().out
    assert shown.count("q[/b], avg@1") == shown.count("on[red]") == 2 and "Report: runs/[/x]/report.html" in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with track("on_policy, q[/b], think", 1, "responses") as bar:
        bar.advance(note="loss [/i]")
    assert "q[/b]" in capsys.readouterr().err
