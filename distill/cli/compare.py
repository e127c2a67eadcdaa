"""``distill compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Json


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or the one directory of a comparison.")],
    as_json: Json = False,
) -> None:
    """Compare finished runs on the questions that all of them answered: scores, paired differences, compute.

    Runs that differ in their seed alone are one arm. Where one arm's last stage is on-policy distillation and another's
    is reinforcement learning, and both have learning curves, their compute at equal score is given too.

    Examples:

      distill compare runs/table21 --json

      distill compare runs/mine-seed0 runs/mine-seed1 runs/other-seed0 runs/other-seed1
    """
    from pipelines.comparison import compare_folders

    document = compare_folders(runs)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        from eval.comparison_table import print_comparison

        print_comparison(document)
