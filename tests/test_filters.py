"""Filters of the off-policy stage: each takes what it is for and is counted; a prompt keeps its other samples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.prompts import load_prompts
from distill.stage_config import FilterSettings
from distill.types import FinishReason, Mode, Prompt, Rollout, Sampling
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run
from pipelines.verifier import verdicts_where_known
from teachers.filters import sift

ENCODER = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))
EVERYTHING = FilterSettings(truncated=True, unclosed=True, max_repetition=0.5, wrong=True)


def said(text: str, *, mode: Mode = "think", ended: FinishReason = "stop", answer: str | None = "7") -> Rollout:
    prompt = Prompt(({"role": "user", "content": "3+4="},), answer=answer)
    ids = tuple(ENCODER.tokenizer.encode(text + ("<|im_end|>" if ended == "stop" else ""), add_special_tokens=False))
    request = ENCODER.request(prompt, mode=mode, sampling=Sampling(99), seed=1)
    return Rollout(request, ids, (False,) * len(ids), (-0.5,) * len(ids), ended, "tiny")


GOOD = said("<think>\n3+4=7\n</think>\n\n7")
CASES = {
    "truncated": said("<think>\n3+4=7\n", ended="length"),
    "unclosed": said("<think>\n3+4=7\n"),
    "repetitive": said("<think>\n" + "3+4=7\n" * 20 + "</think>\n\n7"),
    "wrong": said("<think>\n3+4=8\n</think>\n\n8"),
}


def check(rollouts: list[Rollout]) -> list[bool | None]:
    prompts = resolve_run().prompts
    source = load_prompts(prompts, seed=0, max_prompt_tokens=256, count_tokens=lambda messages: 1)
    return verdicts_where_known(rollouts, source, ENCODER)


@pytest.mark.parametrize("name", CASES)
def test_each_filter_takes_what_it_is_there_for(name: str) -> None:
    bad = CASES[name]
    sifted = sift([GOOD, bad, GOOD], EVERYTHING, ENCODER, check)
    assert sifted.kept == (GOOD, GOOD)
    assert sifted.fallen == {**dict.fromkeys(CASES, 0), name: 1}
    assert sifted.sentence == f"2 of 3 responses are kept (left out: 1 {name})"
    # With this filter switched off nothing else takes it, truncated thinking aside: that is open as well.
    off = {"repetitive": {"max_repetition": None}}.get(name, {name: False})
    off |= {"unclosed": False, "wrong": False} if name in ("truncated", "unclosed") else {}
    assert sift([bad], EVERYTHING.model_copy(update=off), ENCODER, check).kept == (bad,)


def test_a_response_counts_for_the_first_filter_that_takes_it() -> None:
    both = said("<think>\n" + "3+4=7\n" * 20, ended="length")
    assert Counter(sift([both, *CASES.values()], EVERYTHING, ENCODER, check).fallen) == {
        "truncated": 2,
        "unclosed": 1,
        "repetitive": 1,
        "wrong": 1,
    }


def test_without_an_answer_nothing_is_wrong() -> None:
    open_question = said("<think>\n3+4=8\n</think>\n\n8", answer=None)
    assert check([open_question, GOOD, CASES["wrong"]]) == [None, True, False]
    assert sift([open_question], EVERYTHING, ENCODER, check).kept == (open_question,)
    assert sift([open_question, GOOD, CASES["wrong"]], EVERYTHING, ENCODER, check).sentence == (
        "2 of 3 responses are kept (left out: 1 wrong; not judged: 1, whose prompts have no answer)"
    )
    unwanted = EVERYTHING.model_copy(update={"wrong": False})
    assert sift([open_question], unwanted, ENCODER, check).sentence == "1 of 1 responses are kept"


def test_the_verifier_is_not_asked_where_nobody_wants_its_verdict() -> None:
    def unasked(rollouts: Any) -> list[bool | None]:
        raise AssertionError("nobody asked")

    everything_else = EVERYTHING.model_copy(update={"wrong": False})
    assert sift([GOOD, CASES["wrong"]], everything_else, ENCODER, unasked).kept == (GOOD, CASES["wrong"])


def test_answers_of_ones_own_choose_their_grader(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "Who?", "answer": "Ada"}\n{"prompt": "1/2?", "answer": "0.5"}\n')
    settings = resolve_run(prompts=str(tmp_path / "own.jsonl")).prompts
    source = load_prompts(settings, seed=0, max_prompt_tokens=256, count_tokens=lambda messages: 1)
    half, ada = said("</think>\n\nIt is 1/2", answer="0.5"), said("</think>\n\nada", answer="Ada")
    other = replace(ada, request=replace(ada.request, prompt=replace(ada.request.prompt, answer="Grace")))
    assert verdicts_where_known([half, ada, other], source, ENCODER) == [True, True, False]


SMALL = (
    "stages.off_policy.num_prompts=24",
    "stages.off_policy.samples_per_prompt=3",
    "stages.off_policy.batch_size=8",
    "stages.off_policy.epochs=1",
    "stages.on_policy.steps=1",
    "stages.on_policy.prompts_per_step=2",
    "evaluation.num_questions=2",
    "evaluation.modes=[no_think]",
)


def test_a_run_counts_what_falls_and_trains_on_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without thinking the embedded teacher is wrong more often than right."""
    config = resolve_run(assignments=[*SMALL, f"store={tmp_path}/store", "stages.off_policy.filters.wrong=true"])
    run(config, tmp_path / "run", command=["a test"])
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["off_policy"]
    assert len(stage["responses"]) == 72, "what was asked for is listed, kept or not"
    assert stage["num_kept"] + sum(stage["filtered"].values()) == 72
    assert stage["filtered"]["wrong"] > 10
    assert f"off_policy: {stage['num_kept']} of 72 responses are kept" in capsys.readouterr().err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in steps] == ["off_policy"] * (stage["num_kept"] // 8) + ["on_policy"]


def test_a_batch_of_more_than_all_epochs_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["stages.off_policy.num_prompts=5", "stages.off_policy.samples_per_prompt=2", "stages.off_policy.epochs=2"]

    def learnt(batch_size: int) -> tuple[str, float, list[int]]:
        out = tmp_path / f"run-{batch_size}"
        batch = f"stages.off_policy.batch_size={batch_size}"
        config = resolve_run(assignments=[*SMALL, *few, batch, f"store={tmp_path}/store"])
        run(config, out, command=["a test"])
        stage = json.loads((out / "manifest.json").read_text())["stages"]["off_policy"]
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        learnt = [row["num_responses"] for row in rows if row["stage"] == "off_policy"]
        return capsys.readouterr().err, stage["epochs"], learnt

    said, epochs, batches = learnt(64)
    assert (epochs, batches) == (6.4, [64])
    assert (
        "off_policy: 10 responses in 2 epochs do not fill a batch of 64: the one step takes each of them 6.4 times; "
        "set stages.off_policy.batch_size to at most 20"
    ) in said
    said, epochs, batches = learnt(8)
    assert (epochs, batches) == (1.6, [8, 8]) and "do not fill" not in said


def test_nothing_left_is_a_sentence(tmp_path: Path) -> None:
    config = resolve_run(
        assignments=[*SMALL, f"store={tmp_path}/store", "stages.off_policy.filters.max_repetition=0.0"]
        + [f"stages.off_policy.sampling.{mode}.max_new_tokens=3" for mode in ("think", "no_think")]
        + ["stages.off_policy.mixture={think_share: 1.0, soft_switch_share: 0.0}"]
    )
    with pytest.raises(UserError, match=r"filters leave none of the teacher's 72 responses \(72 truncated\)"):
        run(config, tmp_path / "run", command=["a test"])
