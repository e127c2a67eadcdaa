"""A thousand configurations that something went wrong with: each is taken, or refused in a sentence with exit code 2.

Shipped recipes are changed as typing, editing and merging go wrong (in the text) and as a mistaken idea of a key goes
wrong (in the tree). A seed decides every change, so that what was found once is found again.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from distill import cli
from distill.errors import UserError
from distill.recipe import parse_yaml, validate
from pipelines.resolution import check_names, comparison_names, recipe_names, recipe_text, resolve_run

NUM = 1000
NAMES = [*recipe_names(), *comparison_names()]

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 0.0, 1e-320, 1e308, -0.5, "nan", "1e999", ".inf"),
    *(
        "",
        " ",
        "~",
        "null",
        "think",
        "no_think",
        "embedded",
        "235B",
        "tiny",
        "4b",
        "a/b",
        "a/b/c",
        "../x",
        "/",
        "/dev/null",
    ),
    *(
        "\x00",
        "\x1b[31m",
        "a\x00b",
        "x" * 5000,
        "\n",
        "name: [",
        "{{ x }}",
        "%s",
        "${HOME}",
        "~nobody/x",
        "\u202e",
        "\ud83d",
    ),
    *("my.jsonl", "none.parquet@math", "http://", "https://h:x", "owner/name@main", "@", ":", "-", "--help", "[bold]"),
    *(
        [],
        {},
        [None],
        [[]],
        {"": None},
        {"kind": None},
        {"kind": "grpo"},
        {"kind": "file", "path": "\x00"},
        [1, "a", {}],
    ),
    *(
        {1: 2},
        {True: False},
        {None: None},
        {"a": {"b": {"c": []}}},
        ["think", "think"],
        ["embedded", {"name": "gsm8k"}],
    ),
)
"""Values that a key was not made for, or just so."""

EVERYTHING = """
extends: opd-then-grpo
name: everything
teacher: {backend: vllm, urls: {generate: ["http://a:1"], score: ["http://b:2"]}, quantization: fp8, server_args: [--x]}
specialists: {maths: {model: 32B}}
student: {lora: {rank: 8, target_modules: [q_proj]}, adamw: 8bit}
prompts: {kind: file, path: own.yaml}
stages:
  grpo: {policy_gradient: {grader: math, dr_grpo: true}, kl_coefficient: 0.1}
  both: {kind: opd_reward, steps: 3}
  off_policy: {filters: {wrong: true, max_repetition: 0.5}}
stop: {grpo: {score: 0.9, flops: 1.0e12}}
evaluation:
  tasks: [gsm8k, mode_switching, {name: math500, samples: 2, pass_at: [1, 2]}, {path: my.jsonl, grader: words}]
  curve: {every: 5, task: gsm8k}
  pass_at: {k: 2, samples: 4}
  budgets: [8, 16]
guards: {length: null, kl: {warn: 0.1, stop: 0.01}}
preflight: {skip: [context], same_weights: true}
tracker: tensorboard
store: a/store
"""
"""A recipe that has most of what a recipe may have."""

KEYS = (
    "kind",
    "name",
    "model",
    "extends",
    "steps",
    "stages",
    "",
    "0",
    "a.b",
    "teacher",
    "think",
    "\x00",
    "x" * 300,
    "No",
)
TEXTS = (
    *(
        "\t",
        "  ",
        "- ",
        ": ",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!!binary |\n  AAAA\n",
        "? ",
        "---\n",
        "...\n",
        "%YAML 9\n",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "#",
        "|\n",
        ">\n",
        "\x00",
        "\x07",
        "\ufeff",
        "\u00e9",
        "<<: *a\n",
        "&a [*a]",
        "1_000",
        "0o7",
    ),
)


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a tree."""
    if above:
        yield above
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from places(value, (*above, key))


def change_tree(tree: dict[str, Any], rng: random.Random) -> None:
    paths = list(places(tree))
    if not paths:
        tree["stages"] = rng.choice(ODD)
        return
    *above, last = rng.choice(paths)
    parent: Any = tree
    for key in above:
        parent = parent[key]
    kind = rng.randrange(12)
    if kind == 0 and isinstance(parent, dict):
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(KEYS)] = parent.pop(last)
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
    elif kind == 3:
        other = tree
        for key in rng.choice(paths):
            other = other[key]
        parent[last] = copy.deepcopy(other)
    elif kind == 4 and isinstance(parent[last], str):
        letters = list(parent[last])
        rng.shuffle(letters)
        parent[last] = "".join(letters)
    else:
        alike = [value for value in ODD if type(value) is type(parent[last])]
        # What is refused by its type alone tests little: mostly a value of the right one is put there.
        parent[last] = copy.deepcopy(rng.choice(alike if alike and rng.random() < 0.8 else ODD))


def change_text(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    at, place = rng.randrange(len(lines)), rng.randrange(len(text))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 2:
        lines[at] = rng.choice(("  ", "\t", " ")) + lines[at]
    elif kind == 3:
        return text[:place] + rng.choice(TEXTS) + text[place:]
    elif kind == 4:
        return text[:place]
    else:
        return text[:place] + text[place + rng.randrange(1, 9) :]
    return "".join(lines)


@cache
def parsed(text: str) -> dict[str, Any]:
    return dict(parse_yaml(text, where="a recipe"))


def configuration(number: int) -> tuple[bytes, list[str]]:
    """A recipe file, and assignments on top of it."""
    rng = random.Random(number)
    text = EVERYTHING if rng.random() < 0.5 else recipe_text(rng.choice(NAMES))
    if rng.random() < 0.75:
        tree = copy.deepcopy(parsed(text))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change_tree(tree, rng)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            text = change_text(text, rng) if text.strip() else text
    # The surrogate of ODD is half a character: yaml escapes it or the file is no UTF-8, and both happen.
    content = text.encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.03:
        content = content[: len(content) // 2] + bytes([rng.randrange(128, 256)]) + content[len(content) // 2 :]
    assignments = []
    while rng.random() < 0.15:
        path = ".".join(map(str, rng.choice(list(places(parsed(recipe_text(rng.choice(NAMES))))))))
        value = rng.choice(ODD)
        assignments.append(f"{path}={value if isinstance(value, str) else yaml.safe_dump(value).strip()}")
    return content, assignments


def test_a_configuration_is_taken_or_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Typer makes the commands anew each time it is called; these are the same ones.
    monkeypatch.setattr(cli, "app", typer.main.get_command(cli.app))
    codes = []
    for number in range(NUM):
        content, assignments = configuration(number)
        Path("own.yaml").write_bytes(content)
        more = [part for text in assignments for part in ("--set", text)]
        command = ["run", "--dry-run", "--recipe", "own.yaml"] if number % 2 else ["config", "validate", "own.yaml"]
        json = ["--json"] if number % 4 < 2 else []
        monkeypatch.setattr(sys, "argv", ["distill", *command, *json, *more])
        try:
            code = cli._exit_code()
        except Exception as error:
            raise AssertionError(f"configuration {number} ({assignments}): {content!r}") from error
        out, err = capfd.readouterr()
        assert code in (0, 2), (number, err)
        if code == 2:
            assert err.startswith("distill: ") and len(err) > len("distill: ..\n"), (number, err)
            assert out == "" or (command[0] == "config" and json), (number, out)
        codes.append(code)
        assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"], number
    # Neither all refused nor all taken: both ways were tried.
    assert NUM / 10 < codes.count(0) < NUM / 2, codes.count(0)


def test_what_is_changed_was_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(EVERYTHING)
    check_names(resolve_run(recipe="own.yaml"))


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a\x00", "x" * 65])
def test_a_stage_is_called_what_a_file_can_be(name: str) -> None:
    with pytest.raises(UserError, match="a stage's name is"):
        validate({"stages": {name: {"kind": "on_policy"}}})


def test_the_same_number_is_the_same_configuration() -> None:
    assert [configuration(number) for number in range(20)] == [configuration(number) for number in range(20)]
