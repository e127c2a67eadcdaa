"""Signals of a teacher: in this process against definitions, over HTTP against servers that lie, and in whole runs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_client import Answer, Handle, rollout, serving, speak
from test_run_variants import small_run

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import DistillError, UserError
from distill.family import resolve
from distill.types import HiddenStates, Rollout, SampledLogprobs, Signal, TopK
from distill.vllm.client import Client
from pipelines.resolution import resolve_run
from teachers.chosen import ChosenTeacher
from teachers.local import LocalTeacher
from teachers.logprobs import LogprobTeacher
from teachers.reduced import ReducedTeacher, to_chosen, to_sampled, to_topk

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
VOCABULARY = TEACHER.shape.vocabulary
CPU = torch.device("cpu")
K = 5


def said(one: Rollout) -> torch.Tensor:
    """Log-probabilities [T, V] of a make-believe teacher that depend on the token before alone."""
    ids = [*one.prompt_ids, *one.response_ids]
    logits = torch.stack([torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(token)) for token in ids])
    return (2 * logits).log_softmax(-1)


def ids_of(one: Rollout) -> list[int]:
    return [*one.prompt_ids, *one.response_ids]


ROLLOUTS = [rollout(number, prompt=1 + number % 5, response=1 + number % 7) for number in range(40)]
BY_IDS = {tuple(ids_of(one)): one for one in ROLLOUTS}


def honest_entry(logprobs_V: torch.Tensor, token: int, k: int) -> dict[str, dict[str, float]]:
    """As vLLM has it: the token that stands there first, then the k most probable ones."""
    ids = [token, *logprobs_V.topk(k).indices.tolist()]
    return {str(i): {"logprob": float(logprobs_V[i]), "rank": 1, "decoded_token": "x"} for i in ids}


Change = Callable[[list[Any]], Any]


def completed(body: dict[str, Any], change: Change = lambda entries: entries) -> Answer:
    choices = []
    for index, ids in enumerate(body["prompt"]):
        logprobs_TV = said(BY_IDS[tuple(ids)])
        entries: list[Any] = [None]
        entries += [honest_entry(logprobs_TV[t - 1], ids[t], body["prompt_logprobs"]) for t in range(1, len(ids))]
        choices.append({"index": index, "prompt_logprobs": change(entries)})
    return 200, {}, json.dumps({"choices": choices[::-1]}).encode()


def scored(handle: Handle, k: int, rollouts: list[Rollout]) -> list[Signal]:
    with serving(handle) as url, Client([url], width=1000) as client:
        return LogprobTeacher(client, name="tiny", vocabulary=VOCABULARY, k=k, device=CPU).score(rollouts)


def test_topk_over_http_keeps_the_rows_of_the_response_with_the_k_best_of_each() -> None:
    for one, signal in zip(ROLLOUTS, scored(lambda path, body: completed(body), K, ROLLOUTS), strict=True):
        assert isinstance(signal, TopK)
        best = said(one)[len(one.prompt_ids) - 1 : -1].topk(K)
        assert torch.equal(signal.ids_RK, best.indices) and torch.equal(signal.logprobs_RK, best.values)
        assert torch.allclose(signal.tail_logprob_R, (1 - best.values.exp().sum(-1)).log(), atol=1e-5)


def test_the_sampled_token_over_http() -> None:
    for one, signal in zip(ROLLOUTS, scored(lambda path, body: completed(body), 0, ROLLOUTS), strict=True):
        assert isinstance(signal, SampledLogprobs)
        rows = said(one)[len(one.prompt_ids) - 1 : -1]
        assert torch.equal(signal.logprobs_R, rows[torch.arange(len(rows)), torch.tensor(one.response_ids)])


def changed(entry: int, **facts: Any) -> Change:
    def change(entries: list[Any]) -> list[Any]:
        *_, last = entries[entry]
        entries[entry][last] |= facts
        return entries

    return change


def other_token(entries: list[Any]) -> list[Any]:
    entries[-1] = {str(int(name) + 1): fact for name, fact in entries[-1].items()}
    return entries


LIES: dict[str, tuple[Change, type[DistillError], str]] = {
    "a row is missing": (lambda entries: entries[1:], DistillError, "log-probabilities of .* tokens and was asked"),
    "no answer to what was asked": (lambda entries: None, UserError, "no vLLM server"),
    "too few": (lambda entries: [*entries[:-1], dict([*entries[-1].items()][:1])], DistillError, "returned 1 log-prob"),
    "another token": (other_token, DistillError, "another token"),
    "not a number": (changed(-1, logprob=float("nan")), DistillError, "not finite"),
    "logits": (changed(-1, logprob=7.5), DistillError, "--logprobs-mode raw_logprobs"),
    "no entry": (lambda entries: [*entries[:-1], ["?"]], DistillError, "cannot be read"),
    "beyond the vocabulary": (
        lambda entries: [*entries[:-1], {**dict([*entries[-1].items()][:-1]), "99999": {"logprob": -9.0}}],
        DistillError,
        "another model",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_generator_is_refused(lie: str) -> None:
    change, error, sentence = LIES[lie]
    with pytest.raises(error, match=sentence):
        scored(lambda path, body: completed(body, change), K, ROLLOUTS[2:3])


@pytest.mark.parametrize("page", [b"<html>log in</html>", b"\xff\xfe", b""])
def test_a_page_in_the_place_of_an_answer_is_a_sentence(page: bytes) -> None:
    """A proxy that answers for the server, with status 200."""

    def handle(path: str, body: dict[str, Any]) -> Answer:
        return 200, {}, page

    for ask in (lambda: scored(handle, K, ROLLOUTS[:1]), lambda: ask_about(handle, ROLLOUTS[:1])):
        with pytest.raises(DistillError, match=r"answered with status 200 and no JSON .* a proxy for one"):
            ask()
    with pytest.raises(DistillError, match=r"answered with status 200 and no JSON .* a proxy for one"):
        speak(handle, ROLLOUTS[0].request)


def test_a_server_that_gives_fewer_is_named_with_the_way_out() -> None:
    complaint = {"error": {"message": "Requested prompt logprobs of 5, which is greater than max allowed: 3"}}
    with pytest.raises(UserError, match=r"--max-logprobs 5, or lower teacher\.top_k"):
        scored(lambda path, body: (400, {}, json.dumps(complaint).encode()), K, ROLLOUTS[:1])


def generated(body: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What ``/inference/v1/generate`` documents: row i scores prompt token start + i + 1; float32."""
    asked = body["sampling_params"]
    ids, start = asked["prompt_logprob_token_ids"], asked["prompt_logprob_start"]
    assert len(ids) == len(body["token_ids"]) - 1 - start
    rows_TV = said(BY_IDS[tuple(body["token_ids"])])[start:-1]
    return rows_TV.gather(-1, torch.tensor(ids)).numpy()


def as_reply(array: np.ndarray[Any, Any]) -> Answer:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return 200, {}, json.dumps({"prompt_token_id_logprobs": encoded, "choices": []}).encode()


def chosen_ids(rollouts: Any) -> list[torch.Tensor]:
    return [torch.stack([torch.randperm(VOCABULARY)[:K] for _ in one.response_ids]) for one in rollouts]


def ask_about(handle: Handle, rollouts: list[Rollout]) -> list[TopK]:
    with serving(handle) as url, Client([url], width=20, patience=5) as client:
        return ChosenTeacher(client, name="tiny", choose=chosen_ids, device=CPU).score(rollouts)


def test_chosen_tokens_come_back_at_the_rows_that_predict_the_response() -> None:
    paths = set()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        paths.add(path)
        return as_reply(generated(body))

    for one, signal in zip(ROLLOUTS, ask_about(handle, ROLLOUTS), strict=True):
        expected = said(one)[len(one.prompt_ids) - 1 : -1].gather(-1, signal.ids_RK)
        assert torch.equal(signal.logprobs_RK, expected)
        assert torch.allclose(signal.tail_logprob_R, (1 - expected.exp().sum(-1)).log(), atol=1e-5)
    assert paths == {"/inference/v1/generate"}


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        (as_reply(np.zeros((1, K), np.float32)), DistillError, r"\[1, 5\] in float32 and was asked for \[3, 5\]"),
        (as_reply(np.zeros((3, K), np.float64)), DistillError, "in float64"),
        (as_reply(np.full((3, K), np.nan, np.float32)), DistillError, "not finite"),
        (as_reply(np.zeros((3, K), np.float32)), DistillError, "no log-probabilities"),
        ((200, {}, b'{"prompt_token_id_logprobs": "????"}'), DistillError, "readable array"),
        ((200, {}, b'{"choices": []}'), DistillError, "readable array"),
        ((200, {}, b'{"prompt_token_id_logprobs": null}'), DistillError, "readable array"),
        (
            (400, {}, b'{"error": {"message": "prompt_logprob_token_ids requires the V2 model runner"}}'),
            UserError,
            "GPU",
        ),
        (
            (400, {}, b'{"error": {"message": "5 token ids, greater than max allowed: 3"}}'),
            UserError,
            "--max-logprobs 5",
        ),
        ((403, {}, b'{"error": {"message": "Restart with --enable-scale-out"}}'), UserError, "with --enable-scale-out"),
        ((404, {}, b"{}"), UserError, "does not exist"),
    ],
)
def test_a_server_that_cannot_score_chosen_tokens_is_refused(
    answer: Answer, error: type[DistillError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        ask_about(lambda path, body: answer, [rollout(2, prompt=2, response=3)])


def test_a_teacher_in_this_process_gives_every_signal() -> None:
    local = LocalTeacher(load_model(TEACHER, torch.float32, CPU), name="tiny", batch_tokens=256)
    chosen = chosen_ids(ROLLOUTS)
    signals = [
        ReducedTeacher(local, reduce).score(ROLLOUTS)
        for reduce in (to_topk(K), to_chosen(lambda _: chosen), to_sampled)
    ]
    for one, exact, best, asked, sampled, ids_RK in zip(ROLLOUTS, local.score(ROLLOUTS), *signals, chosen, strict=True):
        assert isinstance(exact, HiddenStates) and isinstance(best, TopK)
        assert isinstance(asked, TopK) and isinstance(sampled, SampledLogprobs)
        logprobs_RV = (exact.states_Rd @ local.head_VD.T).log_softmax(-1)
        assert torch.allclose(best.logprobs_RK, logprobs_RV.topk(K).values, atol=1e-5)
        assert torch.allclose(logprobs_RV.gather(-1, best.ids_RK), best.logprobs_RK, atol=1e-5)
        assert torch.allclose(best.tail_logprob_R.exp(), 1 - best.logprobs_RK.exp().sum(-1), atol=1e-5)
        assert torch.equal(asked.ids_RK, ids_RK)
        assert torch.allclose(asked.logprobs_RK, logprobs_RV.gather(-1, ids_RK), atol=1e-5)
        said_R1 = torch.tensor(one.response_ids)[:, None]
        assert torch.allclose(sampled.logprobs_R, logprobs_RV.gather(-1, said_R1).squeeze(-1), atol=1e-5)


APART = "stages.on_policy.divergence.merge_stop_ids=false"


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["teacher.signal=topk", "stages.on_policy.divergence.temperature=2.0"], "at temperature 1"),
        (["stages.on_policy.divergence.estimator=k3"], "nothing is estimated"),
        (["teacher.signal=sampled"], "merge_stop_ids is true"),
        (["teacher.signal=sampled", APART, "stages.on_policy.divergence.kind=jsd"], "estimates the reverse_kl alone"),
        (["teacher.signal=sampled", APART, "stages.on_policy.sampling.think.top_p=0.9"], "sampling.think changes"),
        (["teacher.signal=chosen", "teacher.top_k=1"], "teacher.top_k is 1.*the 2 stop tokens; set it to 2 or more"),
        (["teacher.signal=logits"], "teacher.signal"),
        # The cut-off sum exists for experiments alone.
        (["stages.on_policy.divergence.tail=false"], "tail"),
    ],
)
def test_what_a_signal_cannot_give_is_refused_before_the_run(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(assignments=assignments)


def test_chosen_has_room_for_the_stop_tokens() -> None:
    least = len(Encoder(load_tokenizer(TEACHER)).stop_ids)
    assert resolve_run(assignments=["teacher.signal=chosen", f"teacher.top_k={least}"]).teacher.top_k == least
    # The most probable token alone is a signal, and a stage without the teacher's word has no use for any.
    resolve_run(assignments=["teacher.signal=topk", "teacher.top_k=1"])
    resolve_run(assignments=["teacher.signal=chosen", "teacher.top_k=1", "stages.on_policy=null"])


def test_chosen_without_a_gpu_is_refused_before_a_server_is_started(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="needs a vLLM server on a GPU"):
        small_run(tmp_path / "run", "teacher.backend=vllm", "teacher.signal=chosen")


def test_runs_with_every_signal_start_from_the_same_divergence(tmp_path: Path) -> None:
    """One store, one seed: the first on-policy step has the same responses, and each signal says what it can."""
    choices = {
        "hidden": [],
        "topk": ["teacher.top_k=8"],
        "chosen": ["teacher.top_k=8"],
        "sampled": ["stages.on_policy.divergence.estimator=k3"],
    }
    first: dict[str, dict[str, Any]] = {}
    for signal, more in choices.items():
        _, metrics = small_run(tmp_path / signal, f"teacher.signal={signal}", APART, *more)
        assert all(line["grad_norm"] > 0 for line in metrics)
        first[signal] = next(line for line in metrics if line["stage"] == "on_policy")
    exact = first["hidden"]["reverse_kl"]
    for signal in ("topk", "chosen"):
        assert 0.5 * exact < first[signal]["topk_reverse_kl"] <= exact + 1e-6
        assert (
            first[signal]["loss"] == pytest.approx(first[signal]["topk_reverse_kl"])
            and first[signal]["reverse_kl"] is None
        )
    # The student's own choice holds nearly all of its mass, which the reverse KL weighs by.
    assert first["chosen"]["student_tail"] < first["topk"]["student_tail"]
    assert first["chosen"]["topk_reverse_kl"] > first["topk"]["topk_reverse_kl"]
    assert first["sampled"]["estimated_reverse_kl"] == pytest.approx(exact, rel=0.5)
    for line in first.values():
        assert line["sampled_logprob"] == pytest.approx(first["hidden"]["sampled_logprob"])
