"""What a run says before it begins: the planner's own figures for the layout that it has, once. It stops nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.config import RunConfig
from distill.errors import UserError
from distill.family import SIZES, shape_of
from distill.hardware import load_devices
from distill.journal import Journal, write_json
from distill.memory import RESERVED_BYTES, hold_student, student_memory
from distill.recipe import dump_yaml
from pipelines import comparison
from pipelines.forecast import announce, forecast, left, named_pair
from pipelines.layouts import Pair
from pipelines.plan_document import PORTS
from pipelines.plan_lines import short_lines
from pipelines.planning import planned
from pipelines.processes import choose_engine
from pipelines.resolution import resolve_comparison, resolve_run
from pipelines.workload import workload
from students.ranks import ALONE, Ranks

SMALL = (
    "stages.off_policy.num_prompts=48",
    "stages.off_policy.batch_size=16",
    "stages.on_policy.steps=2",
    "stages.on_policy.prompts_per_step=8",
    "evaluation.num_questions=12",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without tables and measurements of this machine's user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def pair_of(config: RunConfig) -> Pair:
    pair = named_pair(config)
    assert pair is not None
    return pair


@pytest.fixture
def eight_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says where there are some."""
    monkeypatch.setattr(Ranks, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    properties = SimpleNamespace(total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_figures_are_the_planner_s() -> None:
    config = resolve_run()
    said, plan = forecast(config, pair_of(config), ALONE), planned(config)
    assert [(phase.job, phase.each) for phase in said.best.phases] == [
        (phase.job, phase.each) for phase in plan.best.phases
    ]
    assert said.best.gpu_hours == plan.best.gpu_hours and said.disk() == plan.disk()
    assert said.best.layout.student == plan.best.layout.student and not said.shortages


def test_processes_of_other_machines_take_nothing_of_this_one_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on two machines: two share each one's memory, and gradients travel over the network."""
    monkeypatch.setattr("pipelines.forecast.free_memory", lambda: 64e9)
    config = resolve_run()
    here = forecast(config, pair_of(config), Ranks(0, 4), ["a"] * 4)
    spread = forecast(config, pair_of(config), Ranks(0, 4), ["a", "a", "b", "b"])
    assert here == forecast(config, pair_of(config), Ranks(0, 4))
    memory = [plan.best.layout.student_pool.device.memory for plan in (here, spread)]
    assert memory == [16, 32] and [str(plan.devices) for plan in (here, spread)] == ["4xCPU", "2x2xCPU"]
    device = load_devices()["CPU"]
    wires = [
        next(phase.each.wire for phase in plan.best.phases if phase.job.role == "student_train")
        for plan in (here, spread)
    ]
    assert wires[1] / wires[0] == pytest.approx(device.link / device.network)
    said = ["\n".join(short_lines(plan)) for plan in (here, spread)]
    assert "network" not in said[0] and "for 1.25 GB/s a process, the table's figure, which is not measured" in said[1]
    # A machine with more of them than the first one.
    memory = [
        forecast(config, pair_of(config), Ranks(rank, 4), ["a", "b", "b", "b"]).best.layout.student_pool.bytes
        for rank in (0, 1)
    ]
    assert memory == pytest.approx([64e9, 64e9 / 3])


@pytest.mark.usefixtures("eight_h100")
def test_gpus_of_other_machines_are_reached_over_the_network() -> None:
    urls = [f"teacher.urls.{role}=[http://a:{port}]" for role, port in PORTS.items()]
    config = resolve_run(teacher="32B", student="4B", assignments=["teacher.backend=vllm", *urls])
    device = load_devices()["H100"]
    wires = []
    for hosts in (["a", "a"], ["a", "b"]):
        phases = forecast(config, pair_of(config), Ranks(0, 2), hosts).best.phases
        wires.append(next(phase.each.wire for phase in phases if phase.job.role == "student_train"))
    assert wires[1] / wires[0] == pytest.approx(device.link / device.network)


def test_it_is_said_within_a_second(tmp_path: Path) -> None:
    config = resolve_run()
    began = time.process_time()
    announce(config, pair_of(config), Journal(tmp_path / "run", config), ALONE)
    assert time.process_time() - began < 1


def test_what_does_not_fit_is_warned_of_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve_run(teacher="32B", student="14B", assignments=["teacher.backend=local"])
    announce(config, pair_of(config), Journal(tmp_path / "run", config), ALONE)
    out, err = capsys.readouterr()
    assert out == "" and "warning: by the plan it does not fit: the student 14B with the teacher 32B beside it" in err
    assert "32B -> 14B on 1xCPU" in err


def test_a_run_s_notes_name_nothing_that_its_reader_cannot_do() -> None:
    config = resolve_run(teacher="4B", student="0.6B", assignments=["teacher.backend=local"])
    said = "\n".join(short_lines(forecast(config, pair_of(config), ALONE)))
    assert "4,000 tokens on the mean when thinking and 700 when not" in said and "an assumption" in said
    words = set(re.findall(r"--[\w-]+", re.sub("`[^`]*`", "", said)))
    assert not words, words


def test_a_table_that_cannot_be_read_stops_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "config/strong-to-weak").mkdir(parents=True)
    (home / "config/strong-to-weak/hardware.yaml").write_text("CPU: fast")
    config = resolve_run()
    announce(config, pair_of(config), Journal(tmp_path / "run", config), ALONE)
    assert "plan: none can be made: the hardware table" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_h100")
def test_a_run_on_gpus_has_the_layout_that_it_is_configured_with() -> None:
    assignments = ["teacher.backend=vllm", "teacher.tensor_parallel=2", "teacher.replicas=3"]
    config = resolve_run(teacher="32B", student="4B", assignments=assignments)
    plan = forecast(config, pair_of(config), ALONE)
    layout = plan.best.layout
    assert (layout.teacher.gpus, layout.student.processes, str(plan.devices)) == (6, 1, "7xH100")
    assert plan.best.gpu_hours == pytest.approx(7 * plan.best.seconds / 3600)
    text = "\n".join(short_lines(plan))
    assert "of 85.00 GB" in text and "3 vLLM servers, tp 2, bf16" in text and "not its own" not in text


@pytest.mark.usefixtures("eight_h100")
def test_a_run_replicates_what_its_dry_run_says_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rule: what the formula leaves out of a GPU's memory is not there for either."""
    config = resolve_run(teacher="32B", student="1.7B")
    pair, ranks = pair_of(config), Ranks(0, 2)
    whole = student_memory(config, pair.student, pair.teacher, processes=2, engine="replicated").total
    for spare, expected in ((0, "replicated"), (-1, "sharded"), (1 - RESERVED_BYTES, "sharded")):
        has = whole + RESERVED_BYTES + spare
        properties = SimpleNamespace(total_memory=has)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        said = hold_student(config, pair.student, pair.teacher, gpu_bytes=has, processes=2)
        assert (said.engine, choose_engine(config, pair.student, ranks, pair.teacher)) == (expected, expected)
    # Adapters cannot be cut: a run that does not fit with them is refused, as it was.
    adapted = resolve_run(teacher="32B", student="4B", assignments=["student.lora.rank=8"])
    with pytest.raises(UserError, match="wants a student that every process holds whole"):
        choose_engine(adapted, SIZES["14B"], ranks, pair.teacher)


@pytest.mark.usefixtures("eight_h100")
def test_servers_that_somebody_else_runs_are_not_paid_for() -> None:
    urls = [f"teacher.urls.{role}=[http://a:{port}, http://b:{port}]" for role, port in PORTS.items()]
    urls.append("teacher.backend=vllm")
    config = resolve_run(teacher="32B", student="4B", assignments=[*urls, "teacher.tensor_parallel=8"])
    plan = forecast(config, pair_of(config), Ranks(0, 8))
    assert plan.best.layout.teacher.replicas == 2 and plan.best.layout.student.processes == 8
    assert plan.best.gpu_hours == pytest.approx(8 * plan.best.seconds / 3600)
    assert "which are not its own" in next(short_lines(plan))
    # They may be larger than these devices.
    config = resolve_run(teacher="235B", student="4B", assignments=[*urls, "teacher.tensor_parallel=1"])
    assert not forecast(config, pair_of(config), Ranks(0, 8)).shortages


@pytest.mark.usefixtures("eight_h100")
def test_a_device_that_no_table_has_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = resolve_run(teacher="4B", student="0.6B")
    announce(config, pair_of(config), Journal(tmp_path / "run", config), ALONE)
    assert "no table has figures of Tesla T4" in capsys.readouterr().err


def test_the_shape_of_a_model_on_the_hub_is_known_once_it_is_opened() -> None:
    assert named_pair(resolve_run(teacher="me/model", student="4B")) is None
    assert pair_of(resolve_run(teacher="32B", student="4B")).teacher == shape_of("32B")


def begun(path: Path, config: RunConfig, *, stage: int, step: int, examined: list[str]) -> Journal:
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(config))
    write_json(path / "checkpoints/step_7/state.json", {"stage": stage, "step": step})
    write_json(path / "costs.json", {role: {"stages": dict.fromkeys(examined)} for role in ("evaluate",)})
    return Journal(path, config)


def test_what_is_done_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve_run(assignments=["evaluation.curve={every: 60}", "stages.off_policy.num_prompts=1024"])
    whole = workload(config)
    times = {(job.stage, job.role, job.is_between): job.times for job in whole.jobs}
    steps = times["off_policy", "student_train", False]

    def left_at(name: str, **where: object) -> dict[tuple[str, str, bool], int]:
        journal = begun(tmp_path / name, config, **where)  # type: ignore[arg-type]
        return {(job.stage, job.role, job.is_between): job.times for job in left(whole, config, journal).jobs}

    there = left_at("a", stage=0, step=steps // 4, examined=["teacher", "start"])
    done = {("teacher", "evaluate", False): 0, ("start", "evaluate", False): 0}
    assert there == times | done | {
        ("off_policy", "teacher_generate", False): 0,
        ("off_policy", "student_train", False): steps - steps // 4,
        ("off_policy", "evaluate", True): there["off_policy", "evaluate", True],
    }
    assert 0 < there["off_policy", "evaluate", True] <= times["off_policy", "evaluate", True]
    there = left_at("b", stage=1, step=0, examined=["teacher", "start", "off_policy"])
    assert all(there[key] == 0 for key in times if key[0] in ("teacher", "start", "off_policy"))
    assert all(there[key] == times[key] for key in times if key[0] == "on_policy")
    assert not any(left_at("c", stage=2, step=0, examined=["teacher", "start", *config.stages]).values())
    announce(config, pair_of(config), Journal(tmp_path / "a", config, writes=False), ALONE)
    assert "plan: what is left of tiny -> nano" in capsys.readouterr().err


def test_a_comparison_says_what_its_runs_take_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "_run_chains", lambda config, out: None)
    monkeypatch.setattr(comparison, "summarise", lambda config, out: {})
    config = resolve_comparison("table21")
    runs = comparison.check(config, tmp_path)
    first = next(run for member, run in runs if member.arm == comparison.OFF_POLICY)
    seconds = [forecast(run, pair_of(first), ALONE).best.seconds for _, run in runs]
    comparison.run_comparison(config, tmp_path)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: "))
    assert line.startswith(f"plan: 24 runs on 1xCPU, about {sum(seconds) / 3600:,.2f} h one after the other, ")
    for member, _ in runs[:-1]:
        write_json(member.folder(tmp_path) / "summary.json", {})
    comparison.run_comparison(config, tmp_path)
    assert "plan: 1 run on" in capsys.readouterr().err


def test_a_run_says_it_once_before_its_work(typed: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    words = ["run", "--json", "--out", str(tmp_path / "run"), "--store", str(tmp_path / "store")]
    words += [word for text in SMALL for word in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", *words, "--processes", "2"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("plan: tiny -> nano on 2xCPU: about ") and done.stderr.count("plan: ") == 1
    assert set(json.loads(done.stdout)) == set(json.loads((tmp_path / "run/summary.json").read_text()))
    # A finished run has nothing to say, one whose summary is missing that nothing is left.
    code, _, err = typed(*words)
    assert code == 0 and "plan: " not in err
    (tmp_path / "run/summary.json").unlink()
    code, _, err = typed(*words)
    assert code == 0
    assert "plan: what is left of tiny -> nano" in err and "nothing but the report is left" in err
