"""Words of a shell command, quoted: what a user wrote is never read by a shell, what this project wrote is.

>>> line(["echo", "it's $5", Read('"$HOME"')])
'echo \\'it\\'"\\'"\\'s $5\\' "$HOME"'
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby

from distill.clusters import LaunchSettings


class Read(str):
    """Text that the shell is to read as it is."""

    __slots__ = ()


def line(words: Sequence[str]) -> str:
    """One command."""
    return " ".join(word if isinstance(word, Read) else shlex.quote(word) for word in words)


def joined(*parts: str) -> Read:
    """One word of several parts."""
    runs = [(is_read, "".join(run)) for is_read, run in groupby(parts, lambda part: isinstance(part, Read))]
    return Read("".join(text if is_read else shlex.quote(text) for is_read, text in runs))


def written(file: Read, text: str) -> str:
    """Commands that write ``text`` to the file."""
    assert text.endswith("\n")
    end = "END_OF_RECIPE"
    while end in text.splitlines():
        end += "_"
    return f"cat > {file} <<'{end}'\n{text}{end}"


def exports(environment: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def opening(settings: LaunchSettings, run: Read) -> list[str]:
    """What comes before any command: the folder, the environment, the user's own lines, and where the run goes.

    A line that fails ends the script. The user's lines are the only ones of his that a shell reads.
    """
    assert settings.out is not None
    return [
        "set -e",
        *([] if settings.workdir is None else [line(["cd", settings.workdir])]),
        *exports(settings.environment),
        *settings.setup,
        line(["mkdir", "-p", settings.out]),
        f"run={run}",
        "set +e",
    ]
