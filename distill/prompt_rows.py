"""A row of a data file as a checked prompt: what may stand in it, and the sentence for what may not.

``ROLES`` are the speakers of a conversation, ``FIELDS`` what a row may say besides it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from distill.chat import switch_in
from distill.errors import UserError
from distill.types import MODES, Message, Prompt

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("answer", "mode", "language", "domain")
EXAMPLE = '{"prompt": "What is 3+4?", "answer": "7"}'


def prompt_of(value: Any, fields: Mapping[str, Any]) -> Prompt:
    """The prompt of one row. Raises UserError without the place, which the caller knows."""
    messages = _messages(value)
    mode, switch = fields.get("mode"), switch_in(messages)
    if mode is not None and mode not in MODES:
        raise UserError(f"mode is {mode!r}; it is think, no_think, or left out where the stage may choose")
    if mode is not None and switch is not None and mode != switch:
        raise UserError(f"mode is {mode} and a message says /{switch}; leave one of them out")
    for name in ("language", "domain"):
        found = fields.get(name)
        if found is not None and not (isinstance(found, str) and _is_text(found)):
            raise UserError(f"{name} is {kind_of(found)}; it is a text or left out")
    return Prompt(
        messages=messages,
        answer=_answer(fields.get("answer")),
        mode=switch or mode,
        language=fields.get("language"),
        domain=fields.get("domain"),
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"the prompt is {kind_of(value)}; it is a text or a list of messages")
    if not value:
        raise UserError("the prompt is an empty list; it needs at least one message of the user")
    messages = tuple(_message(number, message) for number, message in enumerate(value, start=1))
    last = messages[-1]["role"]
    if last != "user":
        raise UserError(f"the last message is from {last!r}; the last one must be from the user, who is answered")
    return messages


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"message {number} is {kind_of(message)}; it is an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if not {"role", "content"} <= given.keys():
        raise UserError(f"message {number} has the keys {shown_names(given)}; it needs role and content")
    role, content = given["role"], given["content"]
    if role not in ROLES:
        raise UserError(f"message {number} has the role {role!r}; it is one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"the content of message {number} is {kind_of(content)}; only text is supported")
    if not content.strip():
        raise UserError(f"the text of message {number} is empty; write something or remove the row")
    if not _is_text(content):
        raise UserError(f"the text of message {number} holds half of a surrogate pair, which no encoding can write")
    # What a template does not read (names, scores) is no part of the prompt.
    kept = {"role": role, "content": content}
    thinking = given.get("reasoning_content")
    if thinking is not None and not (isinstance(thinking, str) and _is_text(thinking)):
        raise UserError(f"the reasoning_content of message {number} is {kind_of(thinking)}; it is a text or left out")
    if thinking is not None:
        kept["reasoning_content"] = thinking
    if given.get("tool_calls"):
        raise UserError(f"message {number} calls tools; write the call into its content as text")
    return kept


def _answer(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str) and value.strip() and _is_text(value):
        return value
    shown = "empty" if isinstance(value, str) else kind_of(value)
    raise UserError(f"answer is {shown}; it is a text, a number, or left out where there is none")


def _is_text(text: str) -> bool:
    """Whether every encoding can write it; JSON's escapes can smuggle in half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def shown_names(keys: Iterable[str]) -> str:
    """The first of some names, fit for printing."""
    shown = [key.encode(errors="backslashreplace").decode()[:60] for key in keys]
    return (", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")) or "none"


def no_number(name: str) -> NoReturn:
    """For ``json.loads``: NaN and Infinity are refused."""
    raise ValueError(f"{name} is no JSON number")


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def reason_of(error: Exception) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
