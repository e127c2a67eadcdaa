"""A teacher that is not what it claims is refused before the first gradient, whatever way it lies."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill import cli
from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.sampler import TransformersSampler
from distill.types import HiddenStates, Prompt, Rollout
from pipelines.hiring import Hired
from pipelines.preflight import Finding
from pipelines.probes import MOST_TOKENS, PROBES, Probe, ask_teacher, probe_requests
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run
from teachers.local import LocalTeacher
from teachers.reduced import ReducedTeacher, to_sampled, to_topk
from teachers.store import ResponseStore

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
ENCODER = Encoder(load_tokenizer(TEACHER))
URL = "http://gpu-1:8001"


def tiny(*, noise: float = 0.0, layers_only: bool = False) -> Any:
    """The embedded teacher; with ``noise``, its weights are that much off, relative to their size."""
    model = load_model(TEACHER, torch.float32, "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if noise and not (layers_only and "layers" not in name):
                parameter += noise * parameter.std() * torch.randn_like(parameter)
    return model


def judge_of(model: Any) -> LocalTeacher:
    return LocalTeacher(model, name="tiny", batch_tokens=4096)


class Server:
    """Somebody's server: its states are those of ``inside``, and the trainer makes logits with the real head."""

    name = "tiny"

    def __init__(self, inside: Any) -> None:
        self.inside = judge_of(inside)
        self.head_VD = judge_of(tiny()).head_VD

    def score(self, rollouts: Any) -> list[HiddenStates]:
        return self.inside.score(rollouts)


class Shaky(Server):
    """Another rounding, or worse, each time."""

    def __init__(self, amount: float) -> None:
        super().__init__(tiny())
        self.amount = amount

    def score(self, rollouts: Any) -> list[HiddenStates]:
        return [
            replace(states, states_Rd=states.states_Rd + self.amount * torch.randn_like(states.states_Rd))
            for states in super().score(rollouts)
        ]


def spoken(model: Any, num: int = 4) -> list[Rollout]:
    prompts = [Prompt(({"role": "user", "content": f"{number}+4*7-{number}="},)) for number in range(num)]
    sampler = TransformersSampler(model, ENCODER, speaker="tiny")
    return sampler.generate(probe_requests(prompts, ENCODER, max_new_tokens=96))


class FakeClient:
    """Somebody's server, as far as it says how long a sequence may be."""

    def __init__(self, longest: int | None) -> None:
        self.replicas = [SimpleNamespace(url=URL, longest=longest, model="14B")]

    def only(self, url: str) -> AbstractContextManager[None]:
        assert url == URL
        return nullcontext()


def probe(judge: Any, said: list[Rollout], *, exact: bool = True, longest: int | None = 512) -> Probe:
    hired = Hired(
        judge,
        None,  # type: ignore[arg-type]
        judged_at={URL: FakeClient(longest)},  # type: ignore[dict-item]
        spoken_at={},
        foreign=(URL,),
        takes_turns=False,
        is_exact=exact,
    )
    return Probe(TEACHER, hired, {"the response store": said}, needed=300)


def ask(probe: Probe, *, names: tuple[str, ...] | None = None) -> list[Finding]:
    return list(ask_teacher(probe, names=names, skip=()))


def failed(probe: Probe, *, skip: tuple[str, ...] = ()) -> str:
    """The check that refuses, all before it having passed."""
    for name in PROBES:
        try:
            list(ask_teacher(probe, names=(name,), skip=skip))
        except UserError as error:
            assert URL in str(error)
            return name
    return "none"


def test_the_teacher_itself_passes(capsys: pytest.CaptureFixture[str]) -> None:
    findings = ask(probe(Server(tiny()), spoken(tiny())))
    assert [finding.check for finding in findings] == list(PROBES)
    assert not any(finding.skipped for finding in findings)


@pytest.mark.parametrize("exact", [True, False])
def test_stale_weights_behind_the_url_are_refused(exact: bool) -> None:
    """The tolerance for 16 bits still tells another model."""
    stale = tiny(noise=0.3)
    assert failed(probe(Server(stale), spoken(tiny()), exact=exact)) == "weights"
    # Also where the model is too large to be compared with: what it was heard to say when it spoke is another's.
    assert failed(probe(Server(stale), spoken(tiny()), exact=exact), skip=("weights",)) == "responses"
    # And where the same stale server speaks and judges: the trainer's own head does not fit its states.
    assert failed(probe(Server(stale), spoken(stale), exact=exact), skip=("weights",)) == "responses"


def test_a_body_that_is_stale_under_the_right_head_is_seen_by_comparing_weights() -> None:
    """Speaker and judge agree with each other and with the head; only the checkpoint knows better."""
    stale = tiny(noise=0.1, layers_only=True)
    assert failed(probe(Server(stale), spoken(stale)), skip=("weights",)) == "none"
    assert failed(probe(Server(stale), spoken(stale))) == "weights"


def test_large_weights_are_not_loaded_and_the_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.probes.REFERENCE_BYTES", 1000)
    (finding,) = ask(probe(Server(tiny(noise=0.1)), spoken(tiny())), names=("weights",))
    assert "too large" in finding.text and f"see responses; {URL} says that it serves 14B" in finding.text


def test_of_probabilities_alone_another_large_model_is_not_seen() -> None:
    """A limit that the documentation names: one server speaks and judges, and agrees with itself. Hidden states do not
    fit the trainer's head then."""
    other = tiny(noise=0.3)
    said = spoken(other)
    assert failed(probe(Server(other), said), skip=("weights",)) == "responses"
    assert failed(probe(ReducedTeacher(judge_of(other), to_topk(20)), said), skip=("weights",)) == "none"
    assert failed(probe(ReducedTeacher(judge_of(other), to_topk(20)), said)) == "weights"


def test_normalised_states_are_refused() -> None:
    class Normalised(Server):
        def score(self, rollouts: Any) -> list[HiddenStates]:
            return [
                replace(states, states_Rd=torch.nn.functional.normalize(states.states_Rd, dim=-1))
                for states in super().score(rollouts)
            ]

    assert failed(probe(Normalised(tiny()), spoken(tiny()), exact=False)) == "weights"
    assert failed(probe(Normalised(tiny()), spoken(tiny()), exact=False), skip=("weights",)) == "responses"


@pytest.mark.parametrize(("reduce", "held"), [(to_topk(20), 0.3), (to_topk(300), 0.9), (to_sampled, 1.0)])
def test_smaller_signals_are_checked_by_what_they_hold(reduce: Any, held: float) -> None:
    said = spoken(tiny())
    num_tokens = sum(len(rollout.response_ids) for rollout in said)
    findings = {one.check: one.text for one in ask(probe(ReducedTeacher(Server(tiny()), reduce), said))}
    for check in ("repeat", "weights", "responses"):
        num_compared = int(findings[check].partition(" of ")[2].partition(" tokens")[0])
        assert held * num_tokens <= num_compared <= num_tokens
    assert failed(probe(ReducedTeacher(Server(tiny(noise=0.3)), reduce), said)) == "weights"
    assert failed(probe(ReducedTeacher(Server(tiny(noise=0.3)), reduce), said), skip=("weights",)) == "responses"


def test_repeats_that_differ_are_reported_and_refused_only_if_large() -> None:
    said = spoken(tiny())
    for amount, expected in ((0.0, "at most"), (0.02, "more than rounding should make")):
        (finding,) = ask(probe(Shaky(amount), said, exact=False), names=("repeat",))
        assert expected in finding.text, finding.text
    assert failed(probe(Shaky(1.0), said, exact=False)) == "repeat"


def test_a_server_that_takes_too_little_is_refused() -> None:
    said = spoken(tiny())
    assert failed(probe(Server(tiny()), said, longest=299)) == "servers"
    with pytest.raises(UserError, match=r"takes 299 tokens.*--max-model-len 300"):
        ask(probe(Server(tiny()), said, longest=299))
    for longest, text in ((300, "within 300"), (None, "do not say")):
        (finding,) = ask(probe(Server(tiny()), said, longest=longest), names=("servers",))
        assert text in finding.text


def test_a_long_response_is_checked_by_its_beginning() -> None:
    said = spoken(tiny(), num=1)[0]
    more = MOST_TOKENS - len(said.response_ids) + 5
    ids = said.response_ids + (5,) * more
    long = replace(said, response_ids=ids, forced=(False,) * len(ids), logprobs=said.logprobs + (0.0,) * more)
    assert [len(rollout.response_ids) for rollout in probe(None, [long]).rollouts] == [MOST_TOKENS]


SMALL = (
    "stages.off_policy.num_prompts=16",
    "stages.off_policy.batch_size=8",
    "stages.off_policy.epochs=1",
    "stages.on_policy.steps=1",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=2",
)


def small_run(out: Path, *assignments: str) -> list[dict[str, Any]]:
    run(resolve_run(assignments=[*SMALL, f"store={out.parent}/store", *assignments]), out, command=["a test"])
    return list(json.loads((out / "manifest.json").read_text())["preflight"])


def test_a_run_lists_and_records_what_was_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = small_run(tmp_path / "run", "preflight.skip=[repeat, merges]")
    names = [finding["check"] for finding in findings]
    assert names[-5:] == [*PROBES, "responses"] and len(set(names)) == len(names) - 1
    assert {finding["check"] for finding in findings if finding["skipped"]} == {"repeat", "merges"}
    assert "stage off_policy" in findings[-1]["text"] and {finding["teacher"] for finding in findings} == {"tiny"}
    heard = capsys.readouterr().err
    assert heard.count("preflight, tiny teaches nano:") == 3
    assert all(finding["text"] in heard for finding in findings)


def test_stored_responses_of_another_model_stop_a_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store says that this teacher spoke them, and their log-probabilities say that it did not."""
    small_run(tmp_path / "first", "evaluation.modes=[no_think]")
    store = ResponseStore(tmp_path / "store")
    forged = tmp_path / "forged"
    for collection in store.collections():
        for _, kept in collection.walk([]):
            from teachers.store import TeacherIdentity

            meta = collection.meta
            identity = TeacherIdentity(meta["revision"], meta["template_hash"], meta["tokenizer_hash"], "tiny")
            other = replace(kept.rollout, logprobs=tuple(value - 0.5 for value in kept.rollout.logprobs))
            ResponseStore(forged).put(identity, [other], run=kept.run)
    out = tmp_path / "run"
    command = ["distill", "run", "--out", str(out), "--store", str(forged), "--skip-preflight", "repeat"]
    monkeypatch.setattr(sys, "argv", [*command, *(part for one in SMALL for part in ("--set", one))])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    heard = capsys.readouterr().err
    assert stopped.value.code == 2, heard
    assert "responses from the response store" in heard and "distill responses ls" in heard
    assert "Traceback" not in heard and not (out / "metrics.jsonl").exists() and not (out / "config.yaml").exists()
