"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """``state`` is ``failed`` where a run would not work, ``warning`` where it works less well or only in part.

    >>> Finding("disk", "warning", "3.1 GiB are free in /data", cure="make room, or name another folder")
    Finding(check='disk', state='warning', text='3.1 GiB are free in /data', cure='make room, or name another folder')

    ``cure`` is there unless the state is ``ok``.
    """

    check: str
    state: Literal["ok", "warning", "failed"]
    text: str
    cure: str | None = None

    def __post_init__(self) -> None:
        assert (self.cure is None) == (self.state == "ok"), "what is not well has a cure"
