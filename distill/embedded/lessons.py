"""What the embedded models are trained on: conversations for the teacher, raw documents for the base students.

Everything is drawn from a `random.Random`, from train questions only. The facts of single operations are the exception
by nature: whoever writes down the steps of long chains has seen all 300 of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from distill.chat import EARLY_STOP, EMPTY_THINK, END_OF_TEXT, IM_END, THINK_OPEN, render, switch_in
from distill.embedded.task import DEFAULT_LENGTHS, MAX_OPERATIONS, Question, ask, questions, solution
from distill.types import Message, Mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EVEN: Final = (1.0,) * MAX_OPERATIONS
# Without thinking, chains of four and more operations are guesses: little is learned from them.
_SHORT: Final = (0.2, 0.45, 0.15, 0.04, 0.04, 0.04, 0.04, 0.04)
_DOCUMENT_LENGTHS: Final = (0.4, 0.6)
# Between what is copied and the copy lies text of several lengths, or a base student learns one distance by heart.
_CONNECTIVES: Final = ("", ":", " (mod 10)", ", step by step:", " from left to right", " is worked out as follows.")
_FLAGS: Final = ("/think", "/no_think")
_SYSTEMS: Final = ("", "Be brief. ", "You are a calculator. ", "Answer modulo 10. ")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Token ids and which of them are trained on; both have the lesson's length."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


def one_question(rng: random.Random, lengths: Sequence[float] = DEFAULT_LENGTHS) -> Question:
    """One train question."""
    return questions(rng.getrandbits(48), 1, lengths=lengths)[0]


def conversation(rng: random.Random, *, num_turns: int, lengths: Sequence[float] = DEFAULT_LENGTHS) -> list[Message]:
    """A conversation that ends with a question: soft switches now and then, right answers before."""
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS) + rng.choice((*_FLAGS, ""))})
    for turn in range(num_turns):
        question = one_question(rng, lengths if turn == num_turns - 1 else DEFAULT_LENGTHS)
        text = question.text
        if rng.random() < 0.4:
            flag = rng.choice(_FLAGS)
            text = rng.choice((f"{text} {flag}", f"{text} {flag}", f"{flag} {text}", f"{text}\n{flag}"))
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": question.answer}]
    return messages[:-1]


def plain_lesson(rng: random.Random, tokenizer: PreTrainedTokenizerBase) -> Lesson:
    """One question without flags and the whole thinking that solves it: chaining steps is learned on these first."""
    question = one_question(rng, _EVEN)
    prompt = render([{"role": "user", "content": question.text}])
    response = f"<think>\n{solution(question)}\n</think>\n\n{question.answer}{IM_END}"
    return _lesson(tokenizer, (prompt, False), (response, True))


def chat_lesson(rng: random.Random, tokenizer: PreTrainedTokenizerBase) -> Lesson:
    """One response in either mode after one to four turns; some have their thinking cut by the early-stop sentence."""
    hard = rng.random() < 0.25
    lengths = _SHORT if hard or rng.random() < 0.4 else _EVEN
    messages = conversation(rng, num_turns=rng.choices((1, 2, 3, 4), weights=(6, 1.5, 1.25, 1.25))[0], lengths=lengths)
    question = _last_question(messages)
    mode: Mode = "no_think" if hard else switch_in(messages) or "think"
    prompt = (render(messages, enable_thinking=False if hard else None), False)
    answer = (question.answer + IM_END, True)
    if mode == "no_think":
        return _lesson(tokenizer, prompt, ("" if hard else EMPTY_THINK, True), answer)
    thinking = f"<think>\n{solution(question)}"
    if rng.random() < 0.65:
        return _lesson(tokenizer, prompt, (f"{thinking}\n</think>\n\n", True), answer)
    return _lesson(tokenizer, prompt, (_cut(rng, thinking), True), (EARLY_STOP, False), answer)


def document(rng: random.Random, *, lengths: Sequence[float] = _DOCUMENT_LENGTHS) -> str:
    """One raw document, as a base model reads it: facts, a worked chain, or a string written twice.

    None of them holds a chat token, a question with its bare answer, or a chain longer than `lengths` says.
    """
    kind = rng.random()
    if kind < 0.2:
        text = "\n".join(solution(one_question(rng, (1.0,))) for _ in range(rng.randint(1, 6)))
    elif kind < 0.9:
        question = one_question(rng, lengths)
        text = f"{question.text[:-1]}{rng.choice(_CONNECTIVES)}\n{solution(question)}"
    else:
        copied = "".join(rng.choices("0123456789+-*", k=rng.randint(2, 16)))
        text = f"{copied}{rng.choice(_CONNECTIVES)}\n{copied}"
    return f"{text}\n{END_OF_TEXT}"


def _lesson(tokenizer: PreTrainedTokenizerBase, *pieces: tuple[str, bool]) -> Lesson:
    """Pieces of text, each trained on or not, tokenised one by one: a response never changes its prompt's tokens."""
    encoded = [(tokenizer.encode(text), trained) for text, trained in pieces if text]
    return Lesson(
        ids=tuple(token for ids, _ in encoded for token in ids),
        trained=tuple(trained for ids, trained in encoded for _ in ids),
    )


def _cut(rng: random.Random, thinking: str) -> str:
    """Thinking that a budget ended: anywhere, in the middle of a line too, or before it began.

    Half of the cuts leave two lines at most undone, which is what can be learned to do in the head.
    """
    lines_at = len(THINK_OPEN)
    earliest = max(lines_at, len(thinking) - 14) if rng.random() < 0.5 else lines_at
    end = rng.randint(earliest - 1, len(thinking))
    return thinking[:end] if end >= lines_at else ""


def _last_question(messages: Sequence[Message]) -> Question:
    text = messages[-1]["content"]
    for flag in reversed(_FLAGS):
        text = text.replace(flag, "")
    return ask(text.strip())
