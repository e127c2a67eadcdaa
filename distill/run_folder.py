"""Whether a folder can be a run's, and for this process alone: asked before anything is written into it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.recipe import parse_yaml
from distill.settings import Settings


def check_place(path: Path, *, marker: str) -> None:
    """Raises UserError for a place that is no directory for a run: a file, or one that holds something else than what
    the file ``marker`` stands for."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; name a folder")
        there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"--out {path} cannot be used: {error.strerror}; name another folder") from None
    if there and marker not in there and there != [".lock"]:
        raise UserError(
            f"--out {path} holds something that is no run ({', '.join(there[:3])}, ...); name a new or an empty folder"
        )


def claim(path: Path, *, marker: str) -> Any:
    """The directory, made if need be, for this process alone; an open lock file.

    Raises UserError where it cannot be used (``check_place``), or another process works in it.
    """
    check_place(path, marker=marker)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; name another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another process is working in {path}; wait for it, stop it, or name another --out") from None
    return lock


_WHEREABOUTS = ("teacher.urls.", "teacher.replicas ", "teacher.patience_seconds ", "tracker ", "parallel ")
"""Where the teacher is says nothing about what it says, who watches nothing about what is done, and how many runs of a
comparison go on at a time nothing about what they come to: these may change while a run rests."""


def refuse_other(file: Path, config: Settings) -> None:
    """Raises UserError, naming the differences, where ``file`` holds another configuration."""
    tree = parse_yaml(file.read_text(encoding="utf-8"), where=str(file))
    found = _differences(tree, config.model_dump(mode="json"), "")
    differences = [difference for difference in found if not difference.startswith(_WHEREABOUTS)]
    if differences:
        shown = "; ".join(differences[:5])
        raise UserError(
            f"{file.parent} holds another run: {shown}. Give that run's settings to resume it, or another --out"
        )


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} is {old!r} there and {new!r} here"
