"""The preflight against real vLLM servers that somebody else runs: honest ones, and one with other weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.config import RunConfig
from distill.embedded import checkpoint_dir
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.prompts import EmbeddedSource
from distill.types import Rollout
from distill.vllm.launch import Launch, Role
from distill.vllm.service import Service
from pipelines.admission import Admission
from pipelines.faculty import find_teachers, hired_faculty
from pipelines.probes import PROBES
from pipelines.resolution import resolve_run
from teachers.store import ResponseStore

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
STUDENT = open_checkpoint(resolve("nano", role="student"))
ENCODER = Encoder(load_tokenizer(TEACHER))


def served(folder: Path, role: Role, log: Path) -> Service:
    checkpoint = open_checkpoint(resolve(str(folder), role="teacher"))
    return Service(Launch(checkpoint, role, dtype="float32", max_model_len=256, on_gpu=False), log=log)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(checkpoint_dir("tiny"), "score", tmp_path_factory.mktemp("score") / "log") as service:
        service.wait()
        yield service.url


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(checkpoint_dir("tiny"), "generate", tmp_path_factory.mktemp("generate") / "log") as service:
        service.wait()
        yield service.url


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves a copy of the teacher whose layers were trained on, so to say; norms and head are the teacher's own."""
    folder = tmp_path_factory.mktemp("stale") / "tiny"
    shutil.copytree(checkpoint_dir("tiny"), folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("proj.weight"):
            weights[name] = value + 0.2 * value.std() * torch.randn_like(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with served(folder, "score", folder.parent / "log") as service:
        service.wait()
        yield service.url


def config_with(generate: str, *score: str, wire: str = "bf16", longest: int = 64) -> RunConfig:
    urls = f"teacher.urls={{generate: [{generate!r}], score: [{', '.join(map(repr, score))}]}}"
    return resolve_run(
        assignments=["teacher.backend=vllm", urls, f"teacher.wire={wire}", f"max_prompt_tokens={longest}"]
    )


def asked(config: RunConfig, root: Path) -> dict[str, str]:
    admission = Admission(config, STUDENT, ResponseStore(root))
    candidates, cpu = find_teachers(config), torch.device("cpu")
    with hired_faculty(config, candidates, ENCODER, device=cpu, logs=root / "logs", choose=_nobody) as faculty:
        source = EmbeddedSource(config.prompts, seed=0)  # type: ignore[arg-type]
        admission.draw(faculty, source, ENCODER, taking_turns=False)
        admission.ask_at_once(faculty)
    return {finding.check: finding.text for finding in admission.findings}


def _nobody(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    raise AssertionError("the whole distribution is asked for")


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_honest_servers_pass(scorer: str, speaker: str, tmp_path: Path, wire: str) -> None:
    found = asked(config_with(speaker, scorer, wire=wire), tmp_path)
    assert list(found) == list(PROBES)
    most = {"fp32": 1e-4, "bf16": 0.02}[wire]
    for check, unit in (("repeat", " nats"), ("responses", " nats"), ("weights", " of their size")):
        assert float(found[check].partition(unit)[0].rpartition(" ")[2]) < most, found[check]
    assert "160 tokens at most, within 256" in found["servers"]
    # What was drawn for the probes is in the store now, and is what the next run finds there.
    assert "the response store" in asked(config_with(speaker, scorer, wire=wire), tmp_path)["responses"]


def test_a_server_that_takes_too_little_is_refused(scorer: str, speaker: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes 256 tokens.*352; start it with --max-model-len 352"):
        asked(config_with(speaker, scorer, longest=256), tmp_path)


def test_one_stale_replica_of_two_is_refused(scorer: str, speaker: str, stale: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{stale} does not hold the weights of tiny"):
        asked(config_with(speaker, scorer, stale), tmp_path)
    assert not ResponseStore(tmp_path).collections(), "nothing of a doubtful teacher is stored"


def test_a_run_with_a_stale_server_spends_nothing(speaker: str, stale: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill.cli", "run", "--out", str(tmp_path / "run"), "--set"]
    command += ["teacher.backend=vllm", "--set", f"teacher.urls={{generate: ['{speaker}'], score: ['{stale}']}}"]
    command += ["--set", "max_prompt_tokens=64", "--skip-preflight", "weights"]
    environment = {**os.environ, "DISTILL_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert stale in done.stderr and "is not what was reported when they were spoken" in done.stderr
    assert "-  weights" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "eval").exists()
