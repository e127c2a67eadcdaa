"""``distill config``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import Assignments, Json, Prompts, Recipe, Seed, Student, Teacher
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.settings import Settings

app = typer.Typer(help="A run's configuration, without running it.", no_args_is_help=True)


@app.command("show")
def config_show(
    recipe: Recipe = None,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    seed: Seed = None,
    assignments: Assignments = None,
    docs: Annotated[bool, typer.Option("--docs", help="With every key's documentation above it.")] = False,
    as_json: Json = False,
) -> None:
    """Print the configuration that these choices mean, every default included; it is itself a recipe.

    Examples:

      distill config show --recipe qwen3-235b-to-4b

      distill config show --recipe my.yaml --docs

      distill config show --set stages.on_policy.steps=100 --json
    """
    from distill.documented import documented_yaml
    from distill.recipe import dump_yaml
    from pipelines.resolution import is_comparison, resolve_comparison, resolve_run

    config: Settings
    if recipe is not None and is_comparison(recipe):
        if teacher or student or prompts:
            raise UserError(f"the recipe {recipe} compares several runs; say it for all with --set common.KEY=VALUE")
        config = resolve_comparison(recipe, seed=seed, assignments=assignments or ())
    else:
        config = resolve_run(
            recipe=recipe, teacher=teacher, student=student, prompts=prompts, seed=seed, assignments=assignments or ()
        )
    if as_json:
        print(json.dumps(config.model_dump(mode="json")))
    else:
        print(documented_yaml(config) if docs else dump_yaml(config), end="")


@app.command("validate")
def config_validate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe's name.")],
    assignments: Assignments = None,
    as_json: Json = False,
) -> None:
    """Say whether a recipe or a job file is right: its keys, its values, and the names in it.

    A job file's blocks schedule, sweep and launch too. Nothing is opened. Exit code 0, or 2 with what is wrong.

    Examples:

      distill config validate my.yaml

      distill config validate my.yaml --set student.model=0.6B --json

      distill config validate nightly.yaml --set launch.gpus=8xH100
    """
    from pipelines.validation import check_recipe

    try:
        found = check_recipe(recipe, assignments or ())
    except UserError as error:
        if as_json:
            print(json.dumps({"recipe": recipe, "valid": False, "problem": str(error)}))
        raise
    if as_json:
        print(json.dumps({"recipe": recipe, "valid": True, "problem": None}))
    else:
        print(f"{recipe} is valid: {found}")


@app.command("schema")
def config_schema(as_json: Json = False) -> None:
    """Print the JSON Schema of a recipe, for editors; with --json on one line.

    Example:

      distill config schema > recipe.schema.json
    """
    from distill.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=None if as_json else 1))
