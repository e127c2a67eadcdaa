"""Every signal of a real vLLM server that generates against the teacher in this process, on the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from test_run_variants import small_run
from test_server import CPU, ENCODER, TEACHER, launch, logprobs, requests

from distill.checkpoint import load_model
from distill.errors import UserError
from distill.sampler import TransformersSampler
from distill.types import MODES, Rollout, SampledLogprobs, TopK
from distill.vllm.client import Client
from distill.vllm.service import Service
from teachers.chosen import ChosenTeacher
from teachers.local import LocalTeacher
from teachers.logprobs import LogprobTeacher
from teachers.reduced import ReducedTeacher, to_sampled
from teachers.remote import RemoteTeacher

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

K = 32


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher(load_model(TEACHER, torch.float32, CPU), name="tiny", batch_tokens=16384)


@pytest.fixture(scope="module")
def rollouts(local: LocalTeacher) -> list[Rollout]:
    found = TransformersSampler(local.model, ENCODER, speaker="student").generate(requests(96))
    assert {one.mode for one in found} == set(MODES)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("generate") / "log"
    with Service(launch("generate", extra=("--max-logprobs", str(K), "--enable-scale-out")), log=log) as service:
        service.wait()
        yield service


def asked(client: Client, k: int) -> LogprobTeacher:
    return LogprobTeacher(client, name="tiny", vocabulary=TEACHER.shape.vocabulary, k=k, device=CPU)


@pytest.mark.parametrize("k", [1, 20, K])
def test_topk_is_that_of_the_local_teacher(
    server: Service, local: LocalTeacher, rollouts: list[Rollout], k: int
) -> None:
    with Client([server.url], width=8192) as client:
        found = asked(client, k).score(rollouts)
    for one, exact, signal in zip(rollouts, local.score(rollouts), found, strict=True):
        assert isinstance(signal, TopK)
        logprobs_RV = logprobs(exact, local.head_VD).float()
        # Neighbours of nearly the same probability may change places, so both the ids' own and the best are compared.
        for expected in (logprobs_RV.topk(k).values, logprobs_RV.gather(-1, signal.ids_RK)):
            assert signal.logprobs_RK.shape == (len(one.response_ids), k)
            assert torch.allclose(signal.logprobs_RK, expected, atol=1e-4), one.mode
        tail_R = 1 - logprobs_RV.topk(k).values.double().exp().sum(-1)
        assert torch.allclose(signal.tail_logprob_R.double().exp(), tail_R, atol=1e-5), one.mode


def test_the_sampled_token_is_that_of_the_local_teacher(
    server: Service, local: LocalTeacher, rollouts: list[Rollout]
) -> None:
    with Client([server.url], width=8192) as client:
        found = asked(client, 0).score(rollouts)
    for one, ours, theirs in zip(rollouts, ReducedTeacher(local, to_sampled).score(rollouts), found, strict=True):
        assert isinstance(ours, SampledLogprobs) and isinstance(theirs, SampledLogprobs)
        assert torch.allclose(ours.logprobs_R, theirs.logprobs_R, atol=1e-4), one.mode


def test_more_than_the_server_gives_is_refused_with_the_way_out(server: Service, rollouts: list[Rollout]) -> None:
    with Client([server.url], width=8192) as client, pytest.raises(UserError, match="--max-logprobs 33"):
        asked(client, K + 1).score(rollouts[:1])


def test_a_server_without_a_gpu_does_not_score_chosen_tokens(server: Service, rollouts: list[Rollout]) -> None:
    def choose(some: Sequence[Rollout]) -> list[torch.Tensor]:
        return [torch.arange(4).repeat(len(one.response_ids), 1) for one in some]

    with Client([server.url], width=8192) as client, pytest.raises(UserError, match=r"chosen.*V2 model runner.*hidden"):
        ChosenTeacher(client, name="tiny", choose=choose, device=CPU).score(rollouts[:2])


def test_a_generator_has_no_hidden_states(server: Service, rollouts: list[Rollout]) -> None:
    with Client([server.url], width=8192) as client, pytest.raises(UserError, match="one role"):
        RemoteTeacher(client, TEACHER, wire="bf16", dtype=torch.float32, device=CPU).score(rollouts[:1])


def test_a_whole_run_with_the_top_k_of_a_server(tmp_path: Path) -> None:
    """One server has both roles, and the divergence is the one of the same run with its teacher in this process."""
    signal = ("teacher.signal=topk", "teacher.top_k=24")
    _, local = small_run(tmp_path / "local", *signal)
    _, served = small_run(tmp_path / "served", *signal, "teacher.backend=vllm")
    first, other = (next(line for line in lines if line["stage"] == "on_policy") for lines in (local, served))
    # Both read the same stored responses, so they take the same steps.
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert other["teacher_tail"] == pytest.approx(first["teacher_tail"], abs=1e-4)
    assert [path.name for path in (tmp_path / "served" / "servers").iterdir()] == ["generate.log"]
