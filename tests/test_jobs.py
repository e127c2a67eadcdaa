"""Job files, and ``distill schedule``, ``queue`` and ``worker`` as they are typed: one document with ``--json``, and a
sentence for whatever is wrong."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from shapes import assert_document

from distill.errors import UserError
from distill.jobs import ScheduleSettings, read_job
from distill.recipe import dump_yaml, parse_assignment, parse_yaml
from pipelines.board import print_jobs
from pipelines.job import JobSpec, resolve_job
from pipelines.preparation import distill_run, prepare
from pipelines.queue import Queue
from pipelines.resolution import recipe_names, resolve_recipe, resolve_run

NIGHTLY = """
extends: embedded
student: {model: nano}
stages:
  on_policy: {steps: 3}
schedule:
  cron: "0 2 * * *"
  timezone: Europe/Berlin
  concurrency_policy: replace
  starting_deadline_seconds: 3600
  catch_up: none
  backoff_limit: 2
"""

SWEEP = """
extends: embedded
teacher: {model: tiny}
stages: {on_policy: {steps: 3}}
sweep:
  runs:
    - student: {model: nano}
    - student: {model: nano-moe}
      stages: {on_policy: null}
    - {name: long, stages: {on_policy: {steps: 9}}}
schedule: {gpu_slots: 2}
"""


@pytest.fixture
def typed(typed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command in a folder of its own, on a queue of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_QUEUE", str(tmp_path / "queue"))
    return typed


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_job_file_is_a_recipe_with_two_more_blocks(tmp_path: Path) -> None:
    file = written(tmp_path / "nightly.yaml", NIGHTLY)
    job = read_job(file)
    assert (job.schedule.cron, job.schedule.concurrency_policy, job.schedule.backoff_limit) == (
        "0 2 * * *",
        "replace",
        2,
    )
    # As a recipe it is a run; when it starts is not the run's affair.
    config = resolve_run(recipe=str(file))
    assert resolve_job(file).runs[0].config == config.model_dump(mode="json")
    # And a recipe is a job file.
    plain = written(tmp_path / "plain.yaml", dump_yaml(config))
    assert resolve_job(plain).settings == ScheduleSettings()
    assert resolve_job(plain).runs[0].config == config.model_dump(mode="json")


def test_a_sweep_is_a_run_for_each_overlay(tmp_path: Path) -> None:
    spec = resolve_job(written(tmp_path / "sizes.yaml", SWEEP))
    assert [run.folder for run in spec.runs] == ["tiny-to-nano", "tiny-to-nano-moe", "long"]
    assert [list(run.config["stages"]) for run in spec.runs][1] == ["off_policy"]
    assert [run.config["stages"]["on_policy"]["steps"] for run in (spec.runs[0], spec.runs[2])] == [3, 9]
    assert spec.share_teacher and spec.settings.gpu_slots == 2
    assert JobSpec.from_text(spec.to_text()) == spec
    with pytest.raises(UserError, match="sweep of 3 runs, not one; distill queue add"):
        resolve_run(recipe=str(tmp_path / "sizes.yaml"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("schedule: nightly", "schedule is not valid: configuration: Input should be a valid dictionary"),
        ("schedule: {corn: 0 2 * * *}", "unknown key corn (did you mean cron?"),
        ("schedule: {cron: 0 2 * *}", "has five fields"),
        ("schedule: {cron: 0 25 * * *}", "bad hour"),
        ("schedule: {cron: 0 0 30 2 *}", "bad day-of-month"),
        ("schedule: {cron: 0 0 31 4 *}", "bad day-of-month"),
        ("schedule: {timezone: Europe/Berln}", "did you mean Europe/Berlin?"),
        ("schedule: {gpu_slots: 0}", "gpu_slots"),
        ("schedule: {when: new_data}", "prompts.kind is embedded, which does not grow"),
        ("sweep: {runs: []}", "at least 1 item"),
        ("sweep: {runs: [{student: {model: nano}}, {student: {model: nano}}]}", "give each its own name"),
        ("sweep: {runs: [{}, {name: b, teacher: {model: nano}}]}", "another teacher than the first run"),
        ("sweep: {runs: [{store: here}]}", "runs.0 has a key store"),
        ("sweep: {runs: [{stages: {on_policy: {stps: 3}}}]}", "sweep.runs.0 is not valid: unknown key"),
        ("studnet: {model: nano}", "did you mean student?"),
        ("a: !!int x", "is not valid YAML"),
        ("a: !!set [x]", "is not valid YAML"),
        ("a: !!bool perhaps", "is not valid YAML"),
        ("a: !!timestamp 99-99", "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: " + "[" * 5000, "is not valid YAML"),
        ("a: &a {b: *a}", "holds itself"),
        ("prompts: {kind: file, path: ~no-such-user/x}", "no-such-user"),
        ("sweep: {runs: [{1: 2}]}", "runs.0.1"),
        ("student: {model: 5B}", "is no size, embedded model"),
        ("evaluation: {tasks: [embeded]}", "embedded"),
        ("- 1", "holds a list"),
    ],
)
def test_what_is_wrong_with_a_job_file_is_a_sentence(typed: Any, tmp_path: Path, text: str, sentence: str) -> None:
    base = "" if text.startswith(("- 1", "a: ")) else "extends: embedded\n"
    file = written(tmp_path / "job.yaml", base + text)
    code, out, err = typed("schedule", "add", str(file), "--cron", "0 2 * * *")
    if text.startswith("schedule: {cron"):
        code, out, err = typed("schedule", "add", str(file))
    assert (code, out) == (2, ""), err
    assert sentence in " ".join(err.split()) and "Traceback" not in err, err


def mutated(chance: random.Random, text: str) -> bytes:
    """A job file after a few accidents."""
    data = bytearray(text.encode())
    lines = text.splitlines()
    fragments = (
        *(
            "null",
            "true",
            "[]",
            "{}",
            "-1",
            "1e400",
            "99999999999999999999",
            ".nan",
            "''",
            "'\\0'",
            "*x",
            "&x",
            "!!int",
            "? a",
        ),
        *(
            "schedule:",
            "sweep:",
            "extends: embedded",
            "kind: file",
            "{runs: [1]}",
            "0 0 31 2 *",
            "*/0 * * * *",
            "@daily",
        ),
        *(": :", "- -", "%YAML 1.2", "---", "...", "\t", "\xff", "\u2028", "{a: {a: {a: 1}}}", "1: 2", "[1, 2]: 3"),
    )
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[at : at + chance.randint(1, 30)] = b""
            case 1:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
            case 2:
                data[at:at] = chance.choice(fragments).encode()
            case 3:
                data[at:at] = f"\n{chance.choice(fragments)}\n".encode()
            case 4:
                data[at:at] = (chance.choice(lines) + "\n").encode()
            case _:
                colon = data.find(b":", at)
                if colon >= 0:
                    rest = data.find(b"\n", colon)
                    data[colon + 1 : rest if rest >= 0 else None] = b" " + chance.choice(fragments).encode()
    return bytes(data)


ODD_VALUES: tuple[Any, ...] = (
    *(
        "~nobody/x",
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1e300,
        -0.5,
        "",
        "x",
        "*",
        "null",
        "runs/x",
        "no_think",
        "0 0 29 2 *",
        "x" * 3000,
    ),
    *([], {}, [[]], {"kind": "file"}, {"kind": "file", "path": "p"}, {"a": {"b": 1}}, [1, "a", None], {1: 2}, {"": ""}),
)


def disarranged(chance: random.Random, tree: Any) -> Any:
    """A job file's keys and values after a few changes of mind."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randint(1, 3)):
        blocks = [tree]
        for block in blocks:
            parts = block.values() if isinstance(block, dict) else block
            blocks += [part for part in parts if isinstance(part, dict | list) and part]
        block = chance.choice(blocks)
        key = chance.choice(list(block) if isinstance(block, dict) else range(len(block)))
        match chance.randrange(4):
            case 0:
                del block[key]
                if not tree:
                    return tree
            case 1 if isinstance(block, dict):
                block[chance.choice((f"{key}s", "extends", "sweep", "schedule", ""))] = block.pop(key)
            case _:
                # A copy: what is put into it later would else be in all of them, itself included.
                block[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return tree


def test_a_thousand_spoilt_job_files_are_sentences(tmp_path: Path) -> None:
    """Whatever is in a file: it is a job, or a UserError that says why not, which the command line exits 2 with."""
    chance, num = random.Random(0), 1000
    file = tmp_path / "job.yaml"
    whole = {**yaml.safe_load(NIGHTLY), **resolve_run().model_dump(mode="json")}
    trees = [yaml.safe_load(NIGHTLY), yaml.safe_load(SWEEP), whole]
    jobs = 0
    for number in range(num):
        if number % 2:
            file.write_bytes(mutated(chance, chance.choice((NIGHTLY, SWEEP))))
        else:
            file.write_text(yaml.safe_dump(disarranged(chance, chance.choice(trees))))
        try:
            spec = resolve_job(file)
        except UserError as error:
            assert error.exit_code == 2 and len(str(error)) > 20
        else:
            jobs += 1
            assert JobSpec.from_text(spec.to_text()) == spec, number
    assert 0 < jobs < num / 2


def test_schedules_as_documents(typed: Any, tmp_path: Path) -> None:
    file = str(written(tmp_path / "nightly.yaml", NIGHTLY))

    def document(*arguments: str) -> Any:
        code, out, err = typed(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    added = document("schedule", "add", file)
    keys = {"name", "paused", "next_due", "created", "cwd", "out", "schedule", "runs"}
    assert set(added) == keys | {"upcoming"}
    assert (added["name"], added["runs"], added["out"]) == ("nightly", ["tiny-to-nano"], str(tmp_path / "runs/nightly"))
    assert added["upcoming"][0] == added["next_due"] and len(added["upcoming"]) == 3
    assert {entry["name"] for entry in document("schedule", "list")["schedules"]} == {"nightly"}
    assert set(document("schedule", "list")["schedules"][0]) == keys
    assert document("schedule", "pause", "nightly")["paused"]
    assert not document("schedule", "resume", "nightly")["paused"]
    job = document("schedule", "run-now", "nightly")
    job_keys = {
        *("id", "name", "schedule", "due", "state", "reason", "exit_code", "failures", "seconds", "created"),
        *("not_before", "started", "finished", "gpu_slots", "runs"),
    }
    assert set(job) == job_keys and (job["state"], job["schedule"]) == ("queued", "nightly")
    shown = document("schedule", "show", "nightly")
    assert set(shown) == keys | {"upcoming", "jobs", "missed"} and shown["jobs"] == [job]
    assert document("queue", "list")["jobs"] == [job]
    assert document("queue", "cancel", "1")["state"] == "cancelled"
    assert document("queue", "retry", "1")["state"] == "queued"
    assert document("queue", "add", file, "--name", "once", "--out", "elsewhere")["runs"][0].startswith(
        str(tmp_path / "elsewhere")
    )
    assert document("schedule", "remove", "nightly") == {"name": "nightly", "unfinished_jobs": [1]}
    assert document("schedule", "list") == {"schedules": []}
    # For people the same in words.
    for arguments in (
        ("schedule", "list"),
        ("queue", "list"),
        ("schedule", "add", file),
        ("schedule", "show", "nightly"),
    ):
        code, out, _ = typed(*arguments)
        assert code == 0 and out


def test_a_narrow_terminal_shows_the_numbers_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    queue = Queue(tmp_path / "queue")
    job = queue.add(resolve_job(written(tmp_path / "nightly.yaml", NIGHTLY)))
    reason = "its configuration or input is wrong (exit code 2); the log says what"
    print_jobs([{**job.to_json(), "state": "failed", "reason": reason}])
    out = capfd.readouterr().out
    assert "1    nightly  -    failed" in out and max(map(len, out.splitlines())) <= 70
    assert all(word in out for word in reason.split())


def test_a_schedule_is_shown_with_what_is_not_the_default(typed: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "nightly.yaml", NIGHTLY)
    _, out, _ = typed("schedule", "add", str(file))
    shown = "concurrency_policy replace, starting_deadline_seconds 3600, catch_up none, backoff_limit 2"
    assert " ".join(out.split()).endswith(f"below {tmp_path / 'runs' / 'nightly'} {shown}"), out
    plain = written(tmp_path / "plain.yaml", "extends: embedded\n")
    _, out, _ = typed("schedule", "add", str(plain), "--cron", "0 2 * * *")
    assert " ".join(out.split()).endswith(f"below {tmp_path / 'runs' / 'plain'}"), out


def test_a_worker_and_logs_as_documents(typed: Any, tmp_path: Path) -> None:
    """The job is a real ``distill run``, of a student that is not there any more."""
    (tmp_path / "student").mkdir()
    file = written(tmp_path / "lost.yaml", "extends: embedded\nstudent: {model: ./student}\n")
    assert typed("queue", "add", str(file))[0] == 0
    (tmp_path / "student").rmdir()
    assert typed("queue", "logs", "1")[0] == 2
    code, out, err = typed("worker", "--once", "--json")
    document = assert_document("worker", out)
    assert (code, [job["state"] for job in document["jobs"]], document["jobs"][0]["exit_code"]) == (1, ["failed"], 2), (
        err
    )
    code, out, _ = typed("queue", "logs", "1", "--json")
    document = assert_document("queue logs", out)
    assert (document["attempt"], len(document["attempts"])) == (1, 1)
    assert "is no size, embedded model, folder or hub id" in " ".join(document["text"].split())
    assert typed("queue", "logs", "1")[1] == document["text"]
    Path(document["attempts"][0]["log"]).unlink()
    for more in ((), ("--json",)):
        code, out, err = typed("queue", "logs", "1", *more)
        assert (code, out) == (2, "") and "the log of attempt 1 at job 1 is gone" in " ".join(err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        *(("queue", "list"), ("queue", "cancel", "1"), ("queue", "retry", "1"), ("queue", "logs", "1")),
        *(
            ("schedule", "list"),
            *(("schedule", word, "x") for word in ("show", "pause", "resume", "remove", "run-now")),
        ),
    ],
)
def test_a_mistyped_queue_is_not_made(typed: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("mistyped", "empty"):
        code, out, err = typed(*arguments, "--queue", folder)
        assert (code, out) == (2, "") and f"there is no queue in {folder}" in " ".join(err.split()), err
    assert not (tmp_path / "mistyped").exists() and list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("queue", "add", "gone.yaml"), ("schedule", "add", "gone.yaml"), ("schedule", "add", "plain.yaml")]
)
def test_a_job_that_is_none_makes_no_queue(typed: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    written(tmp_path / "plain.yaml", "extends: embedded\n")  # it has no cron
    assert typed(*arguments, "--queue", "typo")[:2] == (2, "")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("command", "key"), [("queue", "jobs"), ("schedule", "schedules")])
def test_a_machine_without_a_queue_has_no_jobs(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, key: str
) -> None:
    assert typed(command, "list", "--json")[0] == 0  # DISTILL_QUEUE names a folder that is not there yet
    monkeypatch.delenv("DISTILL_QUEUE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code, out, err = typed(command, "list", "--json")
    assert (code, json.loads(out)) == (0, {key: []}) and "there is no queue in" in err
    code, out, _ = typed(command, "list")
    assert code == 0 and out.startswith(f"no {key}")
    # To look makes nothing, and a path that can be no folder is still a mistake.
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "file", "")
    monkeypatch.setenv("DISTILL_QUEUE", str(tmp_path / "file"))
    assert typed(command, "list", "--json")[:2] == (2, "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("schedule", "add", "gone.yaml"), "gone.yaml cannot be read"),
        (("schedule", "add", "plain.yaml"), "says nothing of when it runs"),
        (("schedule", "add", "plain.yaml", "--cron", "often"), "five fields"),
        (("schedule", "add", "plain.yaml", "--cron", "0 2 * * *", "--timezone", "Berlin"), "no such time zone"),
        (("schedule", "add", "plain.yaml", "--cron", "0 2 * * *", "--name", "../up"), "is no name"),
        (("schedule", "show", "nightly"), "there is no schedule nightly; known: none"),
        (("schedule", "remove", "nightly"), "there is no schedule nightly"),
        (("schedule", "pause", "nightly"), "there is no schedule nightly"),
        (("queue", "cancel", "7"), "there is no job 7"),
        (("queue", "retry", "99999999999999999999"), "9223372036854775807"),
        (("queue", "list", "--queue", "plain.yaml"), "there is no queue in plain.yaml"),
        (("queue", "add", "plain.yaml", "--queue", "plain.yaml"), "plain.yaml cannot be had"),
        (("queue", "list", "--queue", "broken"), "cannot be used as a queue"),
        (("worker", "--once", "--gpus", ""), "--gpus"),
    ],
)
def test_wrong_commands_are_sentences(typed: Any, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    written(tmp_path / "plain.yaml", "extends: embedded\n")
    (tmp_path / "broken").mkdir()
    written(tmp_path / "broken" / "queue.db", "years of work " * 100)
    Queue(tmp_path / "queue").close()
    code, out, err = typed(*arguments)
    assert (code, out) == (2, ""), err
    assert sentence in " ".join(err.split()) and "Traceback" not in err, err


def test_what_a_queued_job_does_not_read_of_its_schedule_is_said(typed: Any, tmp_path: Path) -> None:
    block = "schedule: {cron: 0 2 * * *, start_from: last, backoff_limit: 2, timezone: Europe/Berlin}"
    written(tmp_path / "job.yaml", f"extends: embedded\n{block}\n")
    code, out, err = typed("queue", "add", "job.yaml", "--json")
    assert code == 0 and json.loads(out)["id"] == 1
    assert "job 1 runs once: of its schedule block cron, start_from play no part" in err
    written(tmp_path / "job.yaml", "extends: embedded\nschedule: {backoff_limit: 2}\n")
    assert "no part" not in typed("queue", "add", "job.yaml")[2]


def test_what_a_job_runs_with_is_laid_down_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    queue = Queue(tmp_path / "queue")
    single = queue.add(resolve_job(written(tmp_path / "nightly.yaml", NIGHTLY)))
    prepare(queue, single, last=None)
    command = distill_run(queue.job_folder(single.id))
    assert command[1:4] == ["-m", "distill.cli", "run"] and command[-1] == str(single.out)
    recipe = Path(command[command.index("--recipe") + 1])
    # What the command will find is what was resolved.
    assert resolve_run(recipe=str(recipe)).model_dump(mode="json") == single.spec.runs[0].config
    sweep = queue.add(resolve_job(written(tmp_path / "sizes.yaml", SWEEP)))
    prepare(queue, sweep, last=None)
    assert distill_run(queue.job_folder(sweep.id))[1:3] == ["-m", "pipelines.sweep"]
    entries = json.loads((queue.job_folder(sweep.id) / "job.json").read_text())["runs"]
    assert [Path(entry["out"]) for entry in entries] == [sweep.out / run.folder for run in sweep.spec.runs]


def test_a_folder_of_an_earlier_queue_is_no_jobs_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = resolve_job(written(tmp_path / "nightly.yaml", NIGHTLY))
    before = Queue(tmp_path / "queue")
    prepare(before, before.add(spec), last=None)
    before.close()
    for file in (tmp_path / "queue").glob("queue.db*"):
        file.unlink()
    queue = Queue(tmp_path / "queue")
    job = queue.add(spec)
    assert job.id == 1
    with pytest.raises(UserError, match="jobs/1 holds what another job of this number runs with"):
        prepare(queue, job, last=None)
    queue.job_folder(1).rename(tmp_path / "away")
    for _ in range(2):
        prepare(queue, queue.job(1), last=None)


def test_a_run_starts_from_the_last_runs_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    queue = Queue(tmp_path / "queue")
    spec = resolve_job(written(tmp_path / "on.yaml", SWEEP), schedule={"start_from": "last"})
    first, second = queue.add(spec), queue.add(spec)
    for job, last in ((first, None), (second, first)):
        prepare(queue, job, last=last)
    models = {
        job.id: [
            yaml.safe_load((queue.job_folder(job.id) / f"{run.folder}.yaml").read_text())["student"]["model"]
            for run in spec.runs
        ]
        for job in (first, second)
    }
    assert models[first.id] == ["nano", "nano-moe", "nano"]
    assert models[second.id] == [str(first.out / run.folder / "student") for run in spec.runs]


def test_a_student_that_the_last_run_did_not_have_is_the_configured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A schedule that was added anew, with another student and with runs that there were not."""
    monkeypatch.chdir(tmp_path)
    queue = Queue(tmp_path / "queue")
    anew = SWEEP.replace("- student: {model: nano}", "- {name: tiny-to-nano, student: {model: nano-moe}}")
    anew = anew.replace("- student: {model: nano-moe}", "- name: tiny-to-nano-moe\n      student: {model: nano-moe}")
    anew = anew.replace("name: long", "name: longer")
    first, second = (
        queue.add(resolve_job(written(tmp_path / "on.yaml", text), schedule={"start_from": "last"}))
        for text in (SWEEP, anew)
    )
    prepare(queue, first, last=None)
    prepare(queue, second, last=first)
    models = [
        yaml.safe_load((queue.job_folder(second.id) / f"{run.folder}.yaml").read_text())["student"]["model"]
        for run in second.spec.runs
    ]
    assert models == ["nano-moe", str(first.out / "tiny-to-nano-moe" / "student"), "nano"]
    assert capsys.readouterr().err.count("starts from its configured student") == 2


def test_the_job_files_that_are_shown_are_some(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "schedule.md").read_text().replace("/data", str(tmp_path))
    written(tmp_path / "prompts", "")
    shown = re.findall(r"```yaml\n# ([\w.]+)[^\n]*\n(.*?)```", text, re.DOTALL)
    specs = {name: resolve_job(written(tmp_path / name, file)) for name, file in shown}
    assert set(specs) == {"nightly.yaml", "sizes.yaml"}
    assert [run.folder for run in specs["sizes.yaml"].runs] == ["32B-to-0.6B", "32B-to-4B", "32B-to-14B"]
    # Every key of the block is explained.
    assert all(f"`{key}`" in text for key in ScheduleSettings.model_fields)


def test_every_shipped_recipe_is_a_job(tmp_path: Path) -> None:
    for name in recipe_names():
        config = resolve_recipe({"extends": name}, where="the recipe")
        assert config == resolve_run(recipe=name)


@pytest.mark.parametrize(
    "block",
    [
        {"environment": {"HF_TOKEN": "hf_secret123"}},
        {"environment": {"HF_TOKEN": "hf_secret123\n"}},
        {"environment": {"HF_TOKEN": ["hf_secret123"]}},
        {"environment": ["HF_TOKEN=hf_secret123"]},
        {"environment": "HF_TOKEN=hf_secret123"},
        {"slurm": {"secret_files": {"HF_TOKEN": "hf_secret123"}}},
        {"kubernetes": {"secrets": {"HF_TOKEN": "hf_secret123"}}},
        {"skypilot": {"secrets": [{"HF_TOKEN": "hf_secret123"}]}},
        {"gpus": {"HF_TOKEN": "hf_secret123"}},
        [{"environment": {"HF_TOKEN": "hf_secret123"}}],
    ],
)
@pytest.mark.parametrize("command", [("launch", "--on", "slurm"), ("queue", "add"), ("schedule", "add")])
def test_a_secret_in_a_job_file_is_refused_and_not_shown(
    typed: Any, tmp_path: Path, block: Any, command: tuple[str, ...]
) -> None:
    job = {"extends": "embedded", "schedule": {"cron": "0 2 * * *"}, "launch": block}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    code, out, err = typed(*command, "job.yaml")
    assert code == 2 and "launch" in err, err
    assert "hf_secret123" not in out + err


SECRET = "Swordfish"
UNCLOSED = f"""
extends: embedded
launch:
  environment: {{HF_TOKEN: {SECRET}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (UNCLOSED, "line 5, column 1: while parsing a flow mapping (line 4, column 16), expected ',' or '}', but got"),
        (f"launch:\n  environment:\n    HF_TOKEN: {SECRET}: x", "line 3, column 24: mapping values are not allowed"),
        (f"launch:\n  environment:\n    HF_TOKEN: '{SECRET}\n", "line 3, column 15), found unexpected end of stream"),
        (f"launch:\n  environment:\n    HF_TOKEN: *{SECRET}", "line 3, column 15: found undefined alias"),
        (f"launch:\n  environment:\n    HF_TOKEN: !{SECRET} x", "could not determine a constructor for the tag"),
        (f"launch:\n  environment:\n    HF_TOKEN: !!int {SECRET}", "line 3, column 15: this is no int"),
        (f"launch:\n  environment:\n    HF_TOKEN: @{SECRET}", "found character '@' that cannot start any token"),
        (f"launch:\n  environment: {{HF_TOKEN: {SECRET}\x07}}", "line 2, column 36: the character #x07 is not allowed"),
    ],
)
@pytest.mark.parametrize(
    "command", [("launch", "--on", "slurm"), ("queue", "add"), ("run", "--recipe"), ("config", "validate")]
)
def test_a_file_that_is_no_yaml_is_shown_by_its_place_alone(
    typed: Any, tmp_path: Path, text: str, says: str, command: tuple[str, ...]
) -> None:
    written(tmp_path / "job.yaml", text)
    code, out, err = typed(*command, "job.yaml")
    assert (code, out) == (2, "") and "is not valid YAML: line " in err and says in " ".join(err.split()), err
    assert SECRET not in err


def test_no_piece_of_a_spoilt_file_is_in_what_is_said_of_it() -> None:
    chance, said = random.Random(0), set()
    lines = "".join(f"    A_{number}: {SECRET}{number}\n" for number in range(12))
    for _ in range(1500):
        text = mutated(chance, f"launch:\n  environment:\n{lines}").decode("utf-8", "replace")
        try:
            parse_yaml(text, where="the file")
        except UserError as error:
            # A key may be said: it is a name.
            assert SECRET not in str(error) or "is there twice" in str(error), text
            said.add(re.sub(r"[0-9]+", "", str(error)))
    assert len(said) > 10
    with pytest.raises(UserError, match=r"--set launch\.environment\.HF_TOKEN= is not valid YAML") as refused:
        parse_assignment(f"launch.environment.HF_TOKEN=[{SECRET}")
    assert SECRET not in str(refused.value)
