"""Mode switching: the conversations follow the rule, and what a scripted model does is found by hand."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_runner import Scripted

from distill.chat import switch_in
from distill.embedded.tokenizer import build_tokenizer
from distill.encode import Encoder
from distill.errors import DistillError, StoppedError, UserError
from distill.family import Shape
from distill.sampler import OnFinished
from distill.types import MODES, Message, Request, Rollout, Sampling
from eval.dialogues import KINDS, dialogues
from eval.switching import ModeSwitching, examine_switching

QUESTIONS = [f"{number % 10}+{number // 10}=" for number in range(100)]
SAMPLING = {mode: Sampling(max_new_tokens=40) for mode in MODES}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


def flags_of(message: Message) -> list[str]:
    """The flags of a message in their order, found without the project's own rule."""
    words = message["content"].replace('"', " ").replace("'", " ").replace("(", " ").replace(")", " ").split()
    return [word for word in words if word in ("/think", "/no_think")]


def test_every_turns_mode_is_that_of_the_last_flag_so_far() -> None:
    held, again, other = (dialogues(QUESTIONS, num=400, num_turns=4, seed=seed) for seed in (0, 0, 1))
    assert held == again != other
    for dialogue in held:
        history: list[Message] = []
        for turn in dialogue:
            history += turn.messages
            asked = [message for message in history if message["role"] != "assistant"]
            flags = [flag for message in asked for flag in flags_of(message)]
            assert turn.wanted == (flags[-1][1:] if flags else "think") == (switch_in(history) or "think")
            history.append({"role": "assistant", "content": "7 /think /no_think"})


def test_every_kind_of_turn_occurs_and_is_what_it_says() -> None:
    held = dialogues(QUESTIONS, num=400, num_turns=4, seed=0)
    counts = Counter((turn.kind, turn.wanted) for dialogue in held for turn in dialogue)
    assert {(kind, mode) for kind in KINDS for mode in MODES} == set(counts) and min(counts.values()) > 20
    for dialogue in held:
        for number, turn in enumerate(dialogue):
            user = turn.messages[-1]
            assert user["role"] == "user"
            marks = [mark for mark in "'\"" if mark in user["content"]]
            assert bool(marks) == (turn.kind == "quoted" and number == 3)
            if turn.kind == "quoted":
                before = dialogue[number - 1].wanted
                system = [flag for message in turn.messages[:-1] for flag in flags_of(message)]
                assert turn.wanted != (system[-1][1:] if system else before), "a quoted flag that changes nothing"
            if len(flags_of(user)) == 2:
                assert turn.kind == "both" and len(set(flags_of(user))) == 2


def test_a_question_with_a_flag_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="holds a flag of its own"):
        dialogues(["3+4= /think"], num=1, num_turns=1, seed=0)


def obeying(request: Request) -> str:
    return (
        "<think>\n1+1=2\n</think>\n\n2<|im_end|>" if request.mode == "think" else "<think>\n\n</think>\n\n2<|im_end|>"
    )


def examine(encoder: Encoder, sampler: Any, **changes: Any) -> ModeSwitching:
    settings: dict[str, Any] = {"num": 40, "sampling": SAMPLING, "seed": 0, "checkpoint": "start", **changes}
    return examine_switching(QUESTIONS, sampler=sampler, encoder=encoder, **settings)


def test_a_model_that_obeys_is_always_right(encoder: Encoder) -> None:
    sampler = Scripted(encoder, obeying)
    found = examine(encoder, sampler)
    assert {result.mean for result in found.metrics.values()} == {1.0}
    assert [metric for metric in found.metrics if "@" in metric] == [f"right_mode@{turn}" for turn in (1, 2, 3, 4)]
    assert found.leakage is not None and (found.leakage.share.mean, found.leakage.mean_length) == (0.0, 0.0)
    first, last = sampler.seen[0], sampler.seen[-1]
    # The model has the choice: no flag is added, no empty block is put into the prompt.
    assert encoder.decode(first.prompt_ids).endswith("<|im_start|>assistant\n")
    assert encoder.decode(last.prompt_ids).count("<|im_start|>assistant\n2<|im_end|>") == 3, (
        "its answers are the history"
    )
    assert (found.num_dialogues, found.num_turns, found.num_broken) == (40, 4, 0)


def test_a_model_that_always_thinks_leaks_by_hand(encoder: Encoder, tmp_path: Path) -> None:
    def thinks(request: Request) -> str:
        return "<think>\n11\n</think>\n\n2<|im_end|>"

    found = examine(encoder, Scripted(encoder, thinks), out=tmp_path, shape=Shape(2, 2, 1, 16, 32, 64, 320, True))
    metrics = {name: result.mean for name, result in found.metrics.items()}
    assert (metrics["right_mode/think"], metrics["right_mode/no_think"]) == (1.0, 0.0)
    held = dialogues(QUESTIONS, num=40, num_turns=4, seed=0)
    ruled = [[turn for turn in dialogue if turn.kind != "quoted"] for dialogue in held]
    by_dialogue = [sum(turn.wanted == "think" for turn in turns) / len(turns) for turns in ruled]
    assert metrics["right_mode"] == pytest.approx(sum(by_dialogue) / 40)
    assert found.leakage is not None
    # <think> \n 1 1 \n </think>: six tokens, every time.
    assert (found.leakage.share.mean, found.leakage.mean_length) == (1.0, 6.0)
    frame = pd.read_parquet(tmp_path / "start-mode_switching.parquet")
    assert len(frame) == 160 and frame["num_tokens"].sum() == found.num_tokens
    assert (frame["right"] == (frame["wanted"] == "think")).all()
    assert found.flops is not None and found.flops > 0
    entry = found.entries[0]
    assert list(entry) == ["checkpoint", "task", "mode", "metric", "mean", "ci95", "num_questions", "num_samples"]
    assert (entry["task"], entry["metric"], entry["num_questions"]) == ("mode_switching", "right_mode", 40)


def test_it_goes_on_after_the_last_finished_turn_and_is_read_back(encoder: Encoder, tmp_path: Path) -> None:
    whole = examine(encoder, Scripted(encoder, obeying), out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        examine(encoder, Scripted(encoder, obeying, num_calls=2), out=tmp_path / "cut")
    rest = Scripted(encoder, obeying)
    resumed = examine(encoder, rest, out=tmp_path / "cut")
    assert rest.calls == 2 and sorted(path.suffix for path in (tmp_path / "cut").iterdir()) == [".json", ".parquet"]
    assert dataclasses.replace(resumed, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)
    silent = Scripted(encoder, obeying, num_calls=0)
    assert examine(encoder, silent, out=tmp_path / "cut") == resumed
    document = json.loads((tmp_path / "cut" / "start-mode_switching.json").read_text())
    assert document["kind"] == "mode_switching" and ModeSwitching.from_json(document) == resumed
    again = Scripted(encoder, obeying)
    examine(encoder, again, out=tmp_path / "cut", seed=1)
    assert again.calls == 4


class Breaks(Scripted):
    """Fails on requests that ``poisoned`` names."""

    def __init__(self, encoder: Encoder, poisoned: Callable[[Request], bool]) -> None:
        super().__init__(encoder, obeying)
        self.poisoned = poisoned

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if any(map(self.poisoned, requests)):
            raise DistillError("broken off")
        return super().generate(requests, on_finished)


def test_a_broken_turn_is_wrong_and_counted_and_its_conversation_goes_on(encoder: Encoder) -> None:
    first = Scripted(encoder, obeying)
    examine(encoder, first)
    poison = first.seen[3].seed
    found = examine(encoder, Breaks(encoder, lambda request: request.seed == poison))
    assert found.num_broken == 1 and found.metrics["right_mode"].num_questions == 40
    with pytest.raises(DistillError):
        examine(encoder, Breaks(encoder, lambda request: True))
    tight = examine(encoder, Scripted(encoder, obeying), context=75)
    assert 0 < tight.num_broken < 160, "later turns have no room"


def test_the_embedded_teacher_follows_the_last_flag() -> None:
    import torch

    from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
    from distill.evaluation_config import EvaluationSettings
    from distill.family import resolve
    from distill.sampler import TransformersSampler
    from pipelines.examination import Subject, examine_mode_switching

    opened = open_checkpoint(resolve("tiny", role="teacher"))
    encoder = Encoder(load_tokenizer(opened))
    sampler = TransformersSampler(load_model(opened, torch.float32, "cpu"), encoder, speaker="tiny")
    sampling = {"think": {"max_new_tokens": 96, "temperature": 0.6}, "no_think": {"max_new_tokens": 96}}
    settings = EvaluationSettings.model_validate({"sampling": sampling})
    found = examine_mode_switching(Subject("tiny", sampler, encoder), settings, num=24, seed=0, out=None)
    for metric in ("right_mode/plain", "right_mode/system", "right_mode@1"):
        assert found.metrics[metric].mean >= 0.95, metric
    assert found.leakage is not None and found.leakage.share.mean < 0.1
