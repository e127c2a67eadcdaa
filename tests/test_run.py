"""Whole runs in real processes: the same numbers again, also after every kind of interruption, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import stop
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import cli
from pipelines.phases import reproducible

SMALL = [
    "--set",
    "stages.off_policy.num_prompts=48",
    "--set",
    "stages.off_policy.batch_size=16",
    "--set",
    "stages.on_policy.steps=5",
    "--set",
    "stages.on_policy.prompts_per_step=8",
    "--set",
    "evaluation.num_questions=12",
    "--set",
    "checkpoint_every=2",
]
NUM_STEPS = 6 + 5


def start(out: Path, store: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "DISTILL_STORE": str(store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill.cli", "run", "--json", "--out", str(out), *SMALL, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(out: Path, store: Path, *more: str) -> dict[str, Any]:
    process = start(out, store, *more)
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr
    return dict(json.loads(stdout))


def numbers(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, times aside."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [reproducible(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root / "run", finish(root / "run", root / "store")


def test_a_run_leaves_what_is_promised(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, summary = undisturbed
    assert summary == json.loads((out / "summary.json").read_text())
    found = {(entry["checkpoint"], entry["mode"], entry["metric"]) for entry in summary["scores"]}
    names = ("teacher", "start", "off_policy", "on_policy")
    assert found == {(name, mode, "avg@1") for name in names for mode in ("think", "no_think")}
    for entry in summary["scores"]:
        low, high = entry["ci95"]
        assert 0 <= low <= entry["mean"] <= high <= 1 and entry["num_questions"] == 12
    assert set(summary["gap_closed"]) == {"think", "no_think"}
    roles = ("teacher_generate", "teacher_score", "student_sample", "student_train", "evaluate")
    assert set(summary["costs"]) == set(roles) == set(summary["peak_memory_bytes"])
    assert all(
        summary["costs"][role]["flops"] > 0 and summary["costs"][role]["tokens_per_second"] > 0 for role in roles
    )
    metrics = numbers(out)
    assert [line["stage"] for line in metrics] == ["off_policy"] * 6 + ["on_policy"] * 5
    assert [line["global_step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert all(line["reverse_kl"] is None for line in metrics[:6])
    assert all(line["reverse_kl"] > 0 and line["forward_kl"] > 0 for line in metrics[6:])
    assert all(line["logprob_gap"] < 1e-4 for line in metrics[6:])  # the sampler's log-probs are the trainer's
    assert metrics[0]["loss"] > metrics[5]["loss"]
    # Tokens trained = prompt and response tokens of the teacher's answers, twice over, and of the student's own.
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["stages"]["off_policy"]["responses"]) == 48
    assert "report.html" in {path.name for path in out.iterdir()}


def test_the_student_loads_with_plain_transformers(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, _ = undisturbed
    model = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4="}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(text)])
    said = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert said.shape[1] > ids.shape[1]
    stops = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(model.generation_config.eos_token_id) == stops


def test_the_same_seed_gives_the_same_numbers_and_a_reused_store_the_same_responses(
    undisturbed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, summary = undisturbed
    again = finish(tmp_path / "run", out.parent / "store")
    assert numbers(tmp_path / "run") == numbers(out)
    assert again["scores"] == summary["scores"]
    # Responses that another run paid for cost nothing here, and are marked.
    assert again["costs"]["teacher_generate"]["tokens"] == 0
    assert again["costs"]["teacher_generate"]["reused_tokens"] == summary["costs"]["teacher_generate"]["tokens"] > 0
    # Given again, a finished run is read back.
    monkeypatch.setenv("DISTILL_STORE", str(out.parent / "store"))
    assert call(monkeypatch, "run", "--json", "--out", str(tmp_path / "run"), *SMALL) == 0
    assert json.loads(capsys.readouterr().out) == again


def lines_at_least(out: Path, wanted: int) -> Callable[[], bool]:
    path = out / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= wanted


def interrupt(out: Path, store: Path, when: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    return stop(start(out, store), when, number)


def test_sigkill_anywhere_ends_in_the_same_numbers(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    reference, summary = undisturbed
    out, store = tmp_path / "run", tmp_path / "store"
    for when in (
        lambda: any(out.glob("eval/*.json")),  # between two examinations
        lambda: any(store.rglob("*.parquet")),  # the teacher's answers are there, no step is done
        lines_at_least(out, 3),  # one step behind a checkpoint
        lines_at_least(out, 6),  # about the end of the first stage
        lines_at_least(out, 9),
    ):
        code, _ = interrupt(out, store, when, signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    resumed = finish(out, store)
    assert numbers(out) == numbers(reference)
    assert (out / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()
    assert resumed["scores"] == summary["scores"] and resumed["gap_closed"] == summary["gap_closed"]
    for role, cost in summary["costs"].items():
        assert resumed["costs"][role]["tokens"] == cost["tokens"], role
        assert resumed["costs"][role]["flops"] == pytest.approx(cost["flops"]), role
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((out / "student" / name).read_bytes() == (reference / "student" / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def terminated(undisturbed: tuple[Path, dict[str, Any]]) -> tuple[Path, int, str]:
    """A run that was asked to stop, for its readers to copy; exit code and standard error."""
    root = undisturbed[0].parent
    out = root / "terminated"
    return out, *interrupt(out, root / "store", lines_at_least(out, 8), signal.SIGTERM)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_clean_stop_checkpoints_and_resumes(
    undisturbed: tuple[Path, dict[str, Any]],
    terminated: tuple[Path, int, str],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    reference, _ = undisturbed
    out = tmp_path / "run"
    if number == signal.SIGTERM:
        stopped, code, stderr = terminated
        shutil.copytree(stopped, out)
    else:
        code, stderr = interrupt(out, reference.parent / "store", lines_at_least(out, 8), number)
    assert code == expected, stderr
    assert "the same command resumes it" in stderr and "Traceback" not in stderr
    done = max(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))
    assert done == len(numbers(out)) >= 8  # the checkpoint is of the last finished step
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step_{done}") is not None
    finish(out, reference.parent / "store")
    assert numbers(out) == numbers(reference)
    assert (out / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(
        out, tmp_path / "store", "--set", "stages.off_policy.optimiser={learning_rate: 1.0, weight_decay: 1e25}"
    )
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "no step was taken" in stderr and "off_policy step" in stderr and "Traceback" not in stderr
    assert any((out / "checkpoints").glob("step_*/model.safetensors"))
    assert all(json.loads(line)["loss"] is not None for line in (out / "metrics.jsonl").read_text().splitlines())


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    undisturbed: tuple[Path, dict[str, Any]], terminated: tuple[Path, int, str], tmp_path: Path
) -> None:
    """The kernel's own ENOSPC, from /dev/full."""
    reference, _ = undisturbed
    out, store = tmp_path / "run", reference.parent / "store"
    shutil.copytree(terminated[0], out)
    (out / ".costs.json.tmp").symlink_to("/dev/full")
    process = start(out, store)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1, stderr
    assert "the disk is full" in stderr and "same command again" in stderr and "Traceback" not in stderr
    (out / ".costs.json.tmp").unlink()
    finish(out, store)
    assert numbers(out) == numbers(reference)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_bad_input_is_a_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    rows = '{"prompt": "3+4="}\n'
    cases = [
        (["--student", "6B"], "nearest: 0.6B"),
        (["--recipe", "embeded"], "did you mean embedded"),
        (["--recipe", write(tmp_path / "r.yaml", "studnet: {model: nano}")], "did you mean student"),
        (["--set", "stages.on_policy.stps=3"], "did you mean steps"),
        (["--set", "seed"], "--set takes a.b=value"),
        (["--prompts", str(tmp_path / "gone.jsonl")], "gone.jsonl"),
        (["--prompts", write(tmp_path / "empty.jsonl", "")], "empty"),
        (["--prompts", write(tmp_path / "text.jsonl", rows + "3+4=\n")], "line 2"),
        (["--prompts", write(tmp_path / "column.jsonl", '{"question": "3+4="}\n')], "question"),
        (
            ["--prompts", write(tmp_path / "long.jsonl", rows + json.dumps({"prompt": "1+" * 50_000 + "1="}) + "\n")],
            "line 2",
        ),
        (["--out", str(tmp_path / "full")], "holds something that is no run"),
        (["--out", str(tmp_path / "full" / "thesis.txt")], "is a file"),
        (["--teacher", "nobody/nothing", "--prompts", write(tmp_path / "own.jsonl", rows)], "nobody/nothing"),
    ]
    for arguments, sentence in cases:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
        assert call(monkeypatch, "run", *out, *arguments) == 2, arguments
        captured = capsys.readouterr()
        assert sentence in captured.err, (arguments, captured.err)
        assert "Traceback" not in captured.err and captured.out == ""
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_another_run_in_the_directory_is_refused_with_the_difference(
    undisturbed: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, summary = undisturbed
    assert call(monkeypatch, "run", "--out", str(out), *SMALL, "--seed", "1") == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text()) == summary


def test_dry_run_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", "run", "--dry-run", "--teacher", "235B", "--student", "4B", "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["prompts"]["sets"][0]["revision"]
    assert document["out"] == "runs/235B-to-4B"
    assert not any(tmp_path.iterdir())
