"""``distill init`` and ``distill config``: what they write is what a run takes, and what they say is stable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from distill.comparison import ComparisonConfig
from distill.config import RunConfig
from distill.documented import documented_yaml
from distill.errors import UserError
from distill.evaluation_config import TaskSettings
from distill.recipe import parse_yaml, recipe_schema, validate, validate_as
from pipelines.resolution import check_names, copy_recipe, recipe_names, recipe_text, resolve_comparison, resolve_run


@pytest.mark.parametrize("name", recipe_names())
def test_a_copied_recipe_is_the_recipe_with_its_comments(name: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "own.yaml"
    copy_recipe(name, file)
    assert resolve_run(recipe=str(file)) == resolve_run(recipe=name)
    text = file.read_text()
    assert text.endswith(recipe_text(name)) and text.count("\n# ") >= 2
    jsonschema.validate(parse_yaml(text, where=name), recipe_schema())


def test_init_leaves_a_file_that_is_there_as_it_is(typed: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    code, out, _ = typed("init", str(file), "--json")
    assert (code, json.loads(out)) == (0, {"recipe": "embedded", "file": str(file)})
    file.write_text("years of work")
    code, out, err = typed("init", str(file))
    assert (code, out) == (2, "") and "is there already" in err
    assert file.read_text() == "years of work"
    for arguments, sentence in (
        ([str(tmp_path / "b.yaml"), "--recipe", "embeded"], "did you mean embedded"),
        ([str(file / "below.yaml")], "cannot be written"),
    ):
        code, out, err = typed("init", *arguments)
        assert (code, out) == (2, "") and sentence in err and "Traceback" not in err


def test_show_prints_a_recipe_for_the_same_configuration(typed: Any) -> None:
    arguments = ("--recipe", "qwen3", "--set", "stages.on_policy.steps=7", "--seed", "3", "--student", "8B")
    config = resolve_run(recipe="qwen3", assignments=["stages.on_policy.steps=7"], seed=3, student="8B")
    for more in ((), ("--docs",), ("--json",)):
        code, out, _ = typed("config", "show", *arguments, *more)
        assert code == 0
        assert validate(parse_yaml(out, where="what was shown")) == config, more
    assert json.loads(out)["stages"]["on_policy"]["steps"] == 7


def test_documentation_stands_above_its_key_at_every_depth() -> None:
    tasks = ("gsm8k", TaskSettings(path="my.jsonl", label="yes"))
    base = resolve_run(
        recipe="opd-then-grpo", assignments=["evaluation.curve={every: 5}", "specialists.no={model: tiny}"]
    )
    config = base.model_copy(update={"evaluation": base.evaluation.model_copy(update={"tasks": tasks})})
    text = documented_yaml(config)
    assert validate(parse_yaml(text, where="the text")) == config
    lines = [line.strip() for line in text.splitlines()]
    for key in ("kl_coefficient: 0.0", "pass_at: []", "checkpoint_every: 25", "top_k: 20", "signal: hidden"):
        assert lines[lines.index(key) - 1].startswith("# "), key
    assert all(len(line) <= 120 for line in lines)


def test_validate_names_what_is_wrong_and_opens_nothing(typed: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: embedded\nname: mine\n")
    code, out, _ = typed("config", "validate", str(own), "--json")
    assert (code, json.loads(out)) == (0, {"recipe": str(own), "valid": True, "problem": None})
    for assignment, sentence in (
        ("stages.on_policy.stepz=3", "did you mean steps?"),
        ("seed=many", "seed: Input should be a valid integer"),
        ("teacher.model=5B", "nearest: 235B"),
        ("student.model=235B", "no base checkpoint"),
        ("specialists.maths={model: 33B}", "nearest: "),
        ("evaluation.tasks=[embeded]", "nearest: embedded"),
        ("evaluation.tasks=[{name: embedded, grader: vibes}]", "no grader is called 'vibes'"),
        ("evaluation.curve={task: gsm9k}", "nearest: gsm8k"),
        (f"prompts={{kind: file, path: {tmp_path}/none.jsonl}}", "there is no file"),
        ("stages.rl={kind: grpo, policy_gradient: {grader: vibes}}", "no grader is called 'vibes'"),
    ):
        code, out, err = typed("config", "validate", str(own), "--set", assignment, "--json")
        document = json.loads(out)
        assert code == 2 and sentence in err and "Traceback" not in err, (assignment, err)
        assert set(document) == {"recipe", "valid", "problem"} and not document["valid"]
        assert sentence in document["problem"]
    with pytest.raises(UserError):
        check_names(resolve_run(assignments=["teacher.model=5B"]))


def test_a_comparison_is_shown_and_validated_too(typed: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    assert typed("init", str(own), "--recipe", "table21")[0] == 0
    for more in ((), ("--docs",), ("--json",)):
        code, out, _ = typed("config", "show", "--recipe", str(own), *more)
        shown = validate_as(ComparisonConfig, parse_yaml(out, where="what was shown"), where="it")
        assert code == 0 and shown == resolve_comparison("table21"), more
    code, out, _ = typed("config", "validate", str(own))
    assert (code, out) == (0, f"{own} is valid: a comparison of 24 runs\n")
    job = tmp_path / "job.yaml"
    job.write_text("extends: table21\nschedule: {cron: 0 2 * * *}\n")
    code, _, err = typed("config", "validate", str(job))
    assert code == 2 and "is a comparison of several runs" in err and "schedule of a job" in err
    for wrong, sentence in (("common.teacher.model=5B", "nearest: 235B"), ("sed=1", "did you mean seeds?")):
        code, _, err = typed("config", "validate", str(own), "--set", wrong)
        assert code == 2 and sentence in err
    code, _, err = typed("config", "show", "--recipe", str(own), "--teacher", "4B")
    assert code == 2 and "--set common." in err


JOB = """
extends: embedded
schedule: {cron: "0 2 * * *"}
launch: {gpus: 8xH100, slurm: {time: 60}}
"""


def test_a_job_file_is_validated_with_its_blocks(typed: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(JOB)
    code, out, _ = typed("config", "validate", str(own), "--set", "launch.slurm.partition=gpu", "--set", "seed=3")
    said = "tiny to nano, stages off_policy, on_policy, with what it says of schedule and launch"
    assert (code, out) == (0, f"{own} is valid: {said}\n")
    sweep = "sweep={runs: [{student: {model: nano}}, {student: {model: nano-moe}, name: experts}]}"
    code, out, _ = typed("config", "validate", str(own), "--set", sweep)
    assert code == 0 and "a sweep of 2 runs, tiny-to-nano, experts, with" in out
    for assignment, sentence in (
        ("launch.gpuss=8xH100", "did you mean gpus?"),
        ("launch.slurm.time=soon", "launch is not valid: slurm.time"),
        ("launch.environment={HF_TOKEN: x}", "looks like a secret"),
        ("schedule.cron=99 2 * * *", "bad minute"),
        ("schedule.when=new_data", "prompts.kind is embedded, which does not grow"),
        ("sweep.runz=[]", "did you mean runs?"),
        ("sweep={runs: [{}, {}]}", "give each its own name"),
        ("sweep={runs: [{student: {model: nanno}}]}", "nearest: nano"),
        ("stages.on_policy.stepz=3", "did you mean steps?"),
    ):
        code, out, err = typed("config", "validate", str(own), "--set", assignment, "--json")
        document = json.loads(out)
        assert code == 2 and sentence in err and not document["valid"], (assignment, err)
        assert sentence in document["problem"]


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["preview"], ["plan"], ["config", "show"]])
def test_a_run_has_no_blocks_of_a_job_file(typed: Any, tmp_path: Path, command: list[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(JOB)
    for recipe in (str(own), "table21") if command[0] not in ("plan", "preview") else (str(own),):
        for block in ("schedule", "sweep", "launch"):
            code, out, err = typed(*command, "--recipe", recipe, "--set", f"{block}.foo=3")
            assert (code, out) == (2, "") and f"{block} is a block of a job file" in err, (recipe, err)


def test_the_schema_says_what_a_recipe_may_hold(typed: Any) -> None:
    code, out, _ = typed("config", "schema", "--json")
    schema = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert json.loads(typed("config", "schema")[1]) == schema
    assert set(RunConfig.model_fields) | {"extends"} == set(schema["properties"])
    assert "Optimiser steps between two checkpoints." in schema["properties"]["checkpoint_every"]["description"]
    for wrong in ({"sed": 1}, {"seed": -1}, {"stages": {"a": {"kind": "on_polcy"}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
