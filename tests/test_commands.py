"""``distill eval``, ``report`` and ``run --dry-run`` as they are typed: what is printed where, and exit codes.

Whole runs are in test_run.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import cli


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; exit code, standard output, standard error, as the system saw them."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


def test_an_examination_is_one_json_document(typed: Any, tmp_path: Path) -> None:
    arguments = ("eval", "tiny", "--questions", "8", "--samples", "2", "--json", "--out", str(tmp_path / "scores"))
    code, out, err = typed(*arguments)
    assert code == 0, err
    document = json.loads(out)
    found = {(entry["checkpoint"], entry["task"], entry["mode"], entry["metric"]) for entry in document["scores"]}
    metrics = ("avg@2", "pass@2")
    assert found == {("tiny", "embedded", mode, metric) for mode in ("think", "no_think") for metric in metrics}
    for entry in document["scores"]:
        assert set(entry) == {"checkpoint", "task", "mode", "metric", "mean", "ci95", "num_questions", "num_samples"}
        assert (entry["num_questions"], entry["num_samples"]) == (8, 16)
    # What is there with the same settings is read back, and progress goes to standard error.
    assert "tiny, embedded, think: 16/16" in err
    code, again, err = typed(*arguments)
    assert code == 0 and json.loads(again) == document and "16/16" not in err


def test_a_budget_shortens_the_thinking_and_no_other_mode(typed: Any) -> None:
    def lengths(*more: str) -> dict[str, tuple[float, float]]:
        code, out, err = typed("eval", "tiny", "--questions", "16", "--json", *more)
        assert code == 0, err
        return {
            found["mode"]: (found["mean_thinking_length"], found["closure"]) for found in json.loads(out)["evaluations"]
        }

    free, cut = lengths(), lengths("--budget", "8")
    assert cut["think"][0] < free["think"][0] and cut["think"][1] == 1
    assert cut["no_think"] == free["no_think"]


def test_bad_input_is_a_sentence_and_exit_code_2(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 0\n")
    cases = [
        (["eval", "nanno"], "CHECKPOINT 'nanno' is no size"),
        (["eval", str(tmp_path / "empty")], "no config.json"),
        (["eval", str(tmp_path / "begun")], "has no student yet"),
        (["eval", "nano", "--task", "embeded"], "nearest: embedded"),
        (["eval", "nano", "--mode", "thnik"], "none of think, no_think, both"),
        (["eval", "nano", "--out", str(tmp_path / "file")], "is a file; name a folder"),
        (["eval", "nano", "--out", str(tmp_path / "file" / "below")], "cannot be written"),
        (["eval", "nano", "--seed", "-1"], "--seed"),
        (["report", str(tmp_path / "empty")], "neither a run directory"),
        (["run", "--dry-run", "--teacher", "5B"], "nearest: 235B"),
        (["run", "--dry-run", "--student", "235B"], "no base checkpoint"),
    ]
    for arguments, sentence in cases:
        code, out, err = typed(*arguments)
        assert (code, out) == (2, ""), arguments
        assert sentence in err and "Traceback" not in err, (arguments, err)
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_dry_run_says_what_the_names_mean(typed: Any) -> None:
    code, out, _ = typed("run", "--dry-run", "--json", "--teacher", "235B", "--student", "4B")
    assert code == 0
    plan = json.loads(out)["plan"]
    assert plan[:2] == ["teacher 235B: Qwen/Qwen3-235B-A22B", "student 4B: Qwen/Qwen3-4B-Base"]


def test_a_report_says_where_it_lies(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    code, out, _ = typed("report", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"report": str(tmp_path / "report.html")})
    assert "not finished" in (tmp_path / "report.html").read_text()
