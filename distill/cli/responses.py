"""``distill responses``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from distill.cli.options import MANY, Json, Store

app = typer.Typer(help="The store of teachers' responses.", no_args_is_help=True)

Collection = Annotated[str, typer.Option(help="Only collections with this in their folder's name.")]


@app.command("ls")
def responses_list(store: Store = None, collection: Collection = "", as_json: Json = False) -> None:
    """List the collections: whose responses they hold, how they were drawn, how many and how large.

    Example:

      distill responses ls --store runs/store
    """
    from pipelines.listing import print_collections
    from teachers.inspection import list_collections, root_to_look_into

    root = root_to_look_into(store)
    found = list_collections(root, collection)
    if as_json:
        print(json.dumps({"store": str(root), "collections": found}, allow_nan=False))
    else:
        print_collections(str(root), found)


@app.command("show")
def responses_show(
    key: Annotated[str | None, typer.Argument(help="The first letters of a response's key.")] = None,
    num: Annotated[int, typer.Option("--first", min=1, max=MANY, help="Without a key: how many are shown.")] = 3,
    store: Store = None,
    collection: Collection = "",
    as_json: Json = False,
) -> None:
    """Show responses: what was asked and said, forced tokens marked.

    Examples:

      distill responses show 5c48c5

      distill responses show --first 10 --collection tiny --json
    """
    from pipelines.listing import print_responses
    from teachers.inspection import root_to_look_into, show_responses

    root = root_to_look_into(store)
    found = show_responses(root, key=key, num=num, name=collection)
    if as_json:
        print(json.dumps({"store": str(root), "responses": found}, allow_nan=False))
    else:
        print_responses(found)


@app.command("stats")
def responses_stats(store: Store = None, collection: Collection = "", as_json: Json = False) -> None:
    """Statistics of each collection by mode: lengths, truncation, closed thinking, repetition.

    Example:

      distill responses stats --collection tiny
    """
    from pipelines.listing import print_statistics
    from teachers.inspection import root_to_look_into, statistics

    root = root_to_look_into(store)
    found = statistics(root, collection)
    if as_json:
        print(json.dumps({"store": str(root), "collections": found}, allow_nan=False))
    else:
        print_statistics(found)
