"""Several processes of one run: the same numbers as one, whoever wrote the checkpoint; one's end is everyone's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from forked import run_processes
from safetensors.torch import load_file

from distill.errors import DistillError, NonFiniteError, PeerError, StoppedError, UserError
from distill.vllm.service import free_port
from pipelines.processes import processes_to_start
from students.ranks import Ranks, joined_ranks, place_in

SMALL = {
    "stages.off_policy.num_prompts": "32",
    "stages.off_policy.batch_size": "16",
    "stages.on_policy.steps": "4",
    "stages.on_policy.prompts_per_step": "8",
    "stages.on_policy.mixture": "{think_share: 0.3}",
    "evaluation.num_questions": "4",
    "checkpoint_every": "2",
}
NUM_STEPS = 4 + 4


def start(out: Path, processes: int, **changes: str) -> subprocess.Popen[str]:
    return start_with([sys.executable], out, ["--processes", str(processes)], **changes)


def start_with(starter: Sequence[str], out: Path, words: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    assignments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [*starter, "-m", "distill.cli", "run", "--json", "--out", str(out), *assignments, *words]
    environment = {**os.environ, "DISTILL_STORE": str(out.parent / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(out: Path, processes: int, **changes: str) -> dict[str, Any]:
    process = start(out, processes, **changes)
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    return dict(json.loads(stdout))


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_curve(out: Path, reference: Path) -> None:
    """Sums in another order: 1e-4 of the loss, 1e-4 nats of a log-probability, whose mean comes near 0.

    A few steps in, a token drawn at a tie may tell two runs apart.
    """
    bounds = {"grad_norm": {"rel": 1e-3}, "think.sampled_logprob": {"rel": 0.0, "abs": 1e-4}}
    ours, theirs = metrics(out), metrics(reference)
    assert len(ours) == len(theirs) == NUM_STEPS
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "student_entropy", "think.sampled_logprob", "no_think.length", "length"):
            assert a[key] == pytest.approx(b[key], **bounds.get(key, {"rel": 1e-4})), (a["stage"], a["step"], key)
        for key in ("num_tokens", "num_responses", "tokens.student_train"):
            assert a[key] == b[key], (a["step"], key)
        assert a["flops"] == pytest.approx(b["flops"])
    # Before the stage's first step no tie has been met yet.
    samples = [
        [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in (out, reference)
    ]
    assert len(samples[0]) == len(samples[1]) > 0
    for a, b in zip(*samples, strict=True):
        assert (a["global_step"], a["prompt_id"], a["mode"]) == (b["global_step"], b["prompt_id"], b["mode"])
        if a["step"] == 0:
            assert a["tokens"] == b["tokens"] and a["kl"] == pytest.approx(b["kl"], rel=1e-2, abs=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(out, 1)
    return out


@pytest.mark.parametrize("kind", [pytest.param("replicated", marks=pytest.mark.slow), "sharded"])
def test_two_processes_give_the_curve_of_one(alone: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    # Micro-batches so small that the two processes need different numbers of them.
    summary = finish(out, 2, student__parallel=kind, student__micro_batch_tokens="192")
    assert_same_curve(out, alone)
    reference = json.loads((alone / "summary.json").read_text())
    assert [entry["mean"] for entry in summary["scores"]] == [entry["mean"] for entry in reference["scores"]]
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (out, alone))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["machine"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "machines"])
def test_processes_that_others_started_meet(alone: Path, tmp_path: Path, starter: str) -> None:
    """torchrun starts both; or each of two machines starts its own, here both on this one."""
    out = tmp_path / "run"
    if starter == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        started = [start_with([*torchrun, "--master-port", str(free_port("127.0.0.1"))], out, [])]
    else:
        where = f"127.0.0.1:{free_port('127.0.0.1')}"
        words = ["--processes", "1", "--nodes", "2", "--node-address", where, "--node-rank"]
        started = [start_with([sys.executable], out, [*words, rank]) for rank in "01"]
    for process in started:
        _, stderr = process.communicate(timeout=280)
        assert process.returncode == 0, stderr
    assert_same_curve(out, alone)


def when_steps(out: Path, wanted: int) -> Callable[[], bool]:
    return lambda: len(metrics(out)) >= wanted


def stop(process: subprocess.Popen[str], when: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    deadline = time.monotonic() + 200
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first", "second", "number", "expected"),
    [
        ("sharded", 2, 1, signal.SIGTERM, 75),
        ("sharded", 1, 2, signal.SIGINT, 130),
        ("replicated", 2, 1, signal.SIGINT, 130),
    ],
)
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    alone: Path, tmp_path: Path, *, kind: str, first: int, second: int, number: signal.Signals, expected: int
) -> None:
    out = tmp_path / "run"
    code, stderr = stop(start(out, first, student__parallel=kind), when_steps(out, 5), number)
    assert code == expected, stderr
    assert stderr.count("the same command resumes it") == 1 and "Traceback" not in stderr
    done = len(metrics(out))
    assert (out / "checkpoints" / f"step_{done}" / "training.safetensors").exists()
    finish(out, second, student__parallel=kind)
    assert_same_curve(out, alone)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_with_its_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, 2, stages__off_policy__optimiser="{learning_rate: 1.0, weight_decay: 1e25}")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "no step was taken" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("kind", ["replicated", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_student_that_broke_is_said_once_and_leaves_its_checkpoint(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    # A step of finite numbers behind which the layers' products overflow: what is sampled next is not finite.
    stage = "{steps: 4, prompts_per_step: 4, samples_per_prompt: 1, optimiser: %s}"
    settings = stage % "{learning_rate: 1.0, weight_decay: 1e15, warmup_steps: 0}"
    process = start(out, 2, student__parallel=kind, stages__off_policy="null", **{"stages.on_policy": settings})
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert stderr.count("on_policy, sampling step 1: the student's logits are not finite") == 1, stderr
    assert (out / "checkpoints" / "step_1" / "training.safetensors").exists()


def failed(name: str) -> DistillError | None:
    match name:
        case "stopped":
            return StoppedError("stopped by SIGTERM", exit_code=75)
        case "not finite":
            return NonFiniteError("the logits are not finite")
        case "full":
            return DistillError("the disk is full")
    return None


MEETINGS = {
    # What the main process and the other met in a block, and what they raise behind it.
    ("fine", "fine"): (None, None),
    ("not finite", "not finite"): (NonFiniteError, NonFiniteError),
    ("fine", "not finite"): (NonFiniteError, NonFiniteError),
    ("not finite", "fine"): (NonFiniteError, NonFiniteError),
    ("not finite", "stopped"): (StoppedError, StoppedError),
    ("stopped", "not finite"): (StoppedError, StoppedError),
    ("fine", "stopped"): (StoppedError, StoppedError),
    ("full", "fine"): (DistillError, PeerError),
    ("fine", "full"): (PeerError, DistillError),
    ("full", "full"): (DistillError, PeerError),
    # Who has an error of its own leaves, so that there is no checkpoint of all, and says it.
    ("not finite", "full"): (PeerError, DistillError),
    ("full", "not finite"): (DistillError, PeerError),
}


def meet(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    raised = {}
    for met in MEETINGS:
        for depth in (1, 2):
            raised[met, depth] = ""
            try:
                with ranks.together(), ranks.together() if depth == 2 else nullcontext():
                    if (error := failed(met[rank])) is not None:
                        raise error
            except DistillError as error:
                raised[met, depth] = type(error).__name__
    Path(folder, f"{rank}.json").write_text(json.dumps(list(raised.values())))
    dist.destroy_process_group()


def test_an_error_that_a_checkpoint_follows_is_everyones_and_another_is_said_once(tmp_path: Path) -> None:
    run_processes(meet, (str(tmp_path),), 2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = {
        (met, depth): tuple(kind.__name__ if kind else "" for kind in kinds)
        for met, kinds in MEETINGS.items()
        for depth in (1, 2)
    }
    assert dict(zip(expected, zip(*found, strict=True), strict=True)) == expected


@pytest.mark.slow
def test_a_step_that_cannot_be_shared_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, 2, stages__on_policy__prompts_per_step="1")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 2
    assert stderr.count("stages.on_policy.prompts_per_step is 1") == 1 and "Traceback" not in stderr
    assert not (out / "config.yaml").exists() and not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, 2)
    children: list[int] = []

    def found() -> bool:
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children[:] = map(int, listing.split())
        return len(metrics(out)) >= 1

    deadline = time.monotonic() + 200
    while not found() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "process 1 was ended by SIGKILL" in stderr and "Traceback" not in stderr


def test_shares_are_blocks_and_together_the_whole() -> None:
    items = list(range(22))
    parts = [Ranks(number, 4).share(items, block=2) for number in range(4)]
    assert [item for part in parts for item in part] == items
    assert all(part[0] % 2 == 0 for part in parts) and {len(part) for part in parts} == {4, 6}
    with pytest.raises(UserError, match="a step has 3 parts to share and the run 4 processes"):
        Ranks(0, 4).share(items[:6], block=2)


def test_a_place_among_others_is_read_from_the_environment() -> None:
    master = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    assert place_in({}) is None and place_in({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert place_in({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **master}) == (9, 16, 1)
    assert place_in({"RANK": "1", "WORLD_SIZE": "2", **master}) == (1, 2, 0)  # Kubernetes: a process a pod
    slurm = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    assert place_in({**slurm, **master}) == (9, 16, 1)
    with pytest.raises(UserError, match="lacks MASTER_ADDR, MASTER_PORT"):
        place_in(slurm)


MASTER = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', no whole number from 1 on"),
        ({"WORLD_SIZE": "1"}, "RANK is 1 and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": None}, "RANK is '1' and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "RANK is '1' and WORLD_SIZE is not set"),
        ({"RANK": None}, "lacks RANK;"),
        ({"RANK": "one"}, "RANK is 'one', no whole number from 0 on"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: .* 0 to 1"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', no whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": None}, "lacks MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "lacks MASTER_ADDR"),
    ],
)
def test_half_a_place_and_one_that_cannot_be_are_refused(changes: dict[str, str | None], sentence: str) -> None:
    changed = {"RANK": "1", "WORLD_SIZE": "2", **MASTER, **changes}
    environment = {name: value for name, value in changed.items() if value is not None}
    for read in (place_in, lambda environment: processes_to_start(None, environment)):
        with pytest.raises(UserError, match=sentence):
            read(environment)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2", **MASTER}, "SLURM_PROCID is 2 and SLURM_STEP_NUM"),
        # Each of the step's tasks would take itself for the whole run.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "0", **MASTER}, "WORLD_SIZE is not set"),
    ],
)
def test_places_that_srun_cannot_have_given_are_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        place_in(environment)


def test_where_others_would_meet_says_nothing_of_how_many_there_are() -> None:
    """A batch script exports it for its srun, and may call other commands besides."""
    assert place_in({**MASTER, "LOCAL_RANK": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None
    assert place_in({**MASTER, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    torchrun_of_one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MASTER}
    assert place_in(torchrun_of_one) is None and processes_to_start(None, torchrun_of_one) == 1


def test_a_launcher_s_single_process_is_not_asked_to_be_several() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    assert processes_to_start(1, alone) == 1
    for wanted, machines, option in ((None, 2, "--nodes is 2"), (4, 2, "--nodes is 2"), (2, 1, "--processes is 2")):
        sentence = f"{option}, and by its environment this process is the only one .*RANK is 0 and WORLD_SIZE is 1"
        with pytest.raises(UserError, match=sentence):
            processes_to_start(wanted, alone, num_machines=machines)
    # The children of a command of two machines have such a command line too.
    child = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}
    assert processes_to_start(None, child, num_machines=2) == 1


def test_a_run_that_its_launcher_has_alone_goes_on_as_no_part_of_two(tmp_path: Path) -> None:
    words = ["--nodes", "2", "--node-address", "127.0.0.1"]
    process = start_with(["env", "RANK=0", "WORLD_SIZE=1", sys.executable], tmp_path / "run", words)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 2 and "--nodes is 2, and by its environment" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_a_process_without_a_gpu_of_its_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    slurm = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "2"}
    for environment, name in (
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}, "LOCAL_RANK"),
        (slurm, "SLURM_LOCALID"),
    ):
        with pytest.raises(UserError, match=f"{name} is 2, .* sees 2 GPUs"), joined_ranks({**environment, **MASTER}):
            pass
