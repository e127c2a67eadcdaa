"""``distill eval``, ``report`` and ``run --dry-run`` as they are typed: what is printed where, and exit codes.

Whole runs are in test_run.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.options import one_of_many
from distill.embedded import checkpoint_dir
from distill.errors import StoppedError
from distill.interrupt import deferred_signals
from distill.recipe import dump_yaml
from eval.tasks import load_task
from pipelines.resolution import resolve_run
from students.ranks import Ranks


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
        (["run", "--dry-run", "--node-rank", "1"], "--node-rank and --node-address belong to --nodes"),
        (["run", "--dry-run", "--nodes", "2", "--node-rank", "2", "--node-address", "a"], "--node-rank is 2"),
        (["run", "--recipe", "table21", "--dry-run", "--node-rank", "1"], "--node-rank is an option of a single run"),
        (["run", "--recipe", "table21", "--node-address", "a"], "--node-address is an option of a single run"),
        (["report", "nope"], "nope is not there"),
        (["compare", "nope"], "nope is not there"),
    ]
    for arguments, sentence in cases:
        code, out, err = typed(*arguments)
        assert (code, out) == (2, ""), arguments
        assert sentence in err and "Traceback" not in err, (arguments, err)
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_dry_run_refuses_what_the_run_would(typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"prompt": "3+4=", "answer": "7"}\n')
    Path("text.jsonl").write_text('{"prompt": "3+4="}\n3+4=\n')
    Path("bare.jsonl").write_text('{"prompt": "3+4="}\n')
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text(dump_yaml(resolve_run(seed=1)))
    Path("empty").mkdir()
    Path("weightless").mkdir()
    shutil.copy(checkpoint_dir("nano") / "config.json", "weightless")
    shutil.copytree(checkpoint_dir("nano"), "whole")
    think = "stages.on_policy.sampling.think"
    cases = [
        (["--prompts", "nope.jsonl"], "there is no file"),
        (["--prompts", "text.jsonl"], "line 2 is not JSON"),
        (["--prompts", "empty"], "holds no .jsonl or .parquet file"),
        (["--recipe", "embedded", "--student", "empty"], "no model folder"),
        (["--recipe", "embedded", "--student", "weightless"], "neither model.safetensors nor"),
        (["--out", "full"], "holds something that is no run"),
        (["--out", "full/thesis.txt"], "is a file"),
        (["--out", "full/thesis.txt/below"], "cannot be written: Not a directory"),
        (["--out", "x" * 300], "File name too long"),
        (["--store", "x" * 300], "File name too long"),
        (["--out", "begun"], "seed is 1 there and 0 here"),
        (["--store", "full/thesis.txt"], "the response store full/thesis.txt cannot be made"),
        (["--set", "evaluation.tasks=[nope.jsonl]"], "there is no file"),
        (["--set", "evaluation.tasks=[bare.jsonl]"], "has no answer"),
        (["--set", "evaluation.tasks=[{name: gsm8k, path: nope}]"], "there is no file or folder nope"),
        (["--set", "evaluation.tasks=[embeded]"], "nearest: embedded"),
        # Known only when a checkpoint is examined, it would cost the training that made that one.
        (["--set", "evaluation.tasks=[{name: embedded, pass_at: [8]}]"], "pass@8 needs at least 8 samples a question"),
        (["--set", "evaluation.tasks=[embedded, {name: embedded, samples: 4}]"], "one name in the results"),
        (["--set", "evaluation.curve={task: nope.jsonl}"], "there is no file"),
        (["--set", "student.lora={target_modules: [q_porj]}"], "did you mean q_proj"),
        (["--set", "student.lora={target_modules: [lm_head]}"], "the student's head"),
        (["--recipe", "embedded", "--student", "whole", "--set", "student.lora={target_modules: [mlp]}"], "called so"),
        (["--set", "sampler.backend=vllm", "--set", f"{think}.temperature=2.5"], "vLLM draws at 0.01 to 2"),
    ]
    for number, (given, sentence) in enumerate(cases):
        arguments = given if "--out" in given else ["--out", f"run-{number}", *given]
        for more in ([], ["--json"]):
            code, out, err = typed("run", "--dry-run", *arguments, *more)
            assert (code, out) == (2, ""), (arguments, out, err)
            assert sentence in err and "Traceback" not in err, (arguments, err)
        # The run itself ends with the same.
        code, _, said = typed("run", *arguments)
        assert code == 2 and said.splitlines()[-1] == err.splitlines()[-1], (arguments, said)
    for arguments, sentence in (
        (["--set", "common.prompts={kind: file, path: nope.jsonl}"], "there is no file"),
        (["--set", "common.teacher.model=5B"], "nearest: 235B"),
        (["--out", "full"], "holds something that is no run"),
    ):
        code, out, err = typed("run", "--recipe", "table21", "--dry-run", *arguments)
        assert (code, out) == (2, "") and sentence in err, (arguments, err)
    code, out, err = typed("run", "--dry-run", "--processes", "2", "--set", "stages.on_policy.prompts_per_step=1")
    assert (code, out) == (2, "") and "cannot be shared among 2 processes" in err
    assert typed("run", "--dry-run", "--prompts", "good.jsonl", "--out", "new/deep")[0] == 0
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cpu", "8-bit AdamW runs on NVIDIA GPUs only; take fp32 here"), ("cuda", "bitsandbytes is not installed; pip ")],
)
def test_moments_that_cannot_be_had_are_refused_before_anything_begins(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, sentence: str
) -> None:
    """The optimiser is made after the teacher has answered everything: too late to find out."""
    monkeypatch.setattr(Ranks, "device", torch.device(device))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    store = tmp_path / "store"
    words = ("--out", str(tmp_path / "run"), "--store", str(store), "--set", "student.adamw=8bit")
    code, out, err = typed("run", *words)
    assert (code, out) == (2, "") and "student.adamw is 8bit" in err and sentence in err, err
    assert len(err.splitlines()) == 1 and not store.exists()
    assert typed("run", "--dry-run", *words)[0] == 0  # its plan may be for another machine


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


HUGE = "9" * 26


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--nodes", "2", "--node-address", "h:99999999"], "--node-address 'h:99999999'"),
        (["run", "--nodes", "2", "--node-address", "h:0"], "no port from 1 to 65535"),
        (["run", "--nodes", "2", "--node-address", "h:\u00b2"], "no port from 1 to 65535"),
        (["run", "--nodes", "2", "--node-address", "h:" + "9" * 5000], "no port from 1 to 65535"),
        (["run", "--nodes", "2", "--node-address", "h:"], "no port from 1 to 65535"),
        (["run", "--nodes", "2", "--node-address", ":8000"], "names no host"),
        (["run", "--nodes", "2", "--node-address", ""], "names no host"),
        (
            ["teacher", "serve", "--teacher=tiny", "--role=score", "--nodes=2", "--node-address=h:\u00b2"],
            "no port from 1 to 65535",
        ),
        (["queue", "list", "--last", HUGE], "--last"),
        (["plan", "--prompt-tokens", "1e300"], "--prompt-tokens"),
        (["plan", "--think-tokens", "1e300"], "--think-tokens"),
        (["plan", "--no-think-tokens", "1e300"], "--no-think-tokens"),
        (["plan", "--price", "1e308", "--json"], "--price"),
        (["plan", "--hardware", "usd_per_hour: 1.0e+308", "--json"], "usd_per_hour"),
        (["plan", "--hardware", "bandwidth: 1.0e-320", "--json"], "bandwidth"),
        (["plan", "--hardware", "latency: {train: 1.0e+308}", "--json"], "latency.train"),
        (["plan", "--hardware", "shares: {score: 1.0e-320}", "--json"], "shares.score"),
        (["plan", "--hardware", "tflops: {bf16: 1.0e+308}", "--json"], "tflops.bf16"),
        (["run", "--processes", "1000000000"], "--processes"),
        (["run", "--dry-run", "--processes", "1000000000"], "--processes"),
        (["run", "--nodes", "1000000000", "--node-address", "h"], "--nodes"),
        (["run", "--nodes", "2", "--node-rank", "1000000000", "--node-address", "h"], "--node-rank"),
        (["teacher", "serve", "--teacher=tiny", "--role=score", "--tp", "1000000000"], "--tp"),
        (["teacher", "serve", "--teacher=tiny", "--role=score", "--pp", "1000000000"], "--pp"),
        (["teacher", "serve", "--teacher=tiny", "--role=score", "--replicas", "1000000000"], "--replicas"),
        (["teacher", "serve", "--teacher=tiny", "--role=score", "--nodes", "1000000000"], "--nodes"),
        (["eval", "tiny", "--questions", "1000000", "--samples", "1000000"], "has 10,000 questions at the most"),
        (["eval", "tiny", "--questions", "1001", "--samples", "1000"], "1,001 questions with 1,000 responses each"),
        (["eval", "tiny", "--samples", "1000000"], "512 questions with 1,000,000 responses each"),
        (["eval", "tiny", "--questions", "1000000"], "has 10,000 questions at the most"),
        (["eval", "tiny", "--task", "mode_switching", "--questions", "1000000"], "2,500 conversations"),
        (["eval", "tiny", "--task", "own.jsonl", "--samples", "1000000"], "2 questions with 1,000,000 responses each"),
        (["eval", "tiny", "--questions", HUGE], "--questions"),
        (["eval", "tiny", "--samples", HUGE], "--samples"),
        (["eval", "tiny", "--max-new-tokens", HUGE], "--max-new-tokens"),
        (["eval", "tiny", "--seed", HUGE], "--seed"),
        (["eval", "tiny", "--budget", "9" * 5000], "--budget"),
        (["eval", "tiny", "--pass-at", HUGE], "--pass-at"),
        (["worker", "--once", "--slots", "99999999999"], "--slots"),
        (["preview", "--first", "1" + "0" * 23], "--first"),
        (["responses", "show", "--first", HUGE], "--first"),
    ],
    ids=lambda value: " ".join(value)[:60].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_a_number_that_nothing_could_have_is_a_sentence(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_QUEUE", str(tmp_path / "queue"))
    Path("own.jsonl").write_text('{"prompt": "3+4=", "answer": "7"}\n{"prompt": "3+5=", "answer": "8"}\n')
    if "--hardware" in arguments:
        place = arguments.index("--hardware") + 1
        Path("own.yaml").write_text(f"H100:\n  {arguments[place]}\n")
        arguments = [*arguments[:place], "own.yaml", *arguments[place + 1 :]]
    code, out, err = typed(*arguments)
    assert code == 2 and says in err and "Traceback" not in err and out == "", err


def test_the_largest_numbers_that_are_taken_make_a_plan(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "H100:\n  bandwidth: 1.0e-6\n  link: 1.0e-6\n  network: 1.0e-6\n  tflops: {fp32: 1.0e-6, bf16: 1.0e-6}\n"
        "  shares: {train: 1.0e-9, score: 1.0e-9, sample: 1.0e-9, serve: 1.0e-9}\n  bandwidth_share: 1.0e-9\n"
        "  latency: {train: 1.0e+9, score: 1.0e+9, sample: 1.0e+9, serve: 1.0e+9}\n"
    )
    for more in (["--json"], []):
        code, out, err = typed("plan", "--gpus=8xH100", f"--hardware={tmp_path / 'own.yaml'}", "--price=1e6", *more)
        assert code == 0 and out, err
        code, out, err = typed("plan", "--gpus=8xH100", "--prompt-tokens=1e9", "--think-tokens=1e9", *more)
        # Whether it fits or not, it is said.
        assert code in (0, 2) and (out or err.startswith("distill: ")), err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("gpu-1", ("gpu-1",)),
        ("gpu-1:29500", ("gpu-1", 29500)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[fd00::1]:8000", ("[fd00::1]", 8000)),
        ("[fd00::1]", ("[fd00::1]",)),
        ("fd00::abcd", ("fd00::abcd",)),
    ],
)
def test_an_address_is_a_host_and_perhaps_a_port(address: str, expected: tuple[Any, ...]) -> None:
    assert one_of_many(lambda num, rank, *where: where, 2, 1, address) == expected


def test_drawing_questions_hears_a_signal() -> None:
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError, match="SIGTERM"):
            load_task("embedded", num_questions=8)
