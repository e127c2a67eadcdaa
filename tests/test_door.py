"""Every command's door: help that is quick and has examples that are commands, completion, and documents for programs.

The commands' own work is tested where that work is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from distill.cli import app

ROOT = Path(__file__).resolve().parent.parent
HEAVY_MODULES = ("torch", "transformers", "vllm", "datasets", "pandas", "pyarrow", "numpy", "huggingface_hub")
HELP_SECONDS = 0.4


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, one in below.items():
        yield from commands(one, (*path, name))


TREE = typer.main.get_command(app)
COMMANDS = dict(commands(TREE))


def examples(command: Any) -> list[str]:
    lines = [line.strip() for line in (command.help or "").splitlines()]
    # What stands behind two spaces explains; what stands behind > is the shell's.
    return [re.split("  | > ", line)[0] for line in lines if re.match(r"(?:[A-Z_]+=\S+ )?distill ", line)]


def test_help_answers_at_once() -> None:
    """In seconds of the processor, which are those on the clock of a machine that does nothing else."""
    command = [sys.executable, "-m", "distill.cli", "--help"]
    seconds = []
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(used.ru_utime + used.ru_stime)
    assert min(seconds) < HELP_SECONDS


def test_help_of_no_command_imports_anything_heavy() -> None:
    code = f"""
import sys
from distill.cli import app
for path in {[list(path) for path in (*COMMANDS, ())]!r}:
    try:
        app([*path, "--help"])
    except SystemExit as left:
        assert left.code == 0, path
print("heavy:", *(name for name in {HEAVY_MODULES!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_examples_and_they_are_commands(path: tuple[str, ...]) -> None:
    found = examples(COMMANDS[path])
    assert found, f"distill {' '.join(path)} shows no example"
    for line in found:
        words = shlex.split(line[line.index("distill") :])[1:]
        assert tuple(words[: len(path)]) == path, line
        COMMANDS[path].make_context("distill", words[len(path) :])  # raises for an option or argument that is not there


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_a_document_for_programs(path: tuple[str, ...]) -> None:
    assert any("--json" in option.opts for option in COMMANDS[path].params)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("distill con", "config"), ("distill init --recipe qwen3-32b-to-4", "qwen3-32b-to-4b")],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    code = "import sys; sys.argv = ['distill']; from distill.cli import main; main()"
    shell = {"_DISTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | shell, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [expected], done.stderr


def test_completion_can_be_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--install-completion" in done.stdout


def test_a_document_is_all_of_standard_output(tmp_path: Path) -> None:
    """In a real process: what libraries print, and progress, does not get in between."""
    for words in (["init", str(tmp_path / "a.yaml")], ["config", "validate", str(tmp_path / "a.yaml")]):
        command = [sys.executable, "-m", "distill.cli", *words, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert isinstance(json.loads(done.stdout), dict) and done.stdout.count("\n") == 1


DOCS = (ROOT / "docs" / "commands.md").read_text()


def documented(path: tuple[str, ...]) -> str:
    """What docs/commands.md says of a command."""
    found: str = DOCS.partition(f"\n## `distill {' '.join(path)}`\n")[2]
    return found.partition("\n## ")[0]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_is_documented_with_a_command_that_is_one(path: tuple[str, ...]) -> None:
    text = documented(path)
    found = re.search(rf"```\n(distill {' '.join(path)}.*)\n```", text)
    assert found, f"docs/commands.md has no example of distill {' '.join(path)}"
    words = shlex.split(found[1].partition(" > ")[0])[1 + len(path) :]
    COMMANDS[path].make_context("distill", words)
    for shown in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL):
        assert isinstance(json.loads(shown), dict)
