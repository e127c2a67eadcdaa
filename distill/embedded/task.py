"""The embedded models' subject: chains of arithmetic modulo 10, evaluated from left to right.

`3+4*2-7=` is ((3+4)*2-7) mod 10 = 7: every operator binds what stands to its left, `*` no tighter than `+`. Thinking
writes one line an operation, so a chain of n operations is n easy steps with thinking and one hard step without.
Train and test questions are disjoint by construction: the hash of a question's text decides its split.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from distill import interrupt
from distill.chat import split_thinking
from distill.errors import UserError

Split = Literal["train", "test"]

MAX_OPERATIONS: Final = 8
OPERATORS: Final = "+-*"
_TEST_SHARE: Final = 4  # one question in four is a test question


@dataclass(frozen=True, slots=True)
class Question:
    """A chain and its value.

    >>> ask("3+4*2-7=")
    Question(text='3+4*2-7=', answer='7', num_operations=3)
    """

    text: str
    answer: str
    num_operations: int


def lengths_up_to(max_operations: int) -> tuple[float, ...]:
    """The difficulty dial: weights of chains of 1, 2, .., `max_operations` operations, normalised by their user.

    Half of the weight is on chains of one to three, so that a model that never thinks has something to answer.
    """
    if not 1 <= max_operations <= MAX_OPERATIONS:
        raise UserError(f"a chain has 1 to {MAX_OPERATIONS} operations, got {max_operations}: choose within")
    return (0.12, 0.25, 0.15, *[0.48 / (MAX_OPERATIONS - 3)] * (MAX_OPERATIONS - 3))[:max_operations]


DEFAULT_LENGTHS: Final = lengths_up_to(MAX_OPERATIONS)


def ask(text: str) -> Question:
    """The question that a chain's text asks. Raises `UserError` if the text is not a chain such as `3+4*2=`."""
    digits, operators, end = text[:-1:2], text[1:-1:2], text[-1:]
    is_chain = digits.isdecimal() and digits.isascii() and end == "=" and len(digits) == len(operators) + 1
    if not (is_chain and operators and set(operators) <= set(OPERATORS)):
        raise UserError(f"{text!r} is not a chain of operations on digits: write it like '3+4*2='")
    answer = _lines(text)[-1][-1]
    return Question(text=text, answer=answer, num_operations=len(operators))


def solution(question: Question) -> str:
    """The thinking that solves a question, one line an operation, no line break at the end.

    >>> solution(ask("3+4*2-7="))
    '3+4=7\\n7*2=4\\n4-7=7'
    """
    return "\n".join(_lines(question.text))


def grade(response_text: str, answer: str) -> bool:
    """Whether a response answers exactly `answer`: what stands after `</think>`, and never inside open thinking."""
    parts = split_thinking(response_text)
    return parts.closed and parts.answer == answer


def split_of(text: str) -> Split:
    """The split of a question's text, a function of the text alone."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % _TEST_SHARE == 0 else "train"


def questions(
    seed: int, num: int, *, lengths: Sequence[float] = DEFAULT_LENGTHS, split: Split = "train"
) -> list[Question]:
    """`num` questions, a function of the arguments alone.

    `lengths[n-1]` is the weight of chains of n operations. Train questions are drawn independently. Test questions
    never repeat: where those of one length run out (75 or so chains of one operation), the next longer length takes
    over. Raises `UserError` for weights that are no distribution over 1 to 8 operations, or too few test questions.
    """
    if not 1 <= len(lengths) <= MAX_OPERATIONS or min(lengths) < 0 or sum(lengths) <= 0:
        raise UserError(f"lengths are 1 to {MAX_OPERATIONS} weights of at least 0, not all 0; got {list(lengths)}")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    drawn: list[Question] = []
    for num_operations in rng.choices(range(1, len(lengths) + 1), weights=lengths, k=num):
        interrupt.check()
        question = _draw(rng, num_operations, split, seen)
        drawn.append(question)
        if split == "test":
            seen.add(question.text)
    return drawn


def _draw(rng: random.Random, num_operations: int, split: Split, seen: set[str]) -> Question:
    for longer in range(num_operations, MAX_OPERATIONS + 1):
        # A length is used up when this many tries find nothing new: the smallest has 300 chains in all.
        for _ in range(2_000):
            digits = rng.choices("0123456789", k=longer + 1)
            operators = rng.choices(OPERATORS, k=longer)
            text = digits[0] + "".join(map("".join, zip(operators, digits[1:], strict=True))) + "="
            if split_of(text) == split and text not in seen:
                return ask(text)
    raise UserError("there are not that many different test questions: ask for fewer")


def _lines(text: str) -> list[str]:
    value = text[0]
    lines = []
    for operator, digit in zip(text[1:-1:2], text[2:-1:2], strict=True):
        left, right = int(value), int(digit)
        result = {"+": left + right, "-": left - right, "*": left * right}[operator] % 10
        lines.append(f"{value}{operator}{digit}={result}")
        value = str(result)
    return lines
