"""Options and their readers that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Store = Annotated[Path | None, typer.Option(help="Folder of the store; default DISTILL_STORE or the user's cache.")]


def numbers_of(texts: list[str] | None, option: str) -> tuple[int, ...]:
    """Positive whole numbers, separated by commas or given in turn."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) > 0):
            raise UserError(f"{option} {part!r} is no whole number from 1 on; write {option} 8,16,24")
    return tuple(sorted({int(part) for part in parts}))


def one_of(value: str, option: str, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise UserError(f"{option} {value!r} is none of {', '.join(known)}")
    return value
