"""``distill export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Json
from distill.errors import UserError


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Merge adapters into their base instead of exporting them alone.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it too; a repository that is made is private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is public.")] = False,
    as_json: Json = False,
) -> None:
    """Write RUN's student to a folder that transformers and vLLM load, with a model card.

    Examples:

      distill export runs/tiny-to-nano --to exports/nano

      distill export runs/lora --to exports/4b --merge-lora --json

      distill export runs/mine --to exports/4b --push-to-hub owner/my-4b
    """
    from pipelines.export import check_hub_name, export_run, push

    if push_to_hub is not None:
        check_hub_name(push_to_hub)
    elif public:
        raise UserError("--public belongs to --push-to-hub OWNER/NAME")
    document = export_run(run, to, merge_lora=merge_lora, hub_name=push_to_hub)
    url = None if push_to_hub is None else push(to, push_to_hub, public=public)
    if as_json:
        print(json.dumps({**document, "url": url}))
    else:
        print(url or to)
