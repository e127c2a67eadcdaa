"""Recipes: a run's configuration as YAML, read strictly, layered and checked.

A run's configuration is a recipe, then ``--set`` assignments and flags on top, then ``RunConfig``'s defaults below.
Everything that is wrong with it is one sentence that names the key, what it got and what would do.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from distill.config import RunConfig
from distill.errors import UserError
from distill.settings import Settings

S = TypeVar("S", bound=Settings)

_VARIABLES = frozenset({"environment", "secrets", "secret_files"})
"""Keys whose blocks are about environment variables: what is written there by mistake may be a secret."""


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where ``no`` is a boolean and ``1e-5`` a string; recipes follow YAML 1.2.

    PyYAML also keeps the last of two equal keys; YAML forbids them, and here they are an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        written = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, times in Counter(written).items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_with(kind: str, convert: Callable[[str], Any]) -> None:
    """Have values of a kind read as YAML 1.2 reads them; PyYAML takes 010 for 8, and what is no value for a crash."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            return convert(text)
        except (ValueError, KeyError):
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark) from None

    _Yaml12Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct)


for _kind, _convert in (("int", int), ("float", float), ("bool", {"true": True, "false": False}.__getitem__)):
    _construct_with(_kind, _convert)
# A date is a text to YAML 1.2, which knows no tag for it.
del _Yaml12Loader.yaml_constructors["tag:yaml.org,2002:timestamp"]


def parse_yaml(text: str, *, where: str) -> Any:
    """The value that a YAML 1.2 text stands for. Raises UserError with the place of a syntax error.

    The text itself is not shown: what the line holds may be a secret.
    """
    try:
        value = yaml.load(text, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_misread(error)}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].splitlines() or [""]
        place = f"line {len(before)}, column {len(before[-1]) + 1}"
        raise UserError(
            f"{where} is not valid YAML: {place}: the character #x{error.character:02x} is not allowed"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from None
    _refuse_cycles(value, where, set(), set())
    return value


_FROM_THE_TEXT = re.compile(r"""(\s*'(?:<[a-z -]+>|.|\\\w{1,9})')|\s*['"].*""", re.DOTALL)
"""What PyYAML quotes: a kind of token or a single character (the group), else a piece of the text that it reads."""


def _misread(error: yaml.MarkedYAMLError) -> str:
    """Where a text is no YAML and why, as in ``line 3, column 5: mapping values are not allowed here``."""
    context, problem = (
        _FROM_THE_TEXT.sub(lambda quoted: quoted[1] or "", words or "") for words in (error.context, error.problem)
    )
    assert error.problem_mark is not None, "PyYAML says of every problem where it is"
    begun = f" ({_place(error.context_mark)})" if context and error.context_mark else ""
    return f"{_place(error.problem_mark)}: {context}{begun}{', ' if context else ''}{problem}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _refuse_cycles(value: Any, where: str, above: set[int], seen: set[int]) -> None:
    """An alias (``*name``) may stand for a block that it is part of; nothing here could follow it."""
    if id(value) in above:
        raise UserError(f"{where} has a block that holds itself; write out what its alias stands for")
    if isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            _refuse_cycles(part, where, above | {id(value)}, seen)


def _short(value: Any) -> str:
    """A value as Python writes it, long ones cut: aliases make huge ones of a few lines.

    Nothing is shown of what a block holds: it may be a secret that somebody wrote where none belongs.
    """
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxlong, shown.maxother = 4, 200, 60, 200
    shown.maxlist = shown.maxtuple = 8
    shown.maxdict = 0
    return shown.repr(value)


def dump_yaml(config: Settings) -> str:
    """The configuration as YAML that ``parse_yaml`` and ``validate`` turn into an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def assign(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries, making the ones that are missing."""
    *parents, last = path.split(".")
    for position, key in enumerate(parents):
        branch = tree.setdefault(key, {})
        if branch is None:
            branch = tree[key] = {}
        if not isinstance(branch, dict):
            raise UserError(f"--set {path}: {'.'.join(parents[: position + 1])} is a value, it has no key below it")
        tree = branch
    tree[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` laid on top; a block whose ``kind`` changes is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in new or new["kind"] == old.get("kind")


def parse_assignment(text: str) -> tuple[str, Any]:
    """``a.b=c`` as path and value (the value is YAML)."""
    path, equals, value = text.partition("=")
    if not equals or not path or not all(path.split(".")):
        raise UserError(f"--set takes a.b=value, got {text!r}; for example --set stages.on_policy.steps=100")
    return path, parse_yaml(value, where=f"the value in --set {path}=")


def load_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as nested dictionaries, not yet validated."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {error}") from None
    tree = parse_yaml(text, where=f"the recipe {path}")
    if not isinstance(tree, dict):
        held = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"the recipe {path} holds {held}, not keys and values; any run's config.yaml is an example")
    return tree


def validate(tree: Mapping[str, Any], *, where: str = "the configuration") -> RunConfig:
    """A checked ``RunConfig``. Raises UserError with one line for each thing that is wrong."""
    return validate_as(RunConfig, tree, where=where)


def validate_as(model: type[S], tree: Mapping[str, Any], *, where: str) -> S:
    """``validate`` for any block of settings."""
    if (place := _nul_in(tree)) is not None:
        raise UserError(
            f"{where} is not valid: {'.'.join(place)} holds a NUL character, which no path and no word of a command "
            "can have; leave it out"
        )
    try:
        return model.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = [_sentence(details, model) for details in error.errors(include_url=False)]
        raise UserError(f"{where} is not valid: " + "; ".join(problems)) from None


def _nul_in(value: Any) -> tuple[str, ...] | None:
    """The keys that lead to a text with a NUL in it: the system takes none, and says so by a ValueError of its own."""
    if isinstance(value, str):
        return () if "\0" in value else None
    held: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        held = value.items()
    elif isinstance(value, list | tuple):
        held = enumerate(value)
    for key, entry in held:
        if (place := _nul_in(entry)) is not None:
            return (str(key), *place)
    return None


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file: that of ``RunConfig``, and what a recipe may say besides."""
    schema = deepcopy(_schema_of(RunConfig))
    extends = {"type": "string", "description": "The recipe that this one is laid over: a shipped one's name, a file."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    stages, prompts = schema["properties"]["stages"], schema["properties"]["prompts"]
    stage = stages["additionalProperties"]
    # What extends another recipe may leave a stage out, or change a key of a block without naming its kind.
    stages["additionalProperties"] = {"anyOf": [*stage["oneOf"], {"type": "null"}]}
    prompts["anyOf"] = prompts.pop("oneOf")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@cache
def _schema_of(model: type[Settings]) -> dict[str, Any]:
    return model.model_json_schema()


def _sentence(details: Any, model: type[Settings]) -> str:
    location: Sequence[str | int] = details["loc"]
    keys, known, kinds = _walk(location, model)
    shown = ".".join(keys)
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}?" if near else "it takes no keys"
        return f"unknown key {shown} ({hint} known here: {', '.join(known)})"
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{shown}: kind must be one of {', '.join(repr(kind) for kind in kinds)}"
    said = f"{shown or 'configuration'}: {details['msg'].removeprefix('Value error, ')}"
    # What is wrong with a block as a whole names the key itself.
    if details["type"] == "value_error" and isinstance(details["input"], Mapping):
        return said
    if _VARIABLES.intersection(location):
        return said
    return f"{said} (got {_short(details['input'])})"


def _walk(location: Sequence[str | int], model: type[Settings]) -> tuple[list[str], list[str], list[str]]:
    """The keys of ``location`` without pydantic's union tags, the keys that the block around its end knows, and the
    kinds to choose from at its end."""
    schema = _schema_of(model)
    definitions = schema.get("$defs", {})
    node: Any = schema
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        node = _dereference(node, definitions)
        tags = node.get("discriminator", {}).get("mapping", {})
        if part in tags or part in definitions:
            node = {"$ref": tags.get(part, f"#/$defs/{part}")}
            continue
        keys.append(str(part))
        known = list(node.get("properties", {}))
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items") or {}
        # A block that takes any keys says so by a bare true.
        node = node if isinstance(node, dict) else {}
    return keys, known, list(node.get("discriminator", {}).get("mapping", {}))


def _dereference(node: Any, definitions: Any) -> Any:
    if "anyOf" in node:
        node = next(option for option in node["anyOf"] if option.get("type") != "null")
    return definitions[node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node
