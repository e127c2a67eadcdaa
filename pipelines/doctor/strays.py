"""vLLM processes of this user that nobody looks after any more: whoever started them is gone.

A process whose parent has ended is handed to another one, process 1 or a service manager. That one is in another
session than the orphan, which is how it is told from the parent that started it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.doctor.finding import Finding

_PART = "VLLM::"
"""How vLLM renames its engines and workers, which never live without a server or a script that started them."""
_SERVERS = ("vllm.entrypoints.", "vllm serve")


_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc says of one; ``command`` is its words joined by spaces."""

    pid: int
    parent: int
    group: int
    session: int
    user: int
    command: str

    @property
    def is_part(self) -> bool:
        return self.command.startswith(_PART)

    @property
    def is_vllm(self) -> bool:
        return self.is_part or any(word in self.command for word in _SERVERS)


def find_strays(proc: Path = _PROC) -> Sequence[Finding]:
    return [*strays_among(list(processes(proc)), os.getuid())] or [Finding("stray vLLM", "ok", "none")]


def strays_among(there: Sequence[Process], user: int) -> Iterator[Finding]:
    """A finding for each orphan: a part of an engine holds memory for nobody, a server may be meant to run alone."""
    for process in there:
        if process.user == user and process.is_vllm and is_orphan(process, there):
            text = f"process {process.pid} runs without the one that started it: {process.command[:100]}"
            state = "failed" if process.is_part else "warning"
            cure = _ended(process, there) + ("" if process.is_part else ", unless it is meant to run on its own")
            yield Finding("stray vLLM", state, text, cure=cure)  # type: ignore[arg-type]


def is_orphan(process: Process, there: Iterable[Process]) -> bool:
    if process.parent == 1:
        return True
    parent = next((one for one in there if one.pid == process.parent), None)
    # The first process of a session has a parent outside of it by nature.
    return parent is not None and process.session not in (process.pid, parent.session)


def _ended(process: Process, there: Iterable[Process]) -> str:
    """The command that ends it, with its whole group where that is vLLM's alone."""
    group = [one for one in there if one.group == process.group]
    return f"kill -- -{process.group}" if all(one.is_vllm for one in group) else f"kill {process.pid}"


def processes(proc: Path = _PROC) -> Iterator[Process]:
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            # The name before the last parenthesis may hold spaces and parentheses itself.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            user = folder.stat().st_uid
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is hidden
        if fields[0] != "Z":
            parent, group, session = map(int, fields[1:4])
            yield Process(int(folder.name), parent, group, session, user, " ".join(words).strip())
