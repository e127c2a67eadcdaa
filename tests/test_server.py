"""Real vLLM servers with the embedded teacher: the signal is exact, responses are the model's, nothing stays behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_service import alive, wait_until_gone

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.sampler import TransformersSampler
from distill.types import MODES, HiddenStates, Prompt, Request, Rollout, Sampling
from distill.vllm.client import Client
from distill.vllm.launch import Launch, Role
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.served import is_healthy
from distill.vllm.service import Service
from teachers.local import LocalTeacher
from teachers.remote import RemoteTeacher, Wire

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
ENCODER = Encoder(load_tokenizer(TEACHER))
CPU = torch.device("cpu")


def launch(role: Role, **more: Any) -> Launch:
    return Launch(TEACHER, role, dtype="float32", max_model_len=256, on_gpu=False, **more)


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher(load_model(TEACHER, torch.float32, CPU), name="tiny", batch_tokens=16384)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(launch("score", api_key="s3cret"), log=tmp_path_factory.mktemp("score") / "log") as service:
        service.wait()
        yield service


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(launch("generate"), log=tmp_path_factory.mktemp("generate") / "log") as service:
        service.wait()
        yield service


def requests(num: int, **sampling: Any) -> list[Request]:
    """Half of them in each mode."""
    return [
        ENCODER.request(
            Prompt(({"role": "user", "content": f"{number % 10}+4*{number % 7}-2="},)),
            mode=MODES[number % 2],
            sampling=Sampling(96, **sampling),
            seed=number,
        )
        for number in range(num)
    ]


def logprobs(signal: HiddenStates, head_VD: torch.Tensor) -> torch.Tensor:
    return (signal.states_Rd.double() @ head_VD.double().T).log_softmax(dim=-1)


def kl(signal: HiddenStates, head_VD: torch.Tensor, other: torch.Tensor) -> float:
    """KL(signal || other), the largest of all tokens."""
    own = logprobs(signal, head_VD)
    return float((own.exp() * (own - other)).sum(dim=-1).max())


def remote(client: Client, wire: Wire) -> RemoteTeacher:
    return RemoteTeacher(client, TEACHER, wire=wire, dtype=torch.float32, device=CPU)


def test_the_signal_over_either_wire_is_that_of_the_local_teacher(scorer: Service, local: LocalTeacher) -> None:
    rollouts = TransformersSampler(local.model, ENCODER, speaker="student").generate(requests(96))
    reference = local.score(rollouts)
    tolerance: dict[Wire, float] = {"fp32": 1e-6, "bf16": 1e-4, "fp8": 0.2}
    with Client([scorer.url], width=8192, api_key="s3cret") as client:
        for wire, most in tolerance.items():
            teacher = remote(client, wire)
            assert torch.equal(teacher.head_VD, local.head_VD)
            for one, ours, theirs in zip(rollouts, reference, teacher.score(rollouts), strict=True):
                assert theirs.states_Rd.shape == (len(one.response_ids), TEACHER.shape.width)
                worst = kl(ours, local.head_VD, logprobs(theirs, teacher.head_VD))
                assert worst <= most, (wire, one.mode, worst)


def test_a_student_feels_the_same_divergence(scorer: Service, local: LocalTeacher) -> None:
    rollouts = TransformersSampler(local.model, ENCODER, speaker="student").generate(requests(32))
    student = open_checkpoint(resolve("nano", role="student"))
    judged = LocalTeacher(load_model(student, torch.float32, CPU), name="nano", batch_tokens=16384)
    said = [logprobs(states, judged.head_VD) for states in judged.score(rollouts)]
    with Client([scorer.url], width=8192, api_key="s3cret") as client:
        for wire, most in (("fp32", 1e-4), ("bf16", 1e-2)):
            theirs = remote(client, wire).score(rollouts)
            for ours, over_wire, student_logprobs in zip(local.score(rollouts), theirs, said, strict=True):
                exact, wired = (logprobs(states, local.head_VD) for states in (ours, over_wire))
                change = (student_logprobs.exp() * (exact - wired)).sum(dim=-1).abs().max()
                assert float(change) <= most, wire


def test_a_scorer_neither_speaks_nor_answers_strangers(scorer: Service) -> None:
    with Client([scorer.url], width=8, api_key="s3cret") as client, pytest.raises(UserError, match="one role"):
        RemoteSampler(client, ENCODER, speaker="t", vocabulary=TEACHER.shape.vocabulary).generate(requests(1))
    with (
        Client([scorer.url], width=8, api_key="guess") as client,
        pytest.raises(UserError, match="DISTILL_TEACHER_API_KEY"),
    ):
        remote(client, "bf16").score([Rollout(requests(1)[0], (1, 2), (False,) * 2, (-1.0,) * 2, "length", "s")])


def check_logprobs(rollouts: list[Rollout], local: LocalTeacher) -> None:
    """What the server said of its tokens is what the model says of them, forced ones included."""
    for one, states in zip(rollouts, local.score(rollouts), strict=True):
        expected = logprobs(states, local.head_VD)[torch.arange(len(one.logprobs)), torch.tensor(one.response_ids)]
        assert torch.tensor(one.logprobs).double().sub(expected).abs().max() < 1e-4


def test_responses_are_the_model_s_own(speaker: Service, local: LocalTeacher) -> None:
    asked = requests(64, temperature=0.7, top_p=0.9, top_k=20, presence_penalty=0.5)
    with Client([speaker.url], width=64) as client:
        sampler = RemoteSampler(client, ENCODER, speaker="teacher", vocabulary=TEACHER.shape.vocabulary)
        rollouts = sampler.generate(asked)
        again = sampler.generate(asked[::-1])[::-1]
    assert [one.request for one in rollouts] == asked
    assert sum(one.finish_reason == "stop" for one in rollouts) > 32
    for one in rollouts:
        assert (one.response_ids[-1] in ENCODER.stop_ids) == (one.finish_reason == "stop")
    check_logprobs(rollouts, local)
    # A seed decides a response, up to rounding that depends on the batch.
    assert sum(one.response_ids == other.response_ids for one, other in zip(rollouts, again, strict=True)) >= 60


def test_a_thinking_budget_is_kept(speaker: Service, local: LocalTeacher) -> None:
    with Client([speaker.url], width=64) as client:
        sampler = RemoteSampler(client, ENCODER, speaker="teacher", vocabulary=TEACHER.shape.vocabulary)
        rollouts = [one for one in sampler.generate(requests(64, thinking_budget=9)) if one.mode == "think"]
    forced = [one for one in rollouts if any(one.forced)]
    assert len(forced) > 16 and all(ENCODER.closed_thinking(one) for one in rollouts)
    for one in forced:
        end = 9 + len(ENCODER.early_stop_ids)
        assert one.forced[:end] == (False,) * 9 + (True,) * len(ENCODER.early_stop_ids)
        assert one.response_ids[9:end] == ENCODER.early_stop_ids and len(one.response_ids) > end
    check_logprobs(rollouts, local)


def test_a_served_model_is_examined_like_a_folder(speaker: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill.cli", "eval", speaker.url, "--tokenizer", "tiny", "--json"]
    command += ["--task", "embedded", "--task", "mode_switching", "--questions", "48", "--budget", "16"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    scores = {
        (entry["task"], entry["mode"], entry["metric"], entry.get("thinking_budget")): entry["mean"]
        for entry in found["scores"]
    }
    assert scores["embedded", "think", "avg@1", None] > 0.9
    assert scores["embedded", "no_think", "avg@1", None] < 0.6
    assert scores["embedded", "think", "avg@1", 16] < scores["embedded", "think", "avg@1", None]
    assert scores["mode_switching", "both", "right_mode/plain", None] >= 0.95
    assert all(one["flops"] > 0 and one["num_broken"] == 0 for one in found["evaluations"])
    assert len(list(tmp_path.glob("*.parquet"))) == 4
    # The same command has nothing more to ask.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert json.loads(again.stdout) == found


def test_a_prompt_without_room_on_the_server_is_one_broken_sample(speaker: Service, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "1" * 400, "answer": 1}) + "\n" + json.dumps({"prompt": "3+4=", "answer": 7}))
    command = [sys.executable, "-m", "distill.cli", "eval", speaker.url, "--tokenizer", "tiny", "--json"]
    done = subprocess.run([*command, "--task", str(own)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for one in json.loads(done.stdout)["evaluations"]:
        assert one["num_broken"] == 1 and one["samples_per_question"] == 1 and len(one["scores"]) == 2


def test_a_server_killed_at_work_is_replaced_and_the_work_goes_on(scorer: Service, local: LocalTeacher) -> None:
    """Last of the scorer's tests: it kills the server under the client's hands."""
    rollouts = TransformersSampler(local.model, ENCODER, speaker="student").generate(requests(256))
    group = scorer.group
    with Client([scorer.url], width=512, api_key="s3cret", check=scorer.check) as client:
        teacher = remote(client, "fp32")
        teacher.score(rollouts[:1])
        for pid in alive(group):
            os.kill(pid, 9)
        scored = teacher.score(rollouts)
    assert alive(group) == [] and scorer.group != group and is_healthy(scorer.url)
    for ours, theirs in zip(local.score(rollouts), scored, strict=True):
        assert torch.allclose(ours.states_Rd, theirs.states_Rd, atol=1e-4)


def test_kill_9_of_the_parent_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill.cli", "teacher", "serve", "--json", "--teacher", "tiny"]
    command += ["--role", "score", "--max-model-len", "64", "--log", str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        (url,) = json.loads(parent.stdout.readline())["urls"]
        (watcher,) = (int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        assert is_healthy(url) and len(alive(watcher)) >= 3  # the watcher, the API server, the engine
        parent.kill()
    wait_until_gone(watcher, 60)
    assert not is_healthy(url)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    sentence = r"(?s)does not take its arguments and ended before it was ready.*--no-such-flag"
    with (
        Service(launch("score", extra=("--no-such-flag",)), log=tmp_path / "log") as service,
        pytest.raises(UserError, match=sentence),
    ):
        service.wait()


def test_a_whole_run_with_a_served_teacher(tmp_path: Path) -> None:
    small = ["stages.off_policy.num_prompts=48", "stages.off_policy.batch_size=16", "stages.on_policy.steps=3"]
    small += ["stages.on_policy.prompts_per_step=8", "evaluation.num_questions=12", "teacher.backend=vllm"]
    command = [sys.executable, "-m", "distill.cli", "run", "--json", "--out", str(tmp_path / "run")]
    command += [part for assignment in small for part in ("--set", assignment)]
    environment = {**os.environ, "DISTILL_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["costs"]["teacher_generate"]["tokens"] > 0 and summary["costs"]["teacher_score"]["tokens"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["reverse_kl"] > 0 for line in lines if line["stage"] == "on_policy")
    thinks = {entry["checkpoint"]: entry["mean"] for entry in summary["scores"] if entry["mode"] == "think"}
    assert thinks["teacher"] > thinks["start"]
    assert sorted(path.name for path in (tmp_path / "run" / "servers").iterdir()) == ["generate.log", "score.log"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_served_teacher_teaches_what_one_in_this_process_does(tmp_path: Path) -> None:
    """Final scores differ by no more than three standard errors of their difference; the first step not at all."""
    settings = ["stages.on_policy.steps=20", "evaluation.num_questions=256"]
    runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for backend in ("local", "vllm"):
        out = tmp_path / backend
        command = [sys.executable, "-m", "distill.cli", "run", "--json", "--out", str(out)]
        command += [part for text in (*settings, f"teacher.backend={backend}") for part in ("--set", text)]
        # One store: both learn from the same responses, and what differs afterwards is who judges.
        environment = {**os.environ, "DISTILL_STORE": str(tmp_path / "store")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=700, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs[backend] = json.loads(done.stdout), [line for line in lines if line["stage"] == "on_policy"]
    (local, local_steps), (served, served_steps) = runs["local"], runs["vllm"]
    assert served["costs"]["teacher_generate"]["tokens"] == 0
    assert served_steps[0]["reverse_kl"] == pytest.approx(local_steps[0]["reverse_kl"], abs=1e-4)
    assert served_steps[-1]["reverse_kl"] < served_steps[0]["reverse_kl"]
    for ours, theirs in zip(local["scores"], served["scores"], strict=True):
        assert (ours["checkpoint"], ours["mode"]) == (theirs["checkpoint"], theirs["mode"])
        widths = [(entry["ci95"][1] - entry["ci95"][0]) / 2 for entry in (ours, theirs)]
        assert abs(ours["mean"] - theirs["mean"]) <= 3 / 1.96 * math.hypot(*widths), (ours, theirs)
