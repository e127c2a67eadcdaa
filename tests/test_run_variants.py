"""The same pipeline with other students and prompts: adapters, experts, 16 bits, one's own questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.prompts import load_prompts
from distill.recipe import dump_yaml
from pipelines.phases import reproducible
from pipelines.resolution import resolve_run
from pipelines.scores import Scores
from pipelines.strong_to_weak import run

SMALL = (
    "stages.off_policy.num_prompts=16",
    "stages.off_policy.batch_size=8",
    "stages.off_policy.epochs=1",
    "stages.on_policy.steps=2",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=4",
)


def small_run(out: Path, *assignments: str, **choices: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = resolve_run(assignments=[*SMALL, f"store={out.parent}/store", *assignments], **choices)
    summary = run(config, out, command=["a test"])
    return summary, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times aside."""
    return [reproducible(line) for line in metrics]


def forget_the_last_step(out: Path, *, step: int, stage: str) -> None:
    for name in ("student", f"checkpoints/step_{step}"):
        shutil.rmtree(out / name)
    for path in (out / "summary.json", *out.glob(f"eval/{stage}-*")):
        path.unlink()


def test_adapters_are_trained_resumed_and_merged(tmp_path: Path) -> None:
    adapters = ("student.lora={rank: 4, alpha: 8.0, dropout: 0.1}", "checkpoint_every=1")
    summary, metrics = small_run(tmp_path / "run", *adapters)
    assert len(metrics) == 4 and all(line["grad_norm"] > 0 for line in metrics)
    merged = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not any("lora" in name for name in merged)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student") is not None
    # As a kill after the third of the four steps leaves it: dropout, moments and adapters go on where they were.
    forget_the_last_step(tmp_path / "run", step=4, stage="on_policy")
    _, resumed = small_run(tmp_path / "run", *adapters)
    assert numbers(resumed) == numbers(metrics)
    again = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)
    # Frozen weights get no gradient: a training step costs two passes, not three.
    full, _ = small_run(tmp_path / "full")
    assert summary["costs"]["student_train"]["stages"]["off_policy"]["flops"] == pytest.approx(
        full["costs"]["student_train"]["stages"]["off_policy"]["flops"] * 2 / 3
    )


def test_adapters_of_a_bf16_student_end_a_run_as_its_last_checkpoint_holds_them(tmp_path: Path) -> None:
    """Killed behind that checkpoint, before the examination: what is examined and exported is the same."""
    out = tmp_path / "run"
    small = ("student.lora={rank: 8, alpha: 64.0}", "student.dtype=bfloat16", "stages.off_policy=null")
    small += ("evaluation.references=false", "stages.on_policy.optimiser={learning_rate: 0.01, warmup_steps: 0}")
    summary, _ = small_run(out, *small)
    student, checkpoint = load_file(out / "student" / "model.safetensors"), out / "checkpoints" / "step_2"
    examined = [pd.read_parquet(path) for path in sorted((out / "eval").glob("on_policy-*.parquet"))]
    shutil.rmtree(out / "student")
    for path in (out / "summary.json", *out.glob("eval/on_policy-*")):
        path.unlink()
    resumed, _ = small_run(out, *small)
    assert resumed["scores"] == summary["scores"]
    for frame, path in zip(examined, sorted((out / "eval").glob("on_policy-*.parquet")), strict=True):
        assert list(frame["response"]) == list(pd.read_parquet(path)["response"])
    for folder in (out / "student", checkpoint):
        again = load_file(folder / "model.safetensors")
        assert again.keys() == student.keys()
        assert sum(int((again[name] != student[name]).sum()) for name in student) == 0, folder


def test_a_mixture_of_experts_shows_its_load(tmp_path: Path) -> None:
    _, metrics = small_run(tmp_path / "run", student="nano-moe")
    assert all(1.0 <= line["router.max_load"] <= 4.0 and line["router.aux_loss"] > 0 for line in metrics)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.model_type == "qwen3_moe"


def test_sixteen_bits_with_checkpointing_and_micro_batches(tmp_path: Path) -> None:
    changes = ("student.dtype=bfloat16", "student.gradient_checkpointing=true", "student.micro_batch_tokens=128")
    _, metrics = small_run(tmp_path / "run", *changes, "stages.on_policy.divergence.kind=jsd")
    _, reference = small_run(tmp_path / "plain", "stages.on_policy.divergence.kind=jsd")
    # The first step sees the same weights and responses: only rounding to 16 bits may tell the two apart.
    assert metrics[0]["loss"] == pytest.approx(reference[0]["loss"], rel=0.02)
    assert 0 < metrics[2]["loss"] < 0.6931  # a Jensen-Shannon divergence at beta one half is at most log 2
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}


def test_ones_own_prompts_and_models_from_folders(tmp_path: Path, undistilled: tuple[Path, Path]) -> None:
    teacher, student = undistilled
    rows = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
    rows[3]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4*2= /no_think"}]
    prompts = tmp_path / "my.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, metrics = small_run(
        tmp_path / "run",
        # A folder is a real model to the command line: the embedded recipe's sizes are asked for by name.
        recipe="embedded",
        teacher=str(teacher),
        student=str(student),
        prompts=str(prompts),
    )
    assert {entry["task"] for entry in summary["scores"]} == {"prompts"}
    assert all(entry["num_questions"] == 4 for entry in summary["scores"])
    assert len(metrics) == 4


def test_a_task_whose_questions_are_trained_on_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "my.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = f"evaluation.tasks=[prompts, embedded, {{path: {prompts}, num_questions: 100}}]"
    config = resolve_run(assignments=[*SMALL, tasks], prompts=str(prompts))
    source = load_prompts(config.prompts, seed=0, max_prompt_tokens=100, count_tokens=len)
    Scores(config, source.held_out()).say_trained(source)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "trained on" in line]
    assert "95 of the 100 questions of the task my are" in said  # all but the five that are held out


def test_a_finished_run_that_was_moved_says_where_it_is(tmp_path: Path) -> None:
    config, moved = resolve_run(), tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(dump_yaml(config))
    (moved / "summary.json").write_text(json.dumps({"run": "runs/first", "scores": []}))
    (moved / "report.html").touch()
    assert run(config, moved, command=["a test"]) == {"run": str(moved), "scores": []}


def test_every_prompt_of_a_small_file_is_asked_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Asked again, a question would get the same response from the store, or be asked in both modes."""
    prompts = tmp_path / "my.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(3) for b in range(4)))
    small_run(tmp_path / "run", prompts=str(prompts))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    keys = set(manifest["stages"]["off_policy"]["responses"])
    assert len(keys) == 12
    stored = datasets.load_dataset("parquet", data_files=f"{tmp_path}/store/*/part-*.parquet", split="train")
    asked = [row["prompt_id"] for row in stored if row["key"] in keys]
    assert len(asked) == len(set(asked)) == 12
    assert "all 12 prompts are asked once, fewer than num_prompts 16" in capfd.readouterr().err


def test_own_prompts_without_answers_leave_the_embedded_pair_its_own_task(tmp_path: Path) -> None:
    prompts = tmp_path / "my.jsonl"
    prompts.write_text('{"prompt": "3+4="}\n{"prompt": "9-2=", "mode": "no_think"}\n')
    summary, _ = small_run(tmp_path / "run", prompts=str(prompts))
    assert {entry["task"] for entry in summary["scores"]} == {"embedded"}


def test_a_single_stage_is_measured_from_the_start(tmp_path: Path) -> None:
    """The student is the teacher, and the stage ruins it: there was no gap to close, whatever the stage did."""
    recipe = tmp_path / "one.yaml"
    recipe.write_text(
        """
        teacher: {model: tiny, dtype: float32}
        student: {model: tiny, dtype: float32, gradient_checkpointing: false}
        preflight: {same_weights: true}
        stages:
          off_policy:
            kind: off_policy
            optimiser: {learning_rate: 1.0, warmup_steps: 0}
            sampling: {think: {max_new_tokens: 96}, no_think: {max_new_tokens: 16}}
        evaluation:
          modes: [think]
          sampling: {think: {max_new_tokens: 96, temperature: 0.6}, no_think: {max_new_tokens: 16}}
        """
    )
    config = resolve_run(
        recipe=str(recipe),
        assignments=[*(text for text in SMALL if "on_policy" not in text), f"store={tmp_path}/store"],
    )
    summary = run(config, tmp_path / "run", command=["a test"])
    assert [entry["mean"] for entry in summary["scores"]] == [1.0, 1.0, 0.0]
    assert summary["gap_closed"] == {"think": None}


def test_a_store_that_cannot_be_had_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"store .*file cannot be made: .*--store or DISTILL_STORE"):
        small_run(tmp_path / "run", f"store={tmp_path}/file")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def undistilled(tmp_path: Path) -> tuple[Path, Path]:
    from distill.embedded import checkpoint_dir

    folders = (tmp_path / "big", tmp_path / "small")
    for folder, name in zip(folders, ("tiny", "nano"), strict=True):
        folder.mkdir()
        for file in checkpoint_dir(name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    return folders


def test_a_truncated_checkpoint_is_refused_and_claims_nothing(tmp_path: Path, undistilled: tuple[Path, Path]) -> None:
    _, student = undistilled
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        small_run(tmp_path / "run", recipe="embedded", student=str(student))
    # The directory is free for the next attempt, with another configuration too.
    small_run(tmp_path / "run")
