"""A configuration as YAML in which every key has its documentation above it.

The text comes from the strings under the fields of ``distill.config``; what is written is a recipe like any other.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from distill.settings import Settings

_WIDTH = 110
_INDENT = "  "


def documented_yaml(config: Settings) -> str:
    """``config`` as commented YAML, equal to it when it is read back."""
    return "\n".join(_block(config)) + "\n"


def _block(settings: Settings) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        text = " ".join((field.description or "").split())
        yield from textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        yield from _entry(name, getattr(settings, name))


def _entry(name: str, value: Any) -> Iterator[str]:
    key = yaml.safe_dump(name, allow_unicode=True).split("\n")[0]
    if isinstance(value, Settings):
        yield f"{key}:"
        yield from _indented(_block(value))
    elif isinstance(value, dict) and any(isinstance(one, Settings) for one in value.values()):
        yield f"{key}:"
        for inner, one in value.items():
            yield from _indented(_entry(inner, one))
    elif isinstance(value, tuple) and any(isinstance(one, Settings) for one in value):
        yield f"{key}:"
        for one in value:
            lines = list(_block(one)) if isinstance(one, Settings) else _plain(one)
            yield "-"
            yield from _indented(iter(lines))
    else:
        yield from yaml.safe_dump({name: to_jsonable_python(value)}, allow_unicode=True).splitlines()


def _plain(value: Any) -> list[str]:
    return [line for line in yaml.safe_dump(value, allow_unicode=True).splitlines() if line != "..."]


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (_INDENT + line for line in lines)
