"""Options and their readers that several commands share."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from distill.errors import UserError

MANY = 1_000_000
"""The most of anything that is counted out one by one: responses, questions, rows."""
PROCESSES = 1000
"""The most processes of one machine, and the most GPUs or servers that a teacher is cut over."""
MACHINES = 1000
LONGEST = 1e9
"""Tokens; more is no length of a text."""
DEAREST = 1e6
"""USD for an hour of one device."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def _models(begun: str) -> list[str]:
    from distill.family import EMBEDDED_NAMES, SHORT_NAMES, SIZES

    return [name for name in (*SIZES, *SHORT_NAMES, *EMBEDDED_NAMES) if name.startswith(begun)]


def _recipe_names(begun: str) -> list[str]:
    from pipelines.resolution import comparison_names, recipe_names

    return [name for name in (*recipe_names(), *comparison_names()) if name.startswith(begun)]


Teacher = Annotated[
    str | None, typer.Option(help="235B, 32B, ..., tiny, a hub id or a folder.", autocompletion=_models)
]
Student = Annotated[
    str | None, typer.Option(help="4B (its base), ..., nano, a hub id or a folder.", autocompletion=_models)
]
Prompts = Annotated[
    str | None, typer.Option(help="JSONL or parquet with a column 'prompt', or a hub set: OWNER/NAME@REVISION.")
]
Seed = Annotated[int | None, typer.Option(help="Another seed is another run.")]
Recipe = Annotated[
    str | None, typer.Option(help="A shipped recipe's name or a YAML file.", autocompletion=_recipe_names)
]
Shipped = Annotated[str, typer.Option(help="The shipped recipe to copy.", autocompletion=_recipe_names)]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key: --set stages.on_policy.steps=100")
]
Store = Annotated[Path | None, typer.Option(help="Folder of the store; default DISTILL_STORE or the user's cache.")]
Hardware = Annotated[Path | None, typer.Option(help="Your own devices, as YAML (docs/plan.md).")]
QueueFolder = Annotated[
    Path | None, typer.Option(help="Folder of the queue; default DISTILL_QUEUE or the user's state.")
]
NodeAddress = Annotated[
    str | None, typer.Option("--node-address", help="Where machine 0 is for the others, as HOST or HOST:PORT.")
]
JobName = Annotated[str | None, typer.Option("--name", help="The job's name; default the file's.")]
JobOut = Annotated[Path | None, typer.Option("--out", help="Folder of its run directories; default runs/<name>.")]


def numbers_of(texts: list[str] | None, option: str) -> tuple[int, ...]:
    """Positive whole numbers, separated by commas or given in turn."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) <= len(str(MANY)) and 1 <= int(part) <= MANY):
            raise UserError(f"{option} {part!r} is no whole number from 1 to {MANY}; write {option} 8,16,24")
    return tuple(sorted({int(part) for part in parts}))


def one_of(value: str, option: str, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise UserError(f"{option} {value!r} is none of {', '.join(known)}")
    return value


M = TypeVar("M", covariant=True)


class OneOfMany(Protocol[M]):
    """Makes what stands for this machine among ``num`` of them; ``port`` has a default of its own."""

    def __call__(self, num: int, rank: int, host: str, port: int = ..., /) -> M: ...


def one_of_many(make: OneOfMany[M], num: int, rank: int, address: str | None) -> M | None:
    """What --nodes, --node-rank and --node-address (HOST or HOST:PORT) mean; None for a machine alone."""
    if num == 1:
        if rank or address:
            raise UserError("--node-rank and --node-address belong to --nodes; say how many machines there are")
        return None
    if address is None:
        raise UserError(f"--nodes {num} needs --node-address, the host name of machine 0 as the others see it")
    host, colon, port = address.rpartition(":")
    if not colon and address:
        return make(num, rank, address)
    if not host:
        raise UserError(f"--node-address {address!r} names no host; write HOST or HOST:PORT")
    if port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535:
        return make(num, rank, host, int(port))
    if _is_ip(address.removeprefix("[").removesuffix("]")):
        return make(num, rank, address)
    raise UserError(f"--node-address {address!r}: {port!r} is no port from 1 to 65535; write HOST or HOST:PORT")


def _is_ip(text: str) -> bool:
    """Whether it is an address as it stands: those of version 6 have colons of their own."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
