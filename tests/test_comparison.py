"""Comparisons: members that differ in what they should, arms that pay for their own, and the two headline numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from shapes import assert_document

from distill.errors import UserError
from distill.journal import write_json
from distill.recipe import dump_yaml
from distill.types import Sampling
from eval.compare import (
    Arm,
    _compute_at_equal_score,
    _goal,
    _score_at_equal_compute,
    _up_to,
    compare,
    read_curve,
    stage_flops,
)
from eval.comparison_table import columns, headlines, print_comparison
from eval.curves import Point
from eval.evaluation import summarise
from pipelines.comparison import ARMS, _claimed, check, compare_folders, members
from pipelines.resolution import comparison_names, is_comparison, resolve_comparison, resolve_run

TINY: dict[str, Any] = {
    "kind": "comparison",
    "recipe": "embedded",
    "seeds": [0],
    "starts": {"low": {"num_prompts": 48, "batch_size": 16}},
    "common": {
        "checkpoint_every": 2,
        "evaluation": {"num_questions": 8, "samples": 2, "curve": {"every": 2, "num_questions": 8, "keep_best": True}},
    },
    "arms": {
        "on_policy": {"stage": {"steps": 4, "prompts_per_step": 8}},
        "rl": {"stage": {"kind": "grpo", "steps": 500, "prompts_per_step": 2, "samples_per_prompt": 4}},
    },
    "rl_flops": 2,
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", comparison_names())
def test_every_shipped_comparison_has_valid_members(name: str, quick: bool, tmp_path: Path) -> None:
    config = resolve_comparison(name, quick=quick)
    configs = dict(check(config, tmp_path))
    assert is_comparison(name) and set(configs) == set(members(config))
    for member, found in configs.items():
        assert found.seed == member.seed and list(found.stages) == [member.arm]
        assert found.evaluation.curve is not None and found.evaluation.curve.keep_best
        if member.arm != "off_policy":
            # The same start, and questions that it has not seen.
            assert found.student.model.endswith(f"{member.start}/off_policy-seed{member.seed}/student")
            assert found.first_prompt == config.starts[member.start].get("num_prompts", 1024)
            assert not found.evaluation.references
    # Some of them ask the same questions, and each one pays for its answers.
    assert len({found.store for found in configs.values()}) == len(configs)


def test_arms_of_table21_see_the_same_prompts_in_the_same_modes(tmp_path: Path) -> None:
    config = resolve_comparison("table21")
    on_policy, rl = (
        next(found for member, found in check(config, tmp_path) if member.arm == arm).stages[arm]
        for arm in ("on_policy", "rl")
    )
    assert (on_policy.kind, rl.kind) == ("on_policy", "grpo")
    assert on_policy.mixture == rl.mixture and on_policy.sampling == rl.sampling


def test_arms_begin_behind_the_questions_of_a_start_that_leaves_their_number_open(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: {off_policy: {kind: off_policy}}\n")
    assignments = [f"recipe={tmp_path / 'mine.yaml'}", "arms.on_policy.stage.kind=on_policy"]
    config = resolve_comparison("table21", assignments=assignments)
    found = {member.arm: run for member, run in check(config, tmp_path) if member.start == "low"}
    asked = found["off_policy"].stages["off_policy"].num_prompts
    assert {run.first_prompt for arm, run in found.items() if arm != "off_policy"} == {asked} and asked > 0


def test_what_is_wrong_with_a_comparison_is_said_before_anything_runs(tmp_path: Path) -> None:
    for assignments, said in (
        (["seeds=[0, 0]"], "seed twice"),
        (["rl_flop=3"], "did you mean rl_flops"),
        (["arms.on_policy.stage.stepz=3"], "did you mean steps"),
        (["common.evaluation.curve=null"], "common.evaluation.curve is null"),
        (["recipe=embeded"], "did you mean embedded"),
    ):
        with pytest.raises(UserError, match=said):
            check(resolve_comparison("table21", assignments=assignments), tmp_path)
    with pytest.raises(UserError, match="a comparison of several runs"):
        resolve_run(recipe="table21")
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_needed_too_much_at_once_goes_on_with_less(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for assignment in ("parallel=4", "parallel=1"):
        with _claimed(out, resolve_comparison("table21", assignments=[assignment])):
            pass
    with (
        pytest.raises(UserError, match=r"rl_flops is 10\.0 there"),
        _claimed(out, resolve_comparison("table21", assignments=["rl_flops=3"])),
    ):
        pass


def working_in(folder: Path) -> list[str]:
    """Command lines of the processes that name ``folder``."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line]


def distill(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--recipe", "table21", "--teacher", "4B"], "--teacher is an option of a single run"),
        (["run", "--quick"], "--quick is the short variant of a comparison"),
        (["compare", "nowhere", "nowhere-else"], "nowhere is not there"),
        (["compare", ".", "tests"], "is no run directory"),
        (["compare", "."], "two run directories or more"),
    ],
)
def test_usage(typed: Callable[..., tuple[int, str, str]], arguments: list[str], said: str) -> None:
    code, _, stderr = typed(*arguments)
    assert code == 2 and said in stderr and "Traceback" not in stderr


@pytest.mark.timeout(900)  # nine runs in turn
def test_a_whole_comparison_stopped_and_resumed(typed: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(out)]
    devnull, environment = subprocess.DEVNULL, {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": devnull, "stderr": devnull, "env": environment}
    process = subprocess.Popen(command, **quiet)
    metrics = out / "low" / "on_policy-seed0" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and not (metrics.parent / "summary.json").exists()

    # Killed, it takes the member that is at work along; that one has a checkpoint to go on from.
    process = subprocess.Popen(command, **quiet)
    while process.poll() is None and not any(out.glob("low/off_policy_more-seed0/checkpoints/step_*")):
        time.sleep(0.05)
    assert process.poll() is None, "it has come to its end"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (left := working_in(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left

    result = distill("run", "--recipe", str(recipe), "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    document = assert_document("run of a comparison", result.stdout)
    assert list(document["arms"]) == list(ARMS) and document["seeds"] == 1
    runs = {arm: Path(document["arms"][arm]["runs"][0]) for arm in ARMS}
    assert all((folder / "summary.json").exists() for folder in runs.values())

    flops = {arm: document["arms"][arm]["flops"] for arm in ARMS}
    told = yaml.safe_load((runs["rl"] / "config.yaml").read_text())["stop"]["rl"]
    assert told["flops"] == pytest.approx(2 * flops["on_policy"])
    assert told["score"] == max(point.score for point in read_curve(runs["on_policy"], "on_policy"))
    # It pays for fresh responses; a batch of 8 or 16 short ones is as exact as it gets here.
    assert flops["off_policy_more"] == pytest.approx(flops["on_policy"], rel=0.35)
    assert document["arms"]["off_policy_more"]["device_seconds"]["teacher_generate"] > 0

    starts = {arm: read_curve(folder, arm)[0].score for arm, folder in runs.items()}
    best = max(point.score for point in read_curve(runs["off_policy"], "off_policy"))
    assert starts["on_policy"] == starts["rl"] == starts["off_policy_more"] == best
    assert {(entry["a"], entry["b"]) for entry in document["paired"]} == {
        (b, a) for place, a in enumerate(ARMS) for b in ARMS[place + 1 :]
    }
    assert document["compute_at_equal_score"]["by_seed"][0]["flops_b"] >= 0
    assert set(document["score_at_equal_compute"]["arms"]) == set(ARMS)
    assert json.loads((out / "comparison.json").read_text()) == document
    # The door shows the same, from the folder and from its members.
    assert assert_document("compare", typed("compare", str(out), "--json")[1]) == document
    pair = compare_folders([runs["on_policy"], runs["rl"]])
    assert pair["compute_at_equal_score"] == {
        **document["compute_at_equal_score"],
        "a": "on_policy-seed0",
        "b": "rl-seed0",
    }
    print_comparison(document)


def test_runs_of_other_seeds_are_no_pairs(tmp_path: Path) -> None:
    folders = []
    for rate, seed in (("1e-3", 0), ("2e-3", 1)):
        config = resolve_run(seed=seed, assignments=[f"stages.on_policy.optimiser.learning_rate={rate}"])
        folders.append(tmp_path / f"rate{rate}-seed{seed}")
        folders[-1].mkdir()
        (folders[-1] / "config.yaml").write_text(dump_yaml(config))
    with pytest.raises(UserError, match="their seeds differ"):
        compare_folders(folders)


def finished_run(folder: Path, *, stage: str, curve: list[tuple[float, float]], goal: float | None = None) -> Path:
    """The files of a run that a comparison reads, but for its examinations."""
    folder.mkdir(parents=True)
    config = resolve_run()
    stop = {} if goal is None else {"stop": {stage: {"score": goal}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(dump_yaml(config)) | stop))
    lines = [json.dumps({"stage": stage, "flops": flops, "scores": [{"mean": score}]}) for flops, score in curve]
    (folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
    cost = {"tokens": 10, "flops": curve[-1][0] / 2, "seconds": 1.0}
    other = {"tokens": 1, "flops": 7.0, "seconds": 1.0}
    (folder / "costs.json").write_text(
        json.dumps({role: {"stages": {stage: cost, "before": other}} for role in ("student_train", "student_sample")})
    )
    return folder


def test_flops_are_the_stage_s_own(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", stage="rl", curve=[(0.0, 0.4), (8.0, 0.6)])
    assert stage_flops(folder, "rl") == 8.0


def test_a_run_that_was_stopped_at_its_goal_is_compared_at_the_goal(tmp_path: Path) -> None:
    """On-policy reached 0.8 at most, and the RL run was stopped at 0.8: its 0.84 is no score that on-policy missed."""
    ours = finished_run(tmp_path / "a", stage="on_policy", curve=[(0.0, 0.4), (1.0, 0.7), (2.0, 0.8)])
    theirs = finished_run(tmp_path / "b", stage="rl", curve=[(0.0, 0.4), (9.0, 0.7), (16.0, 0.84)], goal=0.8)
    assert _up_to(read_curve(theirs, "rl"), _goal(theirs, "rl"))[-1] == Point(16.0, 0.8)
    found = _compute_at_equal_score(Arm("a", "on_policy", (ours,)), Arm("b", "rl", (theirs,)))
    assert found["ratio"] == 2.0 / 16.0 and found["by_seed"][0]["b_reached_its_goal"]
    assert (
        "0.125 of its FLOPs"
        in headlines({"compute_at_equal_score": found, "score_at_equal_compute": {"flops": 2.0, "arms": {}}})[0]
    )


def test_scores_at_equal_compute_have_an_interval_over_seeds(tmp_path: Path) -> None:
    def arm(name: str, scores: list[float], *, cost: float = 2.0) -> Arm:
        runs = [
            finished_run(tmp_path / name / str(seed), stage=name, curve=[(cost, score), (9.0, 1.0)])
            for seed, score in enumerate(scores)
        ]
        return Arm(name, name, tuple(runs))

    ours = [finished_run(tmp_path / "on" / str(seed), stage="on", curve=[(0.0, 0.4), (2.0, 0.9)]) for seed in range(3)]
    arms = [
        Arm("on", "on", tuple(ours)),
        arm("rl", [0.5, 0.52, 0.54]),
        arm("more", [0.9, 1.0, 0.95]),
        arm("dear", [0.5, 0.5, 0.5], cost=3.0),
    ]
    document = _score_at_equal_compute(arms, arms[0])
    found = document["arms"]
    # Student's t of two degrees of freedom, 4.303, times .02 / sqrt(3).
    assert found["rl"]["mean"] == pytest.approx(0.52) and found["rl"]["by_seed"] == [0.5, 0.52, 0.54]
    assert found["rl"]["ci95"] == pytest.approx([0.52 - 0.049683, 0.52 + 0.049683], abs=1e-6)
    assert found["on"]["ci95"] == [0.9, 0.9] and found["more"]["ci95"][1] == 1.0
    assert found["dear"] == {"mean": None, "ci95": None, "by_seed": [None] * 3}
    one = [Arm(one.name, one.stage, one.folders[:1]) for one in arms]
    assert _score_at_equal_compute(one, one[0])["arms"]["rl"] == {"mean": 0.5, "ci95": None, "by_seed": [0.5]}
    ratio = _compute_at_equal_score(arms[0], arms[1])
    said = headlines({"compute_at_equal_score": ratio, "score_at_equal_compute": document})[1]
    assert "rl 52.0% (47.0% to 57.0% over seeds), " in said and said.endswith("dear -.")


def test_unfinished_runs_are_not_compared(tmp_path: Path) -> None:
    arms = [
        Arm(name, "rl", (finished_run(tmp_path / name, stage="rl", curve=[(0.0, 0.4), (8.0, 0.6)]),)) for name in "ab"
    ]
    with pytest.raises(UserError, match="holds no finished run"):
        compare(arms)


def examined(folder: Path, *, seed: int, stage: str, kind: str, samples: int = 2, rate: str = "1e-3") -> Path:
    """A finished run of one stage, and an examination of four questions."""
    finished_run(folder, stage=stage, curve=[(1.0, 0.4), (8.0, 0.6)])
    assignments = ["stages.off_policy=null", "stages.on_policy=null", f"stages.{stage}.kind={kind}"]
    config = resolve_run(seed=seed, assignments=[*assignments, f"stages.{stage}.optimiser.learning_rate={rate}"])
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "summary.json").write_text("{}")
    row: dict[str, Any] = dict.fromkeys(("num_tokens", "num_thinking_tokens", "num_prompt_tokens", "seconds"), 1)
    row |= dict.fromkeys(("broken", "unclosed"), False) | {"closed": True, "finish_reason": "stop", "thinking": ""}
    rows = [
        {**row, "prompt_id": str(question), "correct": (question + sample) % 2 == 0, "language": None, "domain": None}
        for question in range(4)
        for sample in range(samples)
    ]
    found = summarise(
        rows, checkpoint=stage, task="sums", mode="think", switch="hard", settings_hash="", seed=0,
        sampling=Sampling(8), samples=samples, pass_at=(), shape=None,
    )  # fmt: skip
    write_json(folder / "eval" / f"{stage}-sums-think.json", found.to_json())
    return folder


def test_arms_in_folders_of_one_name_are_all_there(tmp_path: Path) -> None:
    """Three arms, and the two of them that make the headline."""
    kinds = {"ours": ("opd", "on_policy"), "theirs": ("rl", "grpo"), "more": ("sft", "off_policy")}
    folders = [
        examined(tmp_path / name / f"seed{seed}", seed=seed, stage=stage, kind=kind)
        for name, (stage, kind) in kinds.items()
        for seed in (0, 1)
    ]
    found = compare_folders(folders)
    assert list(found["arms"]) == ["ours/seed0", "theirs/seed0", "more/seed0"] and found["seeds"] == 2
    assert len(found["paired"]) == 3 * 2  # two metrics a pair
    ratio = found["compute_at_equal_score"]
    assert (ratio["a"], ratio["b"], ratio["ratio"]) == ("ours/seed0", "theirs/seed0", 1.0)
    assert set(found["score_at_equal_compute"]["arms"]) == set(found["arms"])
    # Four questions, two responses each, two seeds: pass@2 is made of as many.
    counts = {entry["metric"]: entry["num_samples"] for entry in found["arms"]["more/seed0"]["scores"]}
    assert counts == {"avg@2": 16, "pass@2": 16}
    alone = compare_folders([folders[0], folders[2]])["arms"]["theirs/seed0"]["scores"]
    assert [entry["num_samples"] for entry in alone] == [8, 8]


def test_costs_of_runs_that_did_not_begin_alike_are_said_to_be_of_their_last_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = examined(tmp_path / "one", seed=0, stage="rl", kind="grpo")
    two = examined(tmp_path / "two", seed=0, stage="rl", kind="grpo", rate="2e-3")
    compare_folders([one, two])
    assert capsys.readouterr().err == ""
    tree = yaml.safe_load((two / "config.yaml").read_text())
    tree["stages"] = {"off_policy": {"kind": "off_policy"}, **tree["stages"]}
    (two / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    compare_folders([one, two])
    assert "costs are those of each run's last stage" in capsys.readouterr().err


def test_arms_without_a_score_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = examined(tmp_path / "one", seed=0, stage="rl", kind="grpo", samples=1)
    two = examined(tmp_path / "two", seed=0, stage="rl", kind="grpo", samples=2, rate="2e-3")
    with pytest.raises(UserError, match=r"no score in common: one has avg@1 of sums \(think\), and two avg@2"):
        compare_folders([one, two])
    three = examined(tmp_path / "three", seed=0, stage="rl", kind="grpo", samples=2, rate="3e-3")
    shutil.copy(one / "eval" / "rl-sums-think.json", three / "eval" / "another.json")
    assert {entry["metric"] for entry in compare_folders([one, three])["paired"]} == {"avg@1"}
    assert "not compared, as not every run has it: avg@2 of sums (think), pass@2" in capsys.readouterr().err


def test_a_column_shows_the_mean_and_pass_at_k_of_many_samples() -> None:
    def entry(task: str, mode: str, metric: str, mean: float) -> dict[str, Any]:
        return {"task": task, "mode": mode, "metric": metric, "mean": mean}

    scores = [
        entry("embedded", "think", "avg@4", 0.5),
        entry("embedded", "think", "pass@4", 0.7),
        entry("embedded-pass", "think", "avg@128", 0.51),
        entry("embedded-pass", "think", "pass@64", 0.9),
        entry("embedded", "no_think", "avg@4", 0.2),
        entry("embedded", "no_think", "pass@4", 0.4),
    ]
    found = columns({"arms": {"a": {"scores": scores}, "b": {"scores": scores[::-1]}}})
    assert found == {
        ("embedded", "think"): [("embedded", "avg@4"), ("embedded-pass", "pass@64")],
        ("embedded", "no_think"): [("embedded", "avg@4"), ("embedded", "pass@4")],
    }
