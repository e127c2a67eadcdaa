"""``distill report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Json


def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or a comparison's.")],
    as_json: Json = False,
) -> None:
    """Write RUN/report.html again from the files of a run or a comparison.

    Example:

      distill report runs/tiny-to-nano
    """
    from eval.report import write_report

    path = write_report(run)
    print(json.dumps({"report": str(path)}) if as_json else path)
