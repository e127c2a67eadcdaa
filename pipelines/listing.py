"""The response store on a terminal: what ``teachers.inspection`` found, as tables and text for 80 columns and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Document = Mapping[str, Any]

FORCED = ("[forced: ", "]")
"""What stands around forced tokens."""


def print_collections(root: str, collections: Sequence[Document]) -> None:
    """A row a collection, with the part of the sampling that is not the default."""
    console = output()
    if not collections:
        console.print(f"{root} holds no responses")
        return
    table = table_of("collection", "teacher", "responses", "tokens", "MiB", "shards", left=2)
    for found in collections:
        table.add_row(
            found["collection"],
            found["teacher"],
            f"{found['num_responses']:,}",
            f"{found['num_tokens']:,}",
            f"{found['num_bytes'] / 2**20:,.1f}",
            f"{found['num_shards']}",
        )
    console.print(table)
    for found in collections:
        console.print(f"{found['collection']}: revision {found['revision'][:12]}, {_sampling(found['sampling'])}")
        _print_broken(console, found)


def print_responses(responses: Sequence[Document]) -> None:
    """One response after the other: what was asked, what was said, forced tokens marked."""
    console = output()
    for number, found in enumerate(responses):
        if number:
            console.rule(style="dim")
        console.print(
            f"{found['key']}\n{found['teacher']}, {found['mode']} ({found['switch']} switch), "
            f"{found['num_tokens']} tokens ({found['num_forced']} forced), ended by {found['finish_reason']}, "
            f"{found['repetition']:.0%} repeated, mean log-probability {found['mean_logprob']:.3f}\n"
            f"from {found['collection']}, run {found['run'] or 'none'}, {found['created']}"
        )
        for message in found["messages"]:
            console.print(f"\n{message['role']}: {message['content']}")
        console.print(f"\nresponse: {_text(found)}\n")


def _text(found: Document) -> str:
    if found["pieces"] is None:
        return f"{found['response_ids']}\n({found['no_text']})"
    return "".join(piece["text"].join(FORCED) if piece["forced"] else str(piece["text"]) for piece in found["pieces"])


def print_statistics(collections: Sequence[Document]) -> None:
    """A row a collection and mode."""
    console = output()
    for found in collections:
        table = table_of("mode", "said", "prompts", "p50", "p90", "max", "cut", "closed", "forced", "repeats")
        for mode, figures in found["modes"].items():
            length, closure = figures["length"], figures["closure"]
            table.add_row(
                mode,
                f"{figures['num_responses']:,}",
                f"{figures['num_prompts']:,}",
                *(f"{length[name]:,.0f}" for name in ("p50", "p90", "max")),
                f"{figures['truncation']:.0%}",
                "-" if closure is None else f"{closure:.0%}",
                f"{figures['forced']:.0%}",
                f"{figures['repetition']['p90']:.2f}",
            )
        console.print(f"{found['collection']}: {_sampling(found['sampling'])}")
        console.print(table)
        if found["no_closure"]:
            console.print(f"closed is not known: {found['no_closure']}")
        _print_broken(console, found)
    console.print("p50, p90, max: tokens; repeats: 90th percentile of the share of repeated 4-grams in a response")


def _print_broken(console: Console, found: Document) -> None:
    if found["broken_shards"]:
        names = ", ".join(found["broken_shards"])
        console.print(f"  damaged, what is whole of them is saved, the rest generated again: {names}")


def _sampling(sampling: Document) -> str:
    return ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None)


def table_of(*columns: str, left: int = 1) -> Table:
    """An empty table; all but the first ``left`` columns hold numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place, name in enumerate(columns):
        table.add_column(name, no_wrap=True, justify="left" if place < left else "right")
    return table


def output() -> Console:
    """Standard output as rich sees it."""
    # What people and models wrote may look like markup.
    return Console(highlight=False, markup=False, soft_wrap=True)
