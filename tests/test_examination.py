"""`distill eval` on real checkpoints: both modes, budgets, mode switching, local copies, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.cli import app, main
from distill.embedded import checkpoint_dir
from distill.errors import UserError
from eval.budget import budget_curves
from eval.evaluation import Evaluation

DATA = Path(__file__).parent / "data"


def distill_eval(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["eval", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refused(*arguments: str) -> str:
    """The sentence with which a command is refused."""
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    return str(caught.value)


def test_budgets_make_a_curve_with_both_lines(tmp_path: Path) -> None:
    found = distill_eval("tiny", "--budget", "24,8", "--budget", "48", "--questions", "32", "--out", str(tmp_path))
    (curve,) = found["budget_curves"]
    assert (curve["checkpoint"], curve["task"], curve["metric"]) == ("tiny", "embedded", "avg@1")
    assert [point["budget"] for point in curve["points"]] == [8, 24, 48]
    means = [point["mean"] for point in curve["points"]]
    assert means[0] < means[-1] <= curve["unlimited"]["mean"] and curve["no_think"]["mean"] < curve["unlimited"]["mean"]
    assert curve["points"][0]["mean_length"] < curve["points"][2]["mean_length"]
    assert curve["points"][0]["ci95"][0] <= means[0] <= curve["points"][0]["ci95"][1]
    budgets = [entry.get("thinking_budget") for entry in found["scores"]]
    assert budgets == [None, 8, 24, 48, None] and [entry["mode"] for entry in found["scores"]][-1] == "no_think"
    assert (tmp_path / "tiny-embedded-think-budget24.parquet").exists()
    # The curve comes from the evaluations alone.
    assert budget_curves([Evaluation.from_json(one) for one in found["evaluations"]]) == found["budget_curves"]


def test_thinking_mode_with_a_budget_is_that_budget_alone() -> None:
    found = distill_eval("nano", "--mode", "think", "--budget", "8", "--questions", "2", "--max-new-tokens", "12")
    assert [entry["thinking_budget"] for entry in found["scores"]] == [8]
    assert found["budget_curves"][0]["unlimited"] is found["budget_curves"][0]["no_think"] is None


def test_mode_switching_and_a_task_in_one_command() -> None:
    found = distill_eval(
        "nano", "--task", "mode_switching", "--task", "embedded-1", "--questions", "3", "--max-new-tokens", "8",
        "--samples", "4", "--pass-at", "1,2",
    )  # fmt: skip
    metrics = [(entry["task"], entry["metric"]) for entry in found["scores"]]
    assert ("embedded-1", "pass@2") in metrics and ("mode_switching", "right_mode") in metrics
    assert ("embedded-1", "pass@4") not in metrics
    assert found["mode_switching"][0]["num_dialogues"] == 3


def test_conversations_on_prompts_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    out = ("--questions", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "out"))
    distill_eval("nano", "--task", "mode_switching", "--data", str(own), *out)
    import pandas as pd

    asked = pd.read_parquet(tmp_path / "out" / "nano-mode_switching.parquet")["asked"]
    assert all("Why?" in text or "How?" in text for text in asked)


def test_a_local_copy_of_a_published_set_and_its_languages(tmp_path: Path) -> None:
    arguments = ("--task", "gsm8k", "--data", str(DATA / "gsm8k_test_first400.jsonl"))
    found = distill_eval("nano", *arguments, "--questions", "2", "--max-new-tokens", "4", "--mode", "no_think")
    assert (found["scores"][0]["task"], found["scores"][0]["num_questions"]) == ("gsm8k", 2)
    own = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{number}+1=", "answer": number + 1, "language": "de"} for number in (1, 2)]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = distill_eval("nano", "--task", str(own), "--max-new-tokens", "4", "--mode", "think")
    assert [(entry["slice"], entry["value"], entry["num_questions"]) for entry in found["slices"]] == [
        ("language", "de", 2)
    ]
    done = CliRunner().invoke(app, ["eval", "nano", "--task", str(own), "--max-new-tokens", "4"])
    assert "own, avg@1, by language" in done.stdout and "think, de" in done.stdout


def test_what_cannot_be_examined_is_a_sentence(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "test.jsonl").write_text('{"prompt": "3+4=", "answer": "7"}\n')
    for arguments, sentence in (
        (("http://127.0.0.1:9",), "needs --tokenizer"),
        (("http://127.0.0.1:9", "--tokenizer", "tiny"), "no server answers at"),
        (("tiny", "--tokenizer", "tiny"), "--tokenizer is for a server's URL"),
        (("tiny", "--budget", "8,x"), "is no whole number"),
        (("tiny", "--budget", "0"), "is no whole number"),
        (("tiny", "--mode", "no_think", "--budget", "8"), "--mode no_think asks for none"),
        (("tiny", "--samples", "2", "--pass-at", "4"), "pass@4 needs at least 4"),
        (("tiny", "--task", "x.jsonl", "--data", "y.jsonl"), "leave --data"),
        (("tiny", "--task", "gsm8k", "--task", "aime24", "--data", "y.jsonl"), "is one task's"),
        (("tiny", "--data", "y.jsonl"), "takes no path"),
        (("tiny", "--task", "mode_swiching"), "nearest: mode_switching"),
        (("tiny", "--task", "embedded-2", "--samples", "2", "--task", "embedded-2"), "one name in the results"),
        (("tiny", *(word for folder in folders for word in ("--task", str(folder / "test.jsonl")))), "one name in the"),
    ):
        assert sentence in refused(*arguments), arguments


def test_a_refusal_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["distill", "eval", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "needs --tokenizer" in capsys.readouterr().err


def test_what_is_found_of_a_run_later_is_kept_where_its_report_finds_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint_dir("nano"), run / "student")
    (run / "config.yaml").write_text("name: x\n")
    few = ("--questions", "2", "--max-new-tokens", "12")
    found = distill_eval(str(run), "--task", "embedded", "--task", "mode_switching", "--budget", "4,8", *few)
    page = (run / "report.html").read_text()
    assert "Score against thinking budget" in page and "<figcaption>student, embedded" in page
    assert "Mode switching" in page and "Examined after the run: embedded" in page
    kept = [path.name for path in (run / "eval" / "later").glob("*.json")]
    assert len(kept) == len(found["evaluations"]) + 1
    # Given a folder, it is kept there, and the run stays as it was.
    (run / "report.html").unlink()
    distill_eval(str(run), *few, "--out", str(tmp_path / "elsewhere"))
    assert not (run / "report.html").exists() and len(list((run / "eval" / "later").glob("*.json"))) == len(kept)
