"""Every command's document: one line on standard output, of the shape that is pinned, and shown as it is.

A command that needs a server, a broken library or a whole comparison is held against its shape where that is tested.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shapes import assert_document, differences, shapes
from test_door import COMMANDS, documented

from distill import cli

TESTS = Path(__file__).parent

NAMES = {" ".join(path): path for path in COMMANDS}


def shapes_of(command: str) -> dict[str, Any]:
    """A command's shape, and those of its other documents: ``run --dry-run``, ``run of a comparison``."""
    return {name: shape for name, shape in shapes().items() if re.fullmatch(rf"{command}( (--|of ).*)?", name)}


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_a_shape(command: str) -> None:
    assert command in shapes(), f"tests/data/shapes.yaml has no shape of what distill {command} --json prints"


def test_every_shape_is_some_command_s_and_is_held_against_its_document() -> None:
    assert {name for command in NAMES for name in shapes_of(command)} == set(shapes())
    tests = "".join(file.read_text() for file in TESTS.glob("test_*.py"))
    assert [name for name in shapes() if f'document("{name}"' not in tests] == []


def examples(command: str) -> list[Any]:
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)```", documented(NAMES[command]), flags=re.DOTALL)]


@pytest.mark.parametrize("command", NAMES)
def test_what_is_shown_of_a_document_is_of_its_shape(command: str) -> None:
    shown = examples(command)
    # What is a word needs none: the configuration, a schema.
    assert shown or isinstance(shapes()[command], str)
    for example in shown:
        found = {name: differences(example, shape, name, is_example=True) for name, shape in shapes_of(command).items()}
        assert [] in found.values(), found
    assert not shown or not differences(shown[0], shapes()[command], command, is_example=True)


def keys(value: Any) -> Iterator[str]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(part)
    if isinstance(value, dict):
        yield from (key.removesuffix("?") for key in value)


def test_every_key_is_shown_somewhere() -> None:
    shown = {key for command in NAMES for example in examples(command) for key in keys(example)}
    # What a comparison has by start is a comparison itself.
    assert set(keys(shapes())) - {*shapes(), *shown, "", "*"} == {"starts"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": 1, "b": [{"c": None}]}, []),
        ({"a": 1, "b": [], "d": "x"}, []),
        ({"a": 1}, ["it has no b"]),
        ({"a": 1, "b": [], "e": 1}, ["it has a key e"]),
        ({"a": True, "b": []}, ["it.a is true, not count"]),
        ({"a": 1.0, "b": []}, ["it.a is 1.0, not count"]),
        ({"a": 1, "b": [{"c": None}, {"c": "z"}]}, ['it.b[1].c is "z", not x | y | null']),
        ({"a": 1, "b": {}}, ["it.b is {}, not a list"]),
        ([], ["it is [], not an object"]),
    ],
)
def test_a_shape_tells_what_is_not_of_it(value: Any, found: list[str]) -> None:
    shape = {"a": "count", "b": [{"c": "x | y | null"}], "d?": "text"}
    assert differences(value, shape, "it") == found
    assert differences({"...": 1, "a": 1}, shape, "it") == ["it has no b", "it has a key ..."]
    assert differences({"...": 1, "a": 1}, shape, "it", is_example=True) == []


Document = Callable[..., Any]


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Document:
    """Runs a command in a folder of its own and asserts that what it prints has the shape of that name."""
    monkeypatch.chdir(tmp_path)
    for variable, name in (("DISTILL_QUEUE", "queue"), ("DISTILL_STORE", "store")):
        monkeypatch.setenv(variable, str(tmp_path / name))

    def run(name: str, *arguments: str, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["distill", *name.partition(" of ")[0].split(), *arguments, "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        assert int(stopped.value.code or 0) == code, err
        return assert_document(name, out)

    return run


def test_configurations(document: Document) -> None:
    document("init", "mine.yaml")
    document("config show", "--recipe", "mine.yaml")
    document("config validate", "mine.yaml")
    document("config validate", "mine.yaml", "--set", "sed=1", code=2)
    document("config schema")
    document("preview", "--first", "1")


def test_schedules_and_jobs(document: Document, tmp_path: Path) -> None:
    (tmp_path / "nightly.yaml").write_text("extends: embedded\nschedule: {cron: 0 2 * * *}\n")
    document("schedule list")
    document("queue list")
    document("schedule add", "nightly.yaml")
    assert document("schedule run-now", "nightly")["schedule"] == "nightly"
    assert document("schedule list")["schedules"]
    document("schedule pause", "nightly")
    assert document("schedule show", "nightly")["next_due"] is None
    document("schedule resume", "nightly")
    document("queue add", "nightly.yaml", "--name", "other")
    document("queue cancel", "1")
    document("queue retry", "1")
    assert len(document("queue list")["jobs"]) == 2
    document("queue cancel", "2")
    assert document("schedule remove", "nightly")["unfinished_jobs"] == [1]
    document("queue cancel", "1")
    document("worker", "--once")


@pytest.mark.parametrize("on", ["slurm", "kubernetes", "skypilot"])
def test_launches(document: Document, tmp_path: Path, on: str) -> None:
    settings = (
        "slurm: {time: 60}, kubernetes: {namespace: a, volumes: [{claim: a, path: /a}]}, skypilot: {volumes: {/a: a}}"
    )
    launch = f"launch: {{gpus: 1xCPU, out: /a/runs, image: a, {settings}}}"
    (tmp_path / "big.yaml").write_text(
        f"extends: embedded\nschedule: {{termination_grace_period_seconds: 60}}\n{launch}\n"
    )
    document("launch", "big.yaml", "--on", on)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--teacher", "235B", "--student", "4B", "--gpus", "8xH200", "--price", "3.5"],
        ["--teacher", "235B", "--student", "8B", "--gpus-teacher", "8xH100", "--gpus-student", "8xA100-80"],
    ],
)
def test_plans(document: Document, arguments: list[str]) -> None:
    document("plan", *arguments)


@pytest.mark.parametrize("arguments", [[], ["--teacher", "me/model"], ["--teacher", "32B", "--student", "4B"]])
def test_dry_runs(document: Document, arguments: list[str]) -> None:
    document("run --dry-run", *arguments)


def test_a_dry_run_of_a_comparison(document: Document) -> None:
    document("run --dry-run of a comparison", "--recipe", "table21", "--quick")


def test_examinations(document: Document, tmp_path: Path) -> None:
    rows = [{"prompt": "3+4=", "answer": "7", "language": "en"}, {"prompt": "2*3=", "answer": "6", "domain": "sums"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = document("eval", "tiny", "--task", "mine.jsonl", "--samples", "2", "--budget", "8")
    assert found["slices"] and found["budget_curves"] and len(found["evaluations"]) == 3
    found = document("eval", "tiny", "--task", "mode_switching", "--questions", "1")
    assert found["mode_switching"][0]["leakage"] is not None


SMALL = (
    "stages.off_policy.num_prompts=8",
    "stages.off_policy.batch_size=8",
    "stages.on_policy.steps=1",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=2",
)


def test_a_run_and_what_is_made_of_it(document: Document) -> None:
    sets = [word for assignment in SMALL for word in ("--set", assignment)]
    for seed in ("0", "1"):
        document("run", "--out", f"run-{seed}", "--seed", seed, *sets)
    document("compare", "run-0", "run-1")
    document("report", "run-0")
    document("export", "run-0", "--to", "exported")
    assert document("responses ls")["collections"] and document("responses stats")["collections"]
    assert document("responses show", "--first", "20")["responses"]
