"""The embedded task, tokenizer and checkpoints: what the rest of the project relies on, on few questions."""

import itertools
import json
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.chat import EARLY_STOP, EMPTY_THINK, END_OF_TEXT, IM_END, IM_START, TEMPLATE_PATH, switch_in
from distill.embedded import NAMES, checkpoint_dir
from distill.embedded.lessons import chat_lesson, document
from distill.embedded.task import ask, grade, lengths_up_to, questions, solution, split_of
from distill.embedded.tokenizer import VOCAB_ROWS, build_tokenizer
from distill.errors import UserError
from pipelines.embedded import build
from pipelines.embedded_check import Speaker, budget_curve, hard_switch, mode_following, score, worked_documents

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "qwen3_chat_cases.json").read_text("utf-8"))


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint_dir(name))
    return loaded


# ---- task


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("3+4*2-7=", "3+4=7\n7*2=4\n4-7=7", "7"),
        ("9+9=", "9+9=8", "8"),
        ("2+3*4=", "2+3=5\n5*4=0", "0"),
        ("0-1-1*9=", "0-1=9\n9-1=8\n8*9=2", "2"),
    ],
)
def test_chains_are_evaluated_from_left_to_right_modulo_ten(text: str, thinking: str, answer: str) -> None:
    question = ask(text)
    assert (solution(question), question.answer) == (thinking, answer)


@pytest.mark.parametrize("text", ["", "3", "3=", "3+=", "3+4", "+3+4=", "12+3=", "3/4=", "3+4 =", "\u0663+4="])
def test_refuses_what_is_no_chain(text: str) -> None:
    with pytest.raises(UserError, match="chain"):
        ask(text)


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_a_chain_agrees_with_exact_arithmetic(seed: int, max_operations: int) -> None:
    question = questions(seed, 1, lengths=lengths_up_to(max_operations))[0]
    assert question.num_operations <= max_operations
    nested = question.text[:-1]
    for at in range(len(nested) - 2, 0, -2):
        nested = nested[: at + 2] + ")" + nested[at + 2 :]
    assert str(eval("(" * question.num_operations + nested) % 10) == question.answer


def test_questions_are_a_function_of_the_seed_and_the_splits_share_none() -> None:
    train, test = questions(3, 2_000), questions(3, 2_000, split="test")
    assert train == questions(3, 2_000)
    assert train != questions(4, 2_000)
    assert len({question.text for question in test}) == 2_000
    assert {split_of(question.text) for question in train} == {"train"}
    assert {split_of(question.text) for question in test} == {"test"}


def test_used_up_test_questions_give_way_to_longer_ones() -> None:
    drawn = [question.num_operations for question in questions(0, 100, lengths=(1.0,), split="test")]
    assert drawn[:20] == [1] * 20
    assert 60 <= drawn.count(1) <= 90
    assert drawn.count(1) + drawn.count(2) == 100


@pytest.mark.parametrize("lengths", [(), (0.0,), (-1.0, 2.0), (1.0,) * 9])
def test_refuses_lengths_that_are_no_weights(lengths: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="weights"):
        questions(0, 1, lengths=lengths)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>\n3+4=7\n</think>\n\n7<|im_end|>", True),
        (f"{EMPTY_THINK}7", True),
        (f"<think>\n3+4{EARLY_STOP}7", True),
        ("7<|im_end|>", True),
        ("7<|endoftext|>", True),
        ("17", False),
        ("7.", False),
        ("", False),
        ("<think>\n3+4=7", False),
        ("<think>\n3+4=7\n</think>\n\n", False),
        ("<think>\n7\n</think>\n\n8", False),
        ("<think>\n</think>\n\n7<think>7", False),
    ],
)
def test_only_the_text_after_the_thinking_counts(response: str, right: bool) -> None:
    assert grade(response, "7") is right


# ---- tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_all_models_have_the_tokenizer_that_the_code_builds(name: str) -> None:
    built = build_tokenizer()
    text = CASES[20]["text"] + EARLY_STOP
    assert tokenizer(name).get_vocab() == built.get_vocab()
    assert tokenizer(name).encode(text) == built.encode(text)
    assert (checkpoint_dir(name) / "chat_template.jinja").read_text("utf-8") == TEMPLATE_PATH.read_text("utf-8")


@given(st.text())
def test_any_text_survives_up_to_unicode_normalisation(text: str) -> None:
    ids = tokenizer("tiny").encode(text)
    assert tokenizer("tiny").decode(ids) == unicodedata.normalize("NFC", text)


def test_qwen3s_units_are_single_tokens() -> None:
    tok = tokenizer("tiny")
    for unit in ("user", "assistant", "system", "\n\n", "/no", "_think", "think", "7", EARLY_STOP):
        assert len(tok.encode(unit)) == 1, unit
    for marker in (IM_START, IM_END, END_OF_TEXT, "<think>", "</think>"):
        assert len(tok.encode(marker)) == 1, marker
    assert [tok.decode([token]) for token in tok.encode("/think")] == ["/", "think"]
    assert [tok.decode([token]) for token in tok.encode("/no_think")] == ["/no", "_think"]
    assert tok.encode("42*") == [*tok.encode("4"), *tok.encode("2"), *tok.encode("*")]


def test_the_ends_of_thinking_are_not_special_to_a_decoder() -> None:
    tok = tokenizer("tiny")
    assert tok.decode(tok.encode(f"{EMPTY_THINK}7{IM_END}"), skip_special_tokens=True) == f"{EMPTY_THINK}7"


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_tokenizer_renders_the_same_bytes(case: dict[str, Any]) -> None:
    given_thinking = {} if case["enable_thinking"] is None else {"enable_thinking": case["enable_thinking"]}
    text = tokenizer("nano").apply_chat_template(
        case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"], **given_thinking
    )
    assert text == case["text"]


# ---- checkpoints


def test_all_weights_together_are_small() -> None:
    assert sum((checkpoint_dir(name) / "model.safetensors").stat().st_size for name in NAMES) <= 4_000_000
    assert sum(path.stat().st_size for path in checkpoint_dir("tiny").parent.rglob("*.json")) <= 200_000


@pytest.mark.parametrize("name", NAMES)
def test_the_embeddings_have_padded_rows_as_qwen3s_do(name: str) -> None:
    with safe_open(checkpoint_dir(name) / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape()[0] == VOCAB_ROWS
        assert {str(weights.get_slice(key).get_dtype()) for key in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert len(tokenizer(name)) < VOCAB_ROWS


def test_instruct_and_base_stop_on_different_tokens() -> None:
    def stops(name: str) -> Any:
        return json.loads((checkpoint_dir(name) / "generation_config.json").read_text("utf-8"))["eos_token_id"]

    vocab = tokenizer("tiny").get_vocab()
    assert stops("tiny") == [vocab[IM_END], vocab[END_OF_TEXT]]
    assert stops("nano") == stops("nano-moe") == [vocab[END_OF_TEXT]]


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UserError, match="'huge'"):
        checkpoint_dir("huge")


@cache
def speaker(name: str) -> Speaker:
    return Speaker(checkpoint_dir(name))


def test_the_teacher_is_strong_with_thinking_and_middling_without() -> None:
    asked = questions(1, 200, split="test")
    assert score(speaker("tiny"), asked, "think")["all"] >= 0.95
    assert 0.25 <= score(speaker("tiny"), asked, "no_think")["all"] <= 0.75


def test_the_teacher_follows_the_last_switch_over_four_turns() -> None:
    assert min(mode_following(speaker("tiny"), num=64).values()) >= 0.95
    assert min(hard_switch(speaker("tiny"), num=64).values()) >= 0.95


def test_the_teachers_score_rises_with_its_thinking_budget() -> None:
    # A speaker of its own draws the same responses whatever other tests drew before.
    scores = list(budget_curve(Speaker(checkpoint_dir("tiny")), questions(2, 300, split="test")).values())
    assert all(later >= earlier - 0.08 for earlier, later in itertools.pairwise(scores))
    assert scores[0] <= 0.7
    assert scores[-1] >= 0.93


@pytest.mark.parametrize(("name", "bar"), [("nano", 0.9), ("nano-moe", 0.15)])
def test_a_base_student_reads_documents_and_knows_no_chat(name: str, bar: float) -> None:
    asked = questions(3, 64, split="test")
    assert score(speaker(name), asked, "think")["all"] <= 0.05
    short = questions(3, 64, lengths=lengths_up_to(2), split="test")
    assert worked_documents(speaker(name), short)["all"] >= bar


def test_lessons_answer_a_train_question_in_the_mode_that_the_switches_ask_for() -> None:
    tok, rng = tokenizer("tiny"), random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(300):
        lesson = chat_lesson(rng, tok)
        text = str(tok.decode(list(lesson.ids)))
        prompt, _, after = text.rpartition("<|im_start|>assistant\n")
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, flags=re.DOTALL)
        question = ask(re.findall(r"\d(?:[+*-]\d)+=", prompt)[-1])
        assert split_of(question.text) == "train"
        assert grade(after, question.answer)
        first = lesson.trained.index(True)
        hard = str(tok.decode(list(lesson.ids[:first]))).endswith(EMPTY_THINK)
        mode = "no_think" if hard else switch_in([{"role": role, "content": text} for role, text in turns]) or "think"
        kind = "cut" if EARLY_STOP in after else "whole" if mode == "think" else "hard" if hard else "soft"
        assert (EMPTY_THINK in after) == (mode == "no_think")
        # Trained are all the response's tokens but the block that the hard switch wrote and the forced early stop.
        untrained = {"cut": EARLY_STOP, "hard": EMPTY_THINK}.get(kind, "")
        assert sum(lesson.trained) == len(tok.encode(after)) - len(tok.encode(untrained))
        seen[kind] += 1
    assert min(seen[kind] for kind in ("cut", "whole", "hard", "soft")) >= 30


def test_documents_hold_no_chat_token() -> None:
    rng = random.Random(0)
    text = "".join(document(rng) for _ in range(300))
    assert not any(token in text for token in (IM_START, IM_END, "<think>", "</think>"))


@pytest.mark.slow
def test_the_command_rebuilds_a_student_and_checks_it(tmp_path: Path) -> None:
    build("nano", tmp_path / "nano", num_steps=150)
    command = [sys.executable, "-m", "pipelines.embedded", "--out", str(tmp_path), "--only", "nano", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["nano"]["document_loss"] < 2.0
