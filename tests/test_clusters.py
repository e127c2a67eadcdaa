"""``distill launch``: what each engine is given, word for word (tests/golden/launch), read by real shells and schemas.

``python -m tests.test_clusters`` writes the golden files anew; the difference is then for a person to read.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.clusters import LaunchSettings
from distill.config import RunConfig
from distill.errors import UserError
from distill.hardware import load_devices, parse_pool
from distill.jobs import ScheduleSettings, read_job
from distill.memory import Memory
from distill.server_memory import ServerMemory
from pipelines.clusters import shell
from pipelines.clusters.fleet import Fleet, _student
from pipelines.clusters.order import Order, notes, order
from pipelines.clusters.rendering import ENGINES
from pipelines.clusters.slurm import _seconds
from pipelines.layouts import SamplerLayout, StudentLayout
from pipelines.processes import Machines, run_processes
from pipelines.resolution import recipe_names

GOLDEN = Path(__file__).parent / "golden" / "launch"

COMMON: dict[str, Any] = {
    "out": "/data/runs",
    "image": "registry.example/distill:1",
    "environment": {"DISTILL_STORE": "/data/store"},
    "slurm": {"time": "1-12", "partition": "gpu", "secret_files": {"HF_TOKEN": "/home/me/.hf token"}},
    "kubernetes": {
        "namespace": "research",
        "volumes": [{"claim": "runs", "path": "/data"}],
        "secrets": {"HF_TOKEN": {"name": "hub", "key": "token"}},
    },
    "skypilot": {"volumes": {"/data": "runs"}, "secrets": ["DISTILL_TEACHER_API_KEY", "HF_TOKEN"]},
}

JOBS: dict[str, dict[str, Any]] = {
    # The teacher's servers fit beside the student.
    "beside": {
        "extends": "qwen3",
        "teacher": {"model": "32B", "backend": "vllm"},
        "student": {"model": "4B"},
        "schedule": {"backoff_limit": 2, "termination_grace_period_seconds": 300},
        "launch": {"gpus": "8xH100", "cpus_per_gpu": 12, "memory_gb_per_gpu": 100},
    },
    # A student over two machines, and somebody else's servers.
    "wide": {
        "extends": "qwen3",
        "teacher": {
            "model": "32B",
            "backend": "vllm",
            "urls": {"generate": ["http://gpu-9:8001"], "score": ["http://gpu-9:8101"]},
        },
        "student": {"model": "14B"},
        "launch": {
            "gpus_teacher": "2xH100",
            "gpus_student": "2x2xH100",
            "workdir": "/home/me/my project",
            "setup": ["source /venv/bin/activate"],
            "kubernetes": {"queue": "team-a", "node_selector": {"gpu": "h100"}},
        },
    },
    # Servers that are spread over machines.
    "spread": {
        "extends": "qwen3",
        "teacher": {"model": "235B", "backend": "vllm"},
        "student": {"model": "4B"},
        "launch": {"gpus_teacher": "4x4xH100", "gpus_student": "4x4xH100"},
    },
    # A schedule, on processors.
    "nightly": {
        "extends": "embedded",
        "schedule": {
            "cron": "0 2 * * *",
            "timezone": "Europe/Berlin",
            "concurrency_policy": "replace",
            "starting_deadline_seconds": 3600,
            "active_deadline_seconds": 7200,
        },
        "launch": {"gpus": "1xCPU", "cpus_per_gpu": 2, "kubernetes": {"queue": "team-a"}},
    },
}

CASES = {
    "beside.sbatch": ("beside", "slurm"),
    "beside.kubernetes.yaml": ("beside", "kubernetes"),
    "beside.sky.yaml": ("beside", "skypilot"),
    "wide.sbatch": ("wide", "slurm"),
    "wide.kubernetes.yaml": ("wide", "kubernetes"),
    "wide.sky.yaml": ("wide", "skypilot"),
    "spread.sbatch": ("spread", "slurm"),
    "spread.sky.yaml": ("spread", "skypilot"),
    "nightly.kubernetes.yaml": ("nightly", "kubernetes"),
}


def laid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: laid(base[key], over[key]) for key in over if isinstance(over[key], dict) and key in base}
    return {**base, **over, **both}


def job_file(folder: Path, name: str, **launch: Any) -> Path:
    job = JOBS[name]
    tree = {**job, "launch": laid(laid(COMMON, job["launch"]), launch)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def rendered(folder: Path, name: str, on: str, *assignments: str, **launch: Any) -> Order:
    return order(job_file(folder, name, **launch), on=on, folder=folder, assignments=assignments)[0]


@pytest.fixture
def short_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe has tests of its own, and a line more with every setting that a run gets."""
    monkeypatch.setattr(Fleet, "recipe", property(lambda self: f"name: {self.config.name}\n"))


@pytest.mark.parametrize("file", CASES)
@pytest.mark.usefixtures("short_recipe")
def test_what_an_engine_is_given(file: str, tmp_path: Path) -> None:
    assert rendered(tmp_path, *CASES[file]).text == (GOLDEN / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [file for file in CASES if file.endswith(".sbatch")])
def test_a_batch_script_is_one_to_a_shell(file: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(rendered(tmp_path, *CASES[file]).text)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("short_recipe")
def test_jobs_that_share_a_machine_have_ports_of_their_own(tmp_path: Path) -> None:
    """Half a machine each, side by side: with one port for both the second ended, or met the first one's processes."""
    (tmp_path / "token").write_text("x")
    secrets = {"secret_files": {"HF_TOKEN": str(tmp_path / "token")}}
    text = rendered(tmp_path, "beside", "slurm", out=str(tmp_path / "runs"), slurm=secrets).text
    tools = tmp_path / "tools"
    tools.mkdir()
    stubs = {"srun": 'echo "$MASTER_PORT $*" >> "$SEEN"', "scontrol": "echo gpu-1", "squeue": "", "scancel": ""}
    for name, line in stubs.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    found = []
    for number in (4711, 4712, 4810):
        seen = tmp_path / f"seen-{number}"
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": str(number), "SEEN": str(seen)}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        generate, score, student = sorted(seen.read_text().splitlines(), key=lambda line: "distill run" in line)
        served = [line.partition("--port ")[2].split()[0] for line in (generate, score)]
        # What the student is told is where they are, whichever step began first.
        assert sorted(re.findall(r"http://gpu-1:(\d+)", student)) == sorted(served)
        found.append({int(port) for port in (*served, student.split()[0])})
    assert all(len(ports) == 3 and max(ports) < 65536 for ports in found)
    assert not any(one & other for one, other in itertools.combinations(found, 2))


def documents(one: Order) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(one.text) if document is not None]


KUBERNETES = ("1.29", kubernetes_validate.latest_version())
"""The first version that has sidecars without being asked for them, and the newest whose schemas are at hand."""


def check_kubernetes(objects: list[dict[str, Any]]) -> None:
    """Against Kubernetes' own schemas, strict: a key that it does not know would be dropped without a word."""
    for version in KUBERNETES:
        for one in objects:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("file", [file for file in CASES if file.endswith(".kubernetes.yaml")])
def test_a_golden_file_is_what_kubernetes_knows(file: str) -> None:
    objects = [one for one in yaml.safe_load_all((GOLDEN / file).read_text(encoding="utf-8")) if one is not None]
    assert {one["kind"] for one in objects} & {"Job", "CronJob"}
    check_kubernetes(objects)
    # The check is one.
    objects[-1]["spec"]["paralelism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        check_kubernetes(objects)


@pytest.mark.parametrize(
    ("recipe", "cron"), [(name, "0 2 * * *" if number % 2 else None) for number, name in enumerate(recipe_names())]
)
def test_every_shipped_recipe_is_a_job_that_kubernetes_knows(recipe: str, cron: str | None, tmp_path: Path) -> None:
    embedded = recipe.startswith(("embedded", "opd"))
    launch = {
        **COMMON,
        "gpus": "1xCPU" if embedded else "8xH200",
        "setup": ["source /venv/bin/activate"],
        "cpus_per_gpu": 2,
        "memory_gb_per_gpu": 8,
        "kubernetes": {
            **COMMON["kubernetes"],
            "queue": "team-a",
            "node_selector": {"gpu": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "service_account": "distill",
        },
    }
    urls = {"generate": ["http://gpu-9:8001"], "score": ["http://gpu-9:8101"]}
    job = {
        "extends": recipe,
        **({} if embedded else {"teacher": {"urls": urls}}),
        "schedule": {"cron": cron, "timezone": "Europe/Berlin", "active_deadline_seconds": 7200},
        "launch": launch,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    (one,) = order(path, on="kubernetes", folder=tmp_path)
    check_kubernetes(documents(one))


@pytest.mark.parametrize("on", ENGINES)
def test_the_job_file_that_is_shown_is_one(on: str, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "launch.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "big.yaml").write_text(shown)
    (one,) = order(tmp_path / "big.yaml", on=on, folder=tmp_path)
    assert [part.name for part in one.fleet.parts] == ["student", "teacher-generate", "teacher-score"]


def test_the_recipe_that_travels_is_the_planned_run(tmp_path: Path) -> None:
    one = rendered(tmp_path, "beside", "kubernetes")
    recipe = yaml.safe_load(documents(one)[0]["data"]["recipe.yaml"])
    assert recipe == one.fleet.config.model_dump(mode="json")
    assert recipe["student"]["parallel"] == "sharded"  # the job file says auto; the plan has settled it
    assert recipe["teacher"]["patience_seconds"] == 3600.0


MISSING = {
    "slurm": ("out", "slurm.time"),
    "kubernetes": ("out", "image", "kubernetes.namespace"),
    "skypilot": ("out",),
}


@pytest.mark.parametrize(("on", "key"), [(on, key) for on, keys in MISSING.items() for key in keys])
def test_what_is_missing_is_a_sentence(on: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"launch\.{key} is missing.*--set launch\.{key}="):
        rendered(tmp_path, "beside", on, f"launch.{key}=null")


@pytest.mark.parametrize(
    ("name", "on", "assignments", "says"),
    [
        ("beside", "nomad", [], "none of slurm, kubernetes, skypilot"),
        ("beside", "slurm", ["launch.gpus=null"], "launch.gpus is missing"),
        ("beside", "slurm", ["launch.gpus=8xFOO"], "^launch.gpus '8xFOO': no device"),
        ("beside", "slurm", ["launch.gpus_teacher=8xH100"], "^launch.gpus is one pool for both"),
        (
            "beside",
            "slurm",
            ["launch.gpus=null", "launch.gpus_teacher=8xH100"],
            "^launch.gpus_student is missing: .* or launch.gpus for one pool",
        ),
        (
            "beside",
            "slurm",
            ["launch.gpus=null", "launch.gpus_teacher=8xH200", "launch.gpus_student=8xH100"],
            "name one kind with launch.gpus,",
        ),
        ("beside", "slurm", ["launch.slurm.tiem=3"], "did you mean"),
        ("beside", "slurm", ["launch.slurm.time=true"], "slurm.time"),
        ("beside", "slurm", ["launch.slurm.time=4"], "asked to stop as it begins"),
        ("beside", "slurm", ["schedule.starting_deadline_seconds=31622401"], "starting_deadline_seconds.*31622400"),
        ("beside", "slurm", ["schedule.termination_grace_period_seconds=1e300"], "grace_period_seconds.*31622400"),
        ("beside", "slurm", ['launch.slurm.time="4"'], "asked to stop as it begins"),
        ("beside", "slurm", ["launch.slurm.partition=a b"], "launch"),
        ("beside", "slurm", ["launch.environment.HF_TOKEN=hf_abc"], "looks like a secret"),
        ("beside", "slurm", ['launch.setup=["a\\nb"]'], "one line"),
        ("beside", "slurm", ["launch.out=runs"], "full path"),
        ("beside", "slurm", ['launch.out=/a"b'], "no path with quotes"),
        ("beside", "slurm", ["schedule.active_deadline_seconds=60"], "launch.slurm.time"),
        ("beside", "slurm", ["schedule.start_from=last"], "start_from is last"),
        ("beside", "slurm", ["teacher.revision=abc"], "default branch"),
        ("nightly", "slurm", [], "nothing by the clock; --once"),
        ("nightly", "skypilot", [], "nothing by the clock; --once"),
        ("nightly", "kubernetes", ["schedule.catch_up=none", "schedule.starting_deadline_seconds=null"], "deadline"),
        ("beside", "kubernetes", ["launch.out=/elsewhere/runs"], "lies in no volume"),
        ("beside", "kubernetes", ["launch.out=/data/../runs"], "lies in no volume"),
        ("spread", "kubernetes", [], "does not fit beside the student"),
        ("beside", "skypilot", ["launch.skypilot.secrets=[]"], "want a key"),
        ("beside", "skypilot", ["launch.out=/elsewhere"], "lies in no volume or bucket"),
        ("beside", "skypilot", ["launch.out=/data/../tmp/runs"], "lies in no volume or bucket"),
    ],
)
def test_what_an_engine_cannot_do_is_a_sentence(
    name: str, on: str, assignments: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        rendered(tmp_path, name, on, *assignments)


def test_a_bare_number_is_minutes_to_slurm(tmp_path: Path) -> None:
    assert "#SBATCH --time=60\n" in rendered(tmp_path, "beside", "slurm", slurm={"time": 60}).text


def test_a_plan_that_changes_the_result_is_not_launched(tmp_path: Path) -> None:
    # Servers of one role at a time would fit as they are.
    with pytest.raises(UserError, match=r"both roles .* being up at once, only with .* which is another result"):
        rendered(tmp_path, "beside", "slurm", "launch.gpus=8xH200", "teacher.model=235B")


def asked_for(one: Order, on: str) -> int:
    """GPUs of a rendered file, all that are up at once: counted in what the engine reads."""
    if on == "slurm":
        lines = one.text.splitlines()
        nodes, gpus = (
            int(next(line for line in lines if line.startswith(f"#SBATCH {key}")).rpartition(separator)[2])
            for key, separator in (("--nodes=", "="), ("--gres=", ":"))
        )
        return nodes * gpus
    if on == "skypilot":
        tasks = [task for task in documents(one) if "resources" in task]
        return sum(task["num_nodes"] * sum(task["resources"]["accelerators"].values()) for task in tasks)
    (job,) = (document["spec"] for document in documents(one) if document["kind"] == "Job")
    pod = job["template"]["spec"]
    containers = (*pod.get("initContainers", ()), *pod["containers"])
    each = sum(int(container["resources"]["limits"]["nvidia.com/gpu"]) for container in containers)
    return int(job.get("parallelism", 1)) * each


@pytest.mark.parametrize("on", ENGINES)
@pytest.mark.usefixtures("short_recipe")
def test_no_more_gpus_are_asked_for_than_there_are(on: str, tmp_path: Path) -> None:
    counts, refused = set(), 0
    for teacher, student in (("235B", "4B"), ("32B", "4B"), ("30B-A3B", "14B")):
        for pool, there in (
            *(("2xH200", 2), ("3xH100", 3), ("4xH100", 4), ("8xH100", 8), ("8xH200", 8), ("20xH100", 20)),
            *(("2x4xH200", 8), ("2x6xH200", 12), ("3x8xH100", 24)),
        ):
            models = (f"launch.gpus={pool}", f"teacher.model={teacher}", f"student.model={student}")
            try:
                one = rendered(tmp_path, "beside", on, *models)
            except UserError as error:
                refused += 1
                assert ";" in str(error), "the way out is missing"
                continue
            assert asked_for(one, on) == one.to_json()["gpus"] <= there, models
            counts.add((len(one.fleet.servers), there - one.gpus))
    # Servers of both roles and none of them, with GPUs to spare and without, and what does not fit were all among them.
    assert {servers for servers, _ in counts} == {0, 2} and {0} < {left for _, left in counts} and refused


@pytest.mark.parametrize("on", ENGINES)
def test_the_vllm_that_speaks_for_the_student_has_a_gpu(on: str, tmp_path: Path) -> None:
    """Whatever its number was where the job file was written: it is the one behind those of the processes."""
    one = rendered(tmp_path, "beside", on, "sampler.backend=vllm", 'sampler.devices=["7"]')
    student = one.fleet.student
    assert asked_for(one, on) == one.gpus == one.fleet.plan.best.layout.gpus
    assert (student.gpus, student.processes) == (3, 2)
    assert """--set 'sampler.devices=["2"]'""" in one.text


def test_a_vllm_beside_processes_on_several_machines_is_refused() -> None:
    pool = parse_pool("3x8xH100", load_devices())
    layout = StudentLayout(16, "sharded", Memory({}), SamplerLayout(ServerMemory({}, 0, 1), 1))
    with pytest.raises(UserError, match="its own machine alone can reach, and a machine has 8"):
        _student(layout, pool)


@pytest.mark.parametrize(
    ("on", "assignments", "says"),
    [
        ("skypilot", ["launch.gpus=2xH100"], "both roles of the teacher up at once.*what would: 8xH100"),
        ("slurm", ["launch.gpus=12xH100", "student.model=14B"], "2 of 8 GPUs for the 12 .* 16 together.*2x8xH100"),
    ],
)
def test_what_has_no_room_at_once_is_a_sentence(on: str, assignments: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        rendered(tmp_path, "beside", on, *assignments)


def test_one_run_of_a_schedule_leaves_its_cron_out(tmp_path: Path) -> None:
    found = order(job_file(tmp_path, "nightly"), on="kubernetes", folder=tmp_path, once=True)
    assert [document["kind"] for document in documents(found[0])] == ["ConfigMap", "Job"]


def test_each_run_of_a_sweep_is_a_job(tmp_path: Path) -> None:
    path = job_file(tmp_path, "nightly")
    tree = yaml.safe_load(path.read_text())
    tree["sweep"] = {"runs": [{"student": {"model": "nano"}}, {"name": "other", "seed": 1}]}
    path.write_text(yaml.safe_dump(tree))
    found = order(path, on="kubernetes", folder=tmp_path)
    assert [one.file.name for one in found] == ["nightly-tiny-to-nano.kubernetes.yaml", "nightly-other.kubernetes.yaml"]


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"sweep": {"runs": [{}, {"name": "b", "teacher": {"model": "nano"}}]}}, "runs.1 has another teacher"),
        ({"sweep": {"runs": [{}, {"name": "b", "seed": "x"}]}}, r"sweep\.runs\.1"),
        ({"sweep": {"runs": [{}, {}]}}, "give each its own name"),
        ({"evaluation": {"tasks": ["embeded"]}}, "embedded"),
        ({"stages": {"rl": {"kind": "grpo", "policy_gradient": {"grader": "vibes"}}}}, "no grader is called 'vibes'"),
        ({"student": {"model": "5B"}}, "is no size, embedded model"),
        ({"teacher": {"model": "tiny", "backend": "vllm"}, "sweep": {"runs": [{}]}}, "share_teacher is true"),
    ],
)
def test_what_is_wrong_with_the_runs_is_known_before_the_cluster(over: Any, says: str, tmp_path: Path) -> None:
    path = job_file(tmp_path, "nightly")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **over}))
    with pytest.raises(UserError, match=says):
        order(path, on="kubernetes", folder=tmp_path)


def test_prompts_may_be_on_the_cluster_alone(tmp_path: Path) -> None:
    path = job_file(tmp_path, "nightly")
    tree = {**yaml.safe_load(path.read_text()), "prompts": {"kind": "file", "path": "/data/prompts.jsonl"}}
    path.write_text(yaml.safe_dump(tree))
    (one,) = order(path, on="kubernetes", folder=tmp_path)
    assert "the prompts /data/prompts.jsonl have to be there on the cluster too" in notes(one.fleet)


def test_what_a_cluster_does_not_read_of_the_schedule_is_said(tmp_path: Path) -> None:
    on = "nightly", "kubernetes"
    assert not any("is for a worker" in note for note in notes(rendered(tmp_path, *on).fleet))
    said = notes(rendered(tmp_path, *on, "schedule.backoff_seconds=60", "schedule.gpu_slots=4").fleet)
    for key in ("gpu_slots", "backoff_seconds"):
        assert f"schedule.{key} is for a worker, and the cluster does not read it" in said


def test_a_worker_passes_over_what_is_the_cluster_s(tmp_path: Path) -> None:
    job = read_job(job_file(tmp_path, "nightly"))
    assert "launch" not in job.recipe
    assert job.launch.gpus == "1xCPU"


@pytest.mark.parametrize(
    ("wall", "seconds"),
    [("30", 1800), ("30:10", 1810), ("2:30:10", 9010), ("2-12", 216000), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_wall_times_as_sbatch_reads_them(wall: str, seconds: int) -> None:
    assert _seconds(wall) == seconds


# What a shell, a YAML reader or Kubernetes might read something into.
TEXTS = st.text(
    st.sampled_from(string.ascii_letters + string.digits + " '\"`$(){}[]<>|&;*?!~#\\%=,:@^+-_" + "\u00fc\u65e5"),
    min_size=1,
    max_size=30,
)


@given(lines=st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=20, max_size=20))
@settings(max_examples=3, deadline=None)
def test_a_shell_reads_the_words_that_were_given(lines: list[list[str]]) -> None:
    script = ["mark='a  b'"]
    for words in lines:
        inner = shell.joined("<", shell.Read('"$mark"'), *words, ">")
        script.append(f"printf '%s\\0' {shell.line([*words, inner])}; printf '\\n\\0'")
    done = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, check=True)
    expected = [word for words in lines for word in (*words, f"<a  b{''.join(words)}>", "\n")]
    assert done.stdout.decode().split("\0")[:-1] == expected


STUB = """#!/bin/bash
printf '%s\\0' "$PWD" "$VALUE" "$@" > "$HOME/seen"
exit 75
"""

ONE_BY_ONE = 'for HOME in "$@"; do (. "$HOME/script"); echo "$?" > "$HOME/code"; done'


def seen_by(scripts: list[str], folder: Path, environment: dict[str, str]) -> list[tuple[list[str], int]]:
    """What the command in each script was given, with a stub in its place: its folder, $VALUE, its words; and its
    exit code. One shell forks for all of them: starting one is what takes the time."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "distill").write_text(STUB)
    (tools / "distill").chmod(0o755)
    homes = [folder / f"home-{number}" for number in range(len(scripts))]
    for home, script in zip(homes, scripts, strict=True):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        (home / "script").write_text(script)
    done = subprocess.run(
        ["bash", "-c", ONE_BY_ONE, "bash", *map(str, homes)],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder), **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert all((home / "seen").exists() for home in homes), done.stderr
    return [((home / "seen").read_text().split("\0")[:-1], int((home / "code").read_text())) for home in homes]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A fleet whose texts may be others: what it was planned for says nothing about them."""
    folder = tmp_path_factory.mktemp("planned")
    return order(job_file(folder, "nightly"), on="kubernetes", folder=folder)[0].fleet


@given(texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=6, max_size=6))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_strange_texts_reach_the_command_as_they_are(
    texts: list[tuple[str, str, str]], planned: Fleet, tmp_path: Path
) -> None:
    fleets = []
    for value, argument, folder in texts:
        work = tmp_path / "w" / folder / "work"
        work.mkdir(parents=True, exist_ok=True)
        launch = {
            "workdir": str(work),
            "out": str(tmp_path / "o" / folder),
            "environment": {"VALUE": value},
            "kubernetes": {"volumes": [{"claim": "runs", "path": str(tmp_path)}]},
            "skypilot": {"volumes": {str(tmp_path): "runs"}},
        }
        tree = {**planned.config.model_dump(mode="json"), "teacher": {"model": "tiny", "server_args": [argument]}}
        over = LaunchSettings.model_validate(laid(planned.settings.model_dump(mode="json"), launch))
        uncut = ScheduleSettings()
        fleets.append(replace(planned, config=RunConfig.model_validate(tree), settings=over, schedule=uncut))

    def check(scripts: list[str], recipes: Callable[[int, str], str], environment: dict[str, str]) -> None:
        for number, (words, code) in enumerate(seen_by(scripts, tmp_path, environment)):
            value, argument, folder = texts[number]
            assert code == 75
            assert words[:2] == [str(tmp_path / "w" / folder / "work"), value]
            assert words[words.index("--out") + 1] == f"{tmp_path / 'o' / folder}/nightly"
            recipe = recipes(number, words[words.index("--recipe") + 1])
            assert yaml.safe_load(recipe)["teacher"]["server_args"] == [argument]

    maps = [next(yaml.safe_load_all(ENGINES["kubernetes"].render(fleet)))["data"] for fleet in fleets]
    check([one["student.sh"] for one in maps], lambda number, _: str(maps[number]["recipe.yaml"]), {})
    tasks = [yaml.safe_load(ENGINES["skypilot"].render(fleet)) for fleet in fleets]
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1"}
    check([task["run"] for task in tasks], lambda _, file: Path(file).read_text(), nodes)


@given(
    tree=st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS,
        lambda leaf: (
            st.dictionaries(st.sampled_from([*LaunchSettings.model_fields, "x"]), leaf, max_size=3)
            | st.lists(leaf, max_size=2)
        ),
        max_leaves=6,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_launch_block_is_settings_or_a_sentence(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"extends": "embedded", "launch": tree}))
    try:
        read_job(path)
    except UserError as error:
        assert "launch" in str(error)


@pytest.fixture
def typed(typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs a command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return typed


def test_the_command_writes_submits_and_keeps_what_is_there(
    typed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file(tmp_path, "beside")
    code, said, _ = typed("launch", "beside.yaml", "--on", "slurm", "--json")
    (job,) = yaml.safe_load(said)["jobs"]
    assert (code, job["submitted"], job["gpus"]) == (0, None, 8)
    file = tmp_path / "launch" / "beside.sbatch"
    assert job["command"] == ["sbatch", str(file)]
    file.write_text("mine")
    code, _, complaint = typed("launch", "beside.yaml", "--on", "slurm")
    assert (code, file.read_text()) == (2, "mine")
    assert "--replace" in complaint

    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    code, _, complaint = typed("launch", "beside.yaml", "--on", "slurm", "--submit")
    assert (code, file.read_text()) == (2, "mine")
    file.unlink()
    file.parent.rmdir()
    code, _, complaint = typed("launch", "beside.yaml", "--on", "slurm", "--submit")
    assert code == 2
    assert "needs sbatch, which is not on this machine" in complaint
    # What is to be submitted elsewhere is there.
    assert complaint.strip().endswith(f"sbatch {file}") and file.read_text().startswith("#!/bin/bash")
    tool = tmp_path / "tools" / "sbatch"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "Submitted batch job 7"\n')
    tool.chmod(0o755)
    code, said, _ = typed("launch", "beside.yaml", "--on", "slurm", "--submit", "--replace")
    assert (code, said) == (0, "Submitted batch job 7\n")
    tool.write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    code, _, complaint = typed("launch", "beside.yaml", "--on", "slurm", "--submit", "--replace")
    assert code == 1
    assert complaint.count("invalid partition") == 1


def sweep_file(folder: Path) -> Path:
    path = job_file(folder, "nightly")
    tree = {**yaml.safe_load(path.read_text()), "schedule": {}, "sweep": {"runs": [{"name": "a"}, {"name": "b"}]}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_no_file_is_written_before_all_may_be(typed: Callable[..., Any], tmp_path: Path) -> None:
    sweep_file(tmp_path)
    second = tmp_path / "launch" / "nightly-b.sbatch"
    second.mkdir(parents=True)
    code, _, complaint = typed("launch", "nightly.yaml", "--on", "slurm", "--replace")
    assert code == 2
    assert f"{second} cannot be written: Is a directory" in complaint
    assert list(second.parent.iterdir()) == [second]
    (tmp_path / "file").write_text("")
    code, _, complaint = typed("launch", "nightly.yaml", "--on", "slurm", "--out", "file")
    assert code == 2
    assert "name another folder with --out" in complaint


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_what_is_submitted_is_said_though_a_later_one_fails(
    json: list[str], typed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_file(tmp_path)
    tool = tmp_path / "tools" / "sbatch"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\ncase "$1" in *-a.sbatch) echo "Submitted batch job 7";; *) exit 1;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    code, said, complaint = typed("launch", "nightly.yaml", "--on", "slurm", "--submit", *json)
    assert code == 1
    assert "Submitted batch job 7" in (complaint if json else said)
    assert "nightly-b.sbatch ended with exit code 1" in complaint


def test_machines_share_the_numbers_of_their_processes(tmp_path: Path) -> None:
    write = f"open('{tmp_path}/' + e['RANK'], 'w').write(' '.join(e[k] for k in names))"
    names = "names = ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')"
    command = [sys.executable, "-c", f"import os; e = os.environ; {names}; {write}; raise SystemExit(75)"]
    assert run_processes(command, 2, Machines(3, 1, "first", 29500)) == 75
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "2": "0 6 first 29500",
        "3": "1 6 first 29500",
    }
    with pytest.raises(UserError, match="the last is 2"):
        Machines(3, 3, "first")


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(parents=True, exist_ok=True)
    Fleet.recipe = property(lambda self: f"name: {self.config.name}\n")  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            (GOLDEN / name).write_text(rendered(Path(temporary), *case).text, encoding="utf-8")
