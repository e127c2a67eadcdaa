"""Conversations in which the mode is asked for by flags, and the mode that each turn should be in.

The rule is the report's (section 4.3): the last flag of the user and system messages decides, and without one the
model thinks. Qwen3's template reads no flags; following them is what the model learned, so nothing makes an exception
for a flag that is merely quoted, and `distill.chat.switch_in` reads it as a flag too. A quoted flag only ever stands in
a conversation's last turn, and always against the mode in force: no other turn depends on how it was understood.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill.chat import switch_in
from distill.errors import UserError
from distill.seeding import derive
from distill.types import MODES, Message, Mode

Kind = Literal["plain", "both", "system", "quoted"]
"""What decides a turn's mode: one flag in a user message or none so far, a turn's two flags, a system message's flag,
or a flag in quotation marks."""

KINDS: tuple[Kind, ...] = ("plain", "both", "system", "quoted")
_FLAGS: dict[Mode, str] = {"think": "/think", "no_think": "/no_think"}
_OTHER: dict[Mode, Mode] = {"think": "no_think", "no_think": "think"}
_FIRST_SYSTEM_SHARE, _LATER_SYSTEM_SHARE = 0.5, 0.15
_QUOTED_SHARE = 0.25  # of the conversations
_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Turn:
    """The messages that lead to one response, the mode it should be in, and what decides that."""

    messages: tuple[Message, ...]
    wanted: Mode
    kind: Kind


def dialogues(questions: Sequence[str], *, num: int, num_turns: int, seed: int) -> list[tuple[Turn, ...]]:
    """``num`` conversations over ``questions`` (used again where they run out), a function of the arguments alone.

    Raises UserError for a question that holds a flag of its own.
    """
    for question in questions:
        if switch_in([{"role": "user", "content": question}]) is not None:
            raise UserError(f"the question {question[:80]!r} holds a flag of its own; take it out, the test sets them")
    asked = [questions[place % len(questions)] for place in range(num * num_turns)]
    return [
        _dialogue(asked[number * num_turns : (number + 1) * num_turns], random.Random(derive(seed, "dialogue", number)))
        for number in range(num)
    ]


def _dialogue(questions: Sequence[str], source: random.Random) -> tuple[Turn, ...]:
    wanted: Mode = "think"
    kind: Kind = "plain"
    turns = []
    for number, question in enumerate(questions):
        before: list[Message] = []
        # A system message opens a conversation or, less often, stands between two turns.
        if source.random() < (_FIRST_SYSTEM_SHARE if number == 0 else _LATER_SYSTEM_SHARE):
            asked: Mode | None = source.choice((None, *MODES) if number == 0 else MODES)
            before.append({"role": "system", "content": _SYSTEM + (f" {_FLAGS[asked]}" if asked else "")})
            if asked is not None:
                wanted, kind = asked, "system"
        text = question
        if number == len(questions) - 1 and number > 0 and source.random() < _QUOTED_SHARE:
            wanted, kind = _OTHER[wanted], "quoted"
            text = source.choice(
                (f'{question} (they wrote "{_FLAGS[wanted]}")', f"'{_FLAGS[wanted]}' was said. {question}")
            )
        elif (chance := source.random()) < 0.4:
            wanted, kind = source.choice(MODES), "plain"
            text = source.choice((f"{text} {_FLAGS[wanted]}", f"{_FLAGS[wanted]} {text}", f"{text}\n{_FLAGS[wanted]}"))
        elif chance < 0.55:
            wanted, kind = source.choice(MODES), "both"
            first = _FLAGS[_OTHER[wanted]]
            text = source.choice((f"{first} {text} {_FLAGS[wanted]}", f"{text} {first} {_FLAGS[wanted]}"))
        turns.append(Turn((*before, {"role": "user", "content": text}), wanted, kind))
    return tuple(turns)
