"""What a terminal of 80 columns shows of a run."""

from __future__ import annotations

import pytest

from eval.table import print_summary


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
