"""``distill init``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Json, Shipped


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    recipe: Shipped = "embedded",
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe, comments and all, to FILE for editing. A file that is there is left as it is.

    Examples:

      distill init

      distill init my.yaml --recipe qwen3-32b-to-4b
    """
    from pipelines.resolution import copy_recipe

    copy_recipe(recipe, file)
    if as_json:
        print(json.dumps({"recipe": recipe, "file": str(file)}))
    else:
        print(f"{file} is a copy of the recipe {recipe}; edit it, then distill run --recipe {file}")
