"""From what was typed to a configuration: the recipe, the assignments and the flags, laid over each other."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from distill.adapters import check_adapters
from distill.comparison import ComparisonConfig
from distill.config import RunConfig
from distill.errors import UserError
from distill.family import EMBEDDED_NAMES, STUDENTS, TEACHERS, resolve, shape_of, short_name
from distill.jobs import BLOCKS, split_job
from distill.prompt_files import prompt_files
from distill.recipe import assign, load_recipe, merge, parse_assignment, parse_yaml, validate, validate_as
from distill.stage_config import GrpoStage, OpdRewardStage
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
    name = f"{REAL_RECIPE}, {teacher} to {student}"
    return dict(parse_yaml(_pair_text(teacher, student), where=f"the recipe {name}"))


_MODELS = "teacher:\n  model: 235B\nstudent:\n  model: 4B\n"
"""Where the recipe for real sizes names its models."""


def _pair_text(teacher: str, student: str) -> str:
    micro_batch_tokens, sampler_tokens = STUDENTS[student]
    text = _text(REAL_RECIPE)
    assert _MODELS in text, f"{REAL_RECIPE}.yaml does not name its models as {_MODELS!r}"
    of_pair = f"""teacher:
  model: {short_name(teacher)}
  backend: vllm
  tensor_parallel: {TEACHERS[teacher]} # 80 GB GPUs that the weights and the cache are cut over
student:
  model: {short_name(student)}
  micro_batch_tokens: {micro_batch_tokens} # leaves room for the rest on such a GPU
sampler_tokens: {sampler_tokens} # likewise
"""
    return text.replace(_MODELS, of_pair)


def recipe_text(name: str) -> str:
    """A shipped recipe as it is written, comments and all."""
    return _pair_text(*_pairs()[name]) if name in _pairs() else _text(name)


def _text(name: str) -> str:
    folder = _comparisons() if name in comparison_names() else _recipes()
    return str((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def _recipes() -> Any:
    return files("pipelines") / "recipes"


def comparison_names() -> list[str]:
    """The shipped comparisons of several runs; ``--recipe`` takes them like a run's recipe."""
    names = [entry.name for entry in _comparisons().iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names)


def _comparisons() -> Any:
    return files("pipelines") / "comparisons"


def recipe_tree(name: str) -> dict[str, Any]:
    """A shipped recipe, or one's own file, as it is written."""
    if name in _pairs():
        return pair_recipe(*_pairs()[name])
    return load_recipe(find_recipe(name))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or of one's own."""
    if name in recipe_names():
        return Path(str(_recipes() / f"{name}.yaml"))
    if name in comparison_names():
        return Path(str(_comparisons() / f"{name}.yaml"))
    # os.path: what is too long for a file's name is none, and no error.
    if os.path.isfile(name):
        return Path(name)
    known = [*recipe_names(), *comparison_names()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise UserError(
        f"--recipe {name!r} is neither a file nor a shipped recipe; did you mean {near[0]}? shipped: {', '.join(known)}"
    )


def copy_recipe(name: str, to: Path) -> None:
    """Write the shipped recipe ``name``, comments and all, to the new file ``to``.

    Raises UserError for a name that no recipe has, and for a file that is there or cannot be written.
    """
    known = [*recipe_names(), *comparison_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"--recipe {name!r} is no shipped recipe; did you mean {near[0]}? shipped: {', '.join(known)}")
    head = (
        f"# A copy of the recipe {name}: distill run --recipe {shlex.quote(str(to))}\n"
        f"# Every key there is, with its meaning: distill config show --recipe {shlex.quote(str(to))} --docs\n"
    )
    if to.exists():
        raise UserError(f"{to} is there already, and is left as it is; name another file, or remove it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("x", encoding="utf-8") as file:
            file.write(head + recipe_text(name))
    except OSError as error:
        raise UserError(f"{to} cannot be written: {error.strerror}; name another file") from None


def load_named(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A shipped recipe or one's own file, not yet validated, laid over the one that its key ``extends`` names."""
    if name in above:
        raise UserError(f"the recipe {name!r} extends itself ({' extends '.join([*above, name])}); name another base")
    job = split_job(recipe_tree(name), where=f"the recipe {name}")
    if job.sweep is not None:
        raise UserError(
            f"the recipe {name} is a sweep of {len(job.sweep.runs)} runs, not one; distill queue add {name} runs them"
        )
    # When a run is to start says nothing about the run.
    return _extended(job.recipe, (*above, name))


def _extended(tree: Mapping[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    base = tree.get("extends")
    own = {key: value for key, value in tree.items() if key != "extends"}
    return own if base is None else merge(load_named(str(base), above), own)


def _names_tasks(name: str) -> bool:
    """Whether one's own recipe says what to examine on, itself or by one's own that it extends; shipped ones suit the
    prompts that they come with. ``load_named`` has read it: what it extends is there, and not itself."""
    if name in recipe_names():
        return False
    tree = recipe_tree(name)
    evaluation, base = tree.get("evaluation"), tree.get("extends")
    return (isinstance(evaluation, Mapping) and "tasks" in evaluation) or (base is not None and _names_tasks(str(base)))


def resolve_recipe(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    """The configuration that a recipe's keys and values mean. Raises UserError for anything that is wrong."""
    whole = _extended(tree, ())
    if whole.get("kind") == "comparison":
        raise UserError(f"{where} is a comparison of several runs, which distill run makes; name a recipe of one")
    return _checked(whole, where)


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
    _refuse_blocks(assignments)
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
        # One's own questions are examined on themselves, unless an assignment or one's own recipe says otherwise.
        if not _names_tasks(recipe):
            assign(tree, "evaluation.tasks", None)
    # The flags lie below the assignments too: prompts.prompt_column is a key of the prompts that --prompts makes.
    tree = merge(assigned(merge(tree, flags), assignments), flags)
    return _checked(tree, f"the configuration (recipe {recipe})")


def _checked(tree: dict[str, Any], where: str) -> RunConfig:
    if isinstance(tree.get("stages"), dict):
        # A stage that is null is one that this recipe leaves out of the one it extends.
        tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    config = validate(tree, where=where)
    refuse_unknown(config.preflight.skip)
    if config.name is None:
        parts = (Path(block.model).name for block in (config.teacher, config.student))
        config = config.model_copy(update={"name": "-to-".join(parts)})
    return config


def assigned(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``tree`` with each ``a.b=c`` laid on top."""
    for text in assignments:
        key, value = parse_assignment(text)
        over: dict[str, Any] = {}
        assign(over, key, value)
        tree = merge(tree, over)
    return tree


_READERS = {"schedule": "schedule add", "sweep": "queue add", "launch": "launch"}
"""Which command reads each of a job file's blocks."""


def is_of_job(assignment: str) -> bool:
    """Whether ``a.b=c`` sets something in one of a job file's blocks, which no run has."""
    return parse_assignment(assignment)[0].partition(".")[0] in BLOCKS


def _refuse_blocks(assignments: Sequence[str]) -> None:
    for text in filter(is_of_job, assignments):
        block = text.partition("=")[0].partition(".")[0]
        raise UserError(
            f"--set {text}: {block} is a block of a job file and says nothing about a run; leave it out here. `distill "
            f"{_READERS[block]}` reads it, and `distill config validate` checks it"
        )


def is_comparison(recipe: str | None) -> bool:
    """Whether a recipe is a comparison of several runs."""
    return recipe is not None and load_named(recipe).get("kind") == "comparison"


def resolve_comparison(
    recipe: str, *, quick: bool = False, seed: int | None = None, assignments: Sequence[str] = ()
) -> ComparisonConfig:
    """The comparison that these choices mean: the recipe, with ``quick`` what it says of quick, then ``a.b=c``.

    Raises UserError for anything that is wrong.
    """
    _refuse_blocks(assignments)
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
    return validate_as(ComparisonConfig, assigned(tree, assignments), where=f"the comparison (recipe {recipe})")


def check_names(config: RunConfig, *, has_student: bool = True, is_here: bool = True) -> None:
    """Raises UserError for a model's, task's or grader's name that nobody knows, for tasks that cannot be examined as
    they are set or not be told apart, for prompts that are not there, and for adapters that cannot be laid over a
    student of a known size.

    Without ``has_student`` the student is still to be made. Where the run is elsewhere, not ``is_here``, so are its
    prompts and the models that are full paths. Nothing is opened, and nothing is asked of the hub.
    """
    from eval.graders import GRADERS
    from eval.runner import refuse_namesakes
    from eval.switching import TASK as MODE_SWITCHING
    from eval.tasks import called, check_samples, check_task

    if has_student and (is_here or not os.path.isabs(config.student.model)):
        resolve(config.student.model, role="student", revision=config.student.revision)
        check_adapters(config.student, shape_of(config.student.model))
    for teacher in (config.teacher, *config.specialists.values()):
        if is_here or not os.path.isabs(teacher.model):
            resolve(teacher.model, role="teacher", revision=teacher.revision)
    if is_here and config.prompts.kind == "file":
        prompt_files(Path(os.path.expanduser(config.prompts.path)))
    curve = config.evaluation.curve
    if curve and curve.task and curve.task != MODE_SWITCHING:
        check_task(curve.task)
    examined = [check_task(task) for task in config.evaluation.tasks or () if task != MODE_SWITCHING]
    for settings in examined:
        check_samples(settings, config.evaluation.samples)
    refuse_namesakes(map(called, examined))
    for name, stage in config.stages.items():
        grader = stage.policy_gradient.grader if isinstance(stage, GrpoStage | OpdRewardStage) else None
        if grader is not None and grader not in GRADERS:
            raise UserError(
                f"stages.{name}.policy_gradient.grader: no grader is called {grader!r}; the graders are "
                f"{', '.join(GRADERS)}"
            )


_HUB_SET = re.compile(r"([\w.-]+/[\w.-]+)@([\w.-]+)(?::([\w.-]+))?")


def _prompt_settings(prompts: str) -> dict[str, Any]:
    """What ``--prompts`` means: a file or folder, or a hub set as OWNER/NAME@REVISION (:SPLIT, if it is not train)."""
    found = None if os.path.exists(prompts) else _HUB_SET.fullmatch(prompts)
    if found is None:
        return {"kind": "file", "path": str(Path(prompts).absolute())}
    id_, revision, split = found.groups()
    licence = "not looked up: see the set's page"
    one = {"id": id_, "revision": revision, "split": split or "train", "licence": licence, "usual_columns": True}
    return {"kind": "hub", "sets": [one]}


def _absolute(model: str) -> str:
    """A folder's full path, so that the recorded configuration works from anywhere; other names as they are."""
    return str(Path(model).resolve()) if os.path.isdir(model) and model not in EMBEDDED_NAMES else model
