"""The shape of every command's document, pinned in data/shapes.yaml, and how a document is held against it.

A shape is a word, a list of one shape, or a block of keys. Words:

    text  number  flag  null  anything
    count           an integer that is not negative
    time            of UTC, to the second
    settings        a run's whole configuration: what distill.config says that it is
    json schema

``text | null`` is either of them; a word that is none of these is itself, as in ``think | no_think``. ``{"?": shape}``
is the shape or null. A key ``name?`` may be missing, ``"*"`` stands for keys of any name, and no other key may be
there: a key that is added to a document is added here, and shown in docs/commands.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from distill.recipe import parse_yaml, validate

FILE = Path(__file__).parent / "data" / "shapes.yaml"

WORDS: dict[str, Callable[[Any], object]] = {
    "text": lambda value: isinstance(value, str),
    "count": lambda value: type(value) is int and value >= 0,
    "number": lambda value: type(value) in (int, float),
    "flag": lambda value: type(value) is bool,
    "null": lambda value: value is None,
    "time": lambda value: re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(value)),
    "anything": lambda value: True,
    "settings": lambda value: validate(value).model_dump(mode="json") == value,
    "json schema": lambda value: jsonschema.Draft202012Validator.check_schema(value) is None,
}

ELIDED = "..."
"""A key of an example that stands for those which are not shown."""


@cache
def shapes() -> dict[str, Any]:
    """By command, without ``distill``."""
    found = parse_yaml(FILE.read_text(encoding="utf-8"), where=FILE.name)
    return {name: shape for name, shape in found.items() if name != "shared"}


def assert_document(name: str, stdout: str) -> Any:
    """Asserts that standard output is one line, and that a JSON document of the shape ``name``; the document."""
    assert stdout.endswith("\n") and stdout.count("\n") == 1, f"not one line: {stdout!r}"
    document = json.loads(stdout, parse_constant=_refuse)
    found = differences(document, shapes()[name], name)
    assert isinstance(document, dict) and not found, "\n".join(found)
    return document


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def differences(value: Any, shape: Any, where: str, *, is_example: bool = False) -> list[str]:
    """Where ``value`` is not of the shape. Of an example keys may be elided."""
    match shape:
        case str():
            is_elided = is_example and isinstance(value, dict) and list(value) == [ELIDED]
            return [] if is_elided or _fits(value, shape) else [f"{where} is {_short(value)}, not {shape}"]
        case {"?": known}:
            return [] if value is None else differences(value, known, where, is_example=is_example)
        case [each] if isinstance(value, list):
            parts = [(one, each, f"{where}[{place}]") for place, one in enumerate(value)]
        case dict() if isinstance(value, dict):
            keys = [key for key in value if not (is_example and key == ELIDED)]
            known = {key.removesuffix("?"): part for key, part in shape.items()}
            needed = () if is_example and ELIDED in value else (key for key in shape if key[-1] not in "?*")
            wrong = [f"{where} has no {key}" for key in needed if key not in keys]
            wrong += [f"{where} has a key {key}" for key in keys if key not in known and "*" not in known]
            if wrong:
                return wrong
            parts = [(value[key], known[key if key in known else "*"], f"{where}.{key}") for key in keys]
        case _:
            return [f"{where} is {_short(value)}, not {'a list' if isinstance(shape, list) else 'an object'}"]
    return [line for part in parts for line in differences(*part, is_example=is_example)]


def _fits(value: Any, shape: str) -> bool:
    return any(WORDS[word](value) if word in WORDS else word == value for word in shape.split(" | "))


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
