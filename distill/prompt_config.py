"""Settings of the prompts: the embedded task, files, or sets on the hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.settings import PositiveInt, Settings


class EmbeddedPrompts(Settings):
    """Fresh questions of the embedded arithmetic task."""

    kind: Literal["embedded"] = "embedded"
    max_operations: Annotated[int, Field(ge=1, le=8)] = 8
    """Difficulty: the longest chain of operations."""


class FilePrompts(Settings):
    """Prompts from a local JSONL or parquet file, or a folder of such files."""

    kind: Literal["file"] = "file"
    path: str
    prompt_column: str = "prompt"
    """The column that holds the prompt, as text or as a list of messages."""
    answer_column: str = "answer"
    """The column that holds the reference for grading, if there is one."""


class HubSet(Settings):
    """One data set on the Hugging Face hub."""

    id: str
    revision: str
    """A commit, so that the same recipe reads the same data next year."""
    licence: str
    """Shown before the download; yours to check against your use."""
    split: str = "train"
    subset: str | None = None
    prompt_column: str = "prompt"
    answer_column: str | None = None
    language_column: str | None = None
    mode_column: str | None = None
    """think, no_think or null, for each prompt."""
    domain_column: str | None = None
    domain: str | None = None
    """Recorded with every prompt of the set that ``domain_column`` names none for."""
    usual_columns: bool = False
    """Use the columns answer, mode, language and domain where the set has them, as ``--prompts`` does."""
    limit: PositiveInt | None = None
    """The first rows that are used; null uses all."""


class HubPrompts(Settings):
    """Prompts from sets on the hub, downloaded on first use, shuffled together by the run's seed."""

    kind: Literal["hub"] = "hub"
    sets: Annotated[tuple[HubSet, ...], Field(min_length=1)]


PromptSettings = Annotated[EmbeddedPrompts | FilePrompts | HubPrompts, Field(discriminator="kind")]
