"""From what was typed to a configuration: the recipe, the assignments and the flags, laid over each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from distill.comparison import ComparisonConfig
from distill.config import RunConfig
from distill.errors import UserError
from distill.family import EMBEDDED_NAMES, STUDENTS, TEACHERS, short_name
from distill.recipe import assign, load_recipe, merge, parse_assignment, validate, validate_as
from pipelines.probes import refuse_unknown

EMBEDDED_RECIPE = "embedded"
REAL_RECIPE = "qwen3"


def recipe_names() -> list[str]:
    """The shipped recipes: the files, and one for each pair of the family's table."""
    shipped = (entry.name.removesuffix(".yaml") for entry in _recipes().iterdir() if entry.name.endswith(".yaml"))
    return sorted([*shipped, *_pairs()])


def _pairs() -> dict[str, tuple[str, str]]:
    """Teacher and student by the recipe's name, ``qwen3-235b-to-4b``."""
    return {
        f"{REAL_RECIPE}-{short_name(teacher)}-to-{short_name(student)}".lower(): (teacher, student)
        for teacher in TEACHERS
        for student in STUDENTS
    }


def pair_recipe(teacher: str, student: str) -> dict[str, Any]:
    """The recipe for real sizes, with what the family's table says of this pair."""
    micro_batch_tokens, sampler_tokens = STUDENTS[student]
    return merge(
        load_recipe(Path(str(_recipes() / f"{REAL_RECIPE}.yaml"))),
        {
            "teacher": {"model": short_name(teacher), "backend": "vllm", "tensor_parallel": TEACHERS[teacher]},
            "student": {"model": short_name(student), "micro_batch_tokens": micro_batch_tokens},
            "sampler_tokens": sampler_tokens,
        },
    )


def _recipes() -> Any:
    return files("pipelines") / "recipes"


def comparison_names() -> list[str]:
    """The shipped comparisons of several runs; ``--recipe`` takes them like a run's recipe."""
    names = [entry.name for entry in _comparisons().iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names)


def _comparisons() -> Any:
    return files("pipelines") / "comparisons"


def _shipped(name: str) -> dict[str, Any]:
    """A shipped recipe, or one's own file."""
    if name in _pairs():
        return pair_recipe(*_pairs()[name])
    return load_recipe(find_recipe(name))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or of one's own."""
    if name in recipe_names():
        return Path(str(_recipes() / f"{name}.yaml"))
    if name in comparison_names():
        return Path(str(_comparisons() / f"{name}.yaml"))
    if Path(name).is_file():
        return Path(name)
    known = [*recipe_names(), *comparison_names()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise UserError(
        f"--recipe {name!r} is neither a file nor a shipped recipe; did you mean {near[0]}? shipped: {', '.join(known)}"
    )


def load_named(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A shipped recipe or one's own file, not yet validated, laid over the one that its key ``extends`` names."""
    if name in above:
        raise UserError(f"the recipe {name!r} extends itself ({' extends '.join([*above, name])}); name another base")
    tree = _shipped(name)
    base = tree.pop("extends", None)
    return tree if base is None else merge(load_named(str(base), (*above, name)), tree)


def resolve_run(
    *,
    recipe: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    prompts: str | None = None,
    seed: int | None = None,
    assignments: Sequence[str] = (),
) -> RunConfig:
    """The configuration that these choices mean.

    Without a recipe it is the embedded one if all models named are embedded, else the one for real sizes. Flags win
    over ``assignments`` (``a.b=c``), assignments over the recipe. Raises UserError for anything that is wrong.
    """
    named = [name for name in (teacher, student) if name is not None]
    if recipe is None:
        recipe = EMBEDDED_RECIPE if all(name in EMBEDDED_NAMES for name in named) else REAL_RECIPE
    tree = load_named(recipe)
    if tree.get("kind") == "comparison":
        raise UserError(f"the recipe {recipe} is a comparison of several runs; `distill run --recipe {recipe}` runs it")
    flags: dict[str, Any] = {}
    if teacher is not None:
        assign(flags, "teacher.model", _absolute(teacher))
    if student is not None:
        assign(flags, "student.model", _absolute(student))
    if seed is not None:
        assign(flags, "seed", seed)
    if prompts is not None:
        assign(flags, "prompts", _prompt_settings(prompts))
        # One's own questions are examined on themselves, unless an assignment says otherwise.
        assign(tree, "evaluation.tasks", None)
    # The flags lie below the assignments too: prompts.prompt_column is a key of the prompts that --prompts makes.
    tree = merge(_assigned(merge(tree, flags), assignments), flags)
    if isinstance(tree.get("stages"), dict):
        # A stage that is null is one that this recipe leaves out of the one it extends.
        tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    config = validate(tree, where=f"the configuration (recipe {recipe})")
    refuse_unknown(config.preflight.skip)
    if config.name is None:
        parts = (Path(block.model).name for block in (config.teacher, config.student))
        config = config.model_copy(update={"name": "-to-".join(parts)})
    return config


def _assigned(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``tree`` with each ``a.b=c`` laid on top."""
    for text in assignments:
        key, value = parse_assignment(text)
        over: dict[str, Any] = {}
        assign(over, key, value)
        tree = merge(tree, over)
    return tree


def is_comparison(recipe: str | None) -> bool:
    """Whether a recipe is a comparison of several runs."""
    return recipe is not None and load_named(recipe).get("kind") == "comparison"


def resolve_comparison(
    recipe: str, *, quick: bool = False, seed: int | None = None, assignments: Sequence[str] = ()
) -> ComparisonConfig:
    """The comparison that these choices mean: the recipe, with ``quick`` what it says of quick, then ``a.b=c``.

    Raises UserError for anything that is wrong.
    """
    tree = load_named(recipe)
    if quick:
        if not tree.get("quick"):
            raise UserError(f"the recipe {recipe} has no quick variant; add a block quick, or leave --quick out")
        over = dict(tree["quick"])
        # A smaller set of starts takes the place of the recipe's, where other blocks are laid over them.
        starts = over.pop("starts", tree.get("starts"))
        tree = merge(tree, over) | ({} if starts is None else {"starts": starts})
    if seed is not None:
        tree = tree | {"seeds": [seed]}
    return validate_as(ComparisonConfig, _assigned(tree, assignments), where=f"the comparison (recipe {recipe})")


_HUB_SET = re.compile(r"([\w.-]+/[\w.-]+)@([\w.-]+)(?::([\w.-]+))?")


def _prompt_settings(prompts: str) -> dict[str, Any]:
    """What ``--prompts`` means: a file or folder, or a hub set as OWNER/NAME@REVISION (:SPLIT, if it is not train)."""
    found = None if Path(prompts).exists() else _HUB_SET.fullmatch(prompts)
    if found is None:
        return {"kind": "file", "path": str(Path(prompts).absolute())}
    id_, revision, split = found.groups()
    licence = "not looked up: see the set's page"
    one = {"id": id_, "revision": revision, "split": split or "train", "licence": licence, "usual_columns": True}
    return {"kind": "hub", "sets": [one]}


def _absolute(model: str) -> str:
    """A folder's full path, so that the recorded configuration works from anywhere; other names as they are."""
    return str(Path(model).resolve()) if Path(model).is_dir() and model not in EMBEDDED_NAMES else model
