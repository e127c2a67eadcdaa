"""One's own prompt files, JSONL or parquet: every row checked, with the place it stands at."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.progress import say
from distill.prompt_config import FilePrompts
from distill.prompt_rows import EXAMPLE, FIELDS, kind_of, no_number, prompt_of, reason_of, shown_names
from distill.types import Prompt

_BATCH_ROWS = 4096


def file_prompts(settings: FilePrompts) -> Iterator[tuple[str, Prompt]]:
    """Every prompt of one's own files with the place it stands at, checked.

    Raises UserError for what cannot be used, with the file and line.
    """
    path = Path(os.path.expanduser(settings.path))
    columns = {name: settings.answer_column if name == "answer" else name for name in FIELDS}
    known = (settings.prompt_column, *columns.values())
    num_prompts, ignored = 0, set[str]()
    for file in prompt_files(path):
        rows = _parquet_rows(file, known) if file.suffix == ".parquet" else json_rows(file)
        for where, row in rows:
            if settings.prompt_column not in row:
                raise UserError(
                    f"{where}: there is no column {settings.prompt_column!r}; the columns are {shown_names(row)}; "
                    f"rename one, or name it with --set prompts.prompt_column=NAME"
                )
            ignored |= row.keys() - set(known)
            try:
                prompt = prompt_of(
                    row[settings.prompt_column], {name: row.get(column) for name, column in columns.items()}
                )
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            num_prompts += 1
            yield where, prompt
    if num_prompts == 0:
        raise UserError(f"{path} holds no prompt; write one JSON object a line, such as {EXAMPLE}")
    if ignored:
        say(f"{path}: not used: {shown_names(sorted(ignored))} (used: {', '.join(known)})")


def prompt_files(path: Path) -> list[Path]:
    """The file itself, or the prompt files of a folder by name."""
    try:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".ndjson", ".parquet"))
            if not found:
                raise UserError(f"the folder {path} holds no .jsonl or .parquet file; put one there, or name the file")
            return found
        if path.exists():
            return [path]
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else None
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror}") from None
    if there is None:
        raise UserError(
            f"there is no file {path}: its folder {path.parent} does not exist either; check the spelling (a set on "
            f"the hub is OWNER/NAME@REVISION)"
        )
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.4)
    raise UserError(f"there is no file {path}; " + (f"did you mean {near[0]}?" if near else "check the spelling"))


def json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSONL file with the place each stands at. Raises UserError for a line that is none."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"{file}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"), parse_constant=no_number)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where} is not JSON ({reason_of(error)}); write one JSON object a line, such as {EXAMPLE}"
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(f"{where} holds {kind_of(row)}; write one JSON object a line, such as {EXAMPLE}")
                yield where, row
    except OSError as error:
        raise UserError(f"the prompts {file} cannot be read: {error.strerror}") from None


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``columns`` of a table's rows, those it has; the first of them it must have."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in columns if name in names]
            if columns[0] not in names:
                # Also where the table has no row: whoever asked says which columns there are.
                yield f"{file}", dict.fromkeys(names)
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read as parquet ({reason_of(error)}); write it again, or use JSONL"
        ) from None
