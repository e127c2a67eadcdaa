"""A collection of the response store: one folder of parquet shards and an index of them.

A writer holds the folder's lock while it looks which keys are new and adds its shard, so that a key is stored once;
readers share the lock. A shard appears under its name only when it is whole and on disk. One that turns out damaged is
renamed (``.hurt``, hidden as the lock and drafts are: `datasets` takes every visible file of the folder for data); who
has the lock next writes the rows of it that are whole to a new shard and sets it aside (``.broken``). A row is a
response with everything that was asked; see ``response_rows``.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.progress import say
from distill.types import Request, Rollout
from teachers.response_rows import (
    COLUMNS,
    READ_COLUMNS,
    request_of,
    response_hash,
    rollout_of,
    row_of,
    table_of,
    with_plain_times,
)

VARIABLE = "DISTILL_STORE"
_ROW_GROUP = 256  # rows that are read together when one of them is wanted
_SMALL_SHARD = 4096  # rows; smaller shards are joined when there are many


@dataclass(frozen=True, slots=True)
class Kept:
    """A stored response; ``run`` is the label of the run that generated it, ``created`` when, in microseconds."""

    rollout: Rollout
    run: str
    created: int


class Collection:
    """A folder, ``meta`` about all its responses, and the index: key -> (when it was stored, shard, row)."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self._shards: dict[str, dict[str, tuple[int, str, int]]] = {}
        self._index: dict[str, tuple[int, str, int]] = {}

    def read(self, wanted: Mapping[str, Request], speaker: str) -> dict[str, Kept]:
        """What is stored of ``wanted``, by key; each response is checked against its hash."""
        while True:
            found = self._read(wanted, speaker)
            if not any(self.folder.glob(".part-*.hurt")):
                return found
            with outside_world(self.folder), self._lock():
                pass  # what is whole of the damaged shards is saved, and can be read

    def _read(self, wanted: Mapping[str, Request], speaker: str) -> dict[str, Kept]:
        with self._unchanged():
            while True:
                self._refresh()
                places = defaultdict(list)
                for key in wanted:
                    if key in self._index:
                        _, shard, row = self._index[key]
                        places[shard].append((row, key))
                found: dict[str, Kept] = {}
                # A shard that was found broken has been set aside: look again, an older copy may be there.
                if all(self._read_shard(shard, rows, wanted, speaker, found) for shard, rows in places.items()):
                    return found

    def shards(self) -> list[Path]:
        """The files that hold responses."""
        return sorted(self.folder.glob("part-*.parquet"))

    def set_aside(self) -> list[str]:
        """Names of the files that were found damaged."""
        return sorted(file.name for ending in ("hurt", "broken") for file in self.folder.glob(f".part-*.{ending}"))

    def walk(self, broken: list[str]) -> Iterator[tuple[str, Kept]]:
        """Every response with its key, a few at a time in memory; of a key that is there twice the first one stored.

        For looking only: a shard that cannot be read is named in ``broken`` and left where it is.
        """
        with outside_world(self.folder), self._unchanged():
            first: dict[str, tuple[int, str, int]] = {}
            for shard in self.shards():
                for number, row in enumerate(self._rows(shard, ["key", "created"], broken)):
                    place = (row["created"], shard.name, number)
                    first[row["key"]] = min(place, first.get(row["key"], place))
            for shard in self.shards():
                for number, row in enumerate(self._rows(shard, list(COLUMNS), broken)):
                    if first[row["key"]] == (row["created"], shard.name, number):
                        yield (
                            row["key"],
                            Kept(rollout_of(row, request_of(row), row["teacher"]), row["run"], row["created"]),
                        )

    def _rows(self, shard: Path, columns: list[str], broken: list[str]) -> Iterator[dict[str, Any]]:
        from pyarrow import ArrowException, RecordBatch, parquet

        if shard.name in broken:
            return
        try:
            with parquet.ParquetFile(shard, page_checksum_verification=True) as file:
                batch: RecordBatch
                for batch in file.iter_batches(batch_size=_ROW_GROUP, columns=columns):
                    yield from with_plain_times(batch).to_pylist()
        except (ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            broken.append(shard.name)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """No writer adds or joins shards meanwhile.

        Without it a listing made while shards are joined can miss the joined one, which is not there yet, and find the
        others gone when they are opened: everything they hold would seem never to have been stored.
        """
        if not (self.folder / ".lock").exists():
            yield  # nobody has written here yet
            return
        with (self.folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def add(self, rollouts: Mapping[str, Rollout], speaker: str, run: str) -> int:
        """Store those whose keys are new; how many they were."""
        if not rollouts:
            return 0
        rows = {key: row_of(key, rollout, speaker, self.meta["revision"], run) for key, rollout in rollouts.items()}
        with outside_world(self.folder), self._lock():
            self._refresh()
            new = [row for key, row in rows.items() if key not in self._index]
            if new:
                self._write(table_of(new))
        return len(new)

    def compact(self) -> int:
        """Join the small shards; how many were joined."""
        from pyarrow import ArrowException, concat_tables, parquet

        with outside_world(self.folder), self._lock():
            self._refresh()
            tables = {}
            for name in [name for name, index in self._shards.items() if len(index) < _SMALL_SHARD]:
                try:
                    tables[name] = parquet.read_table(self.folder / name, page_checksum_verification=True)
                except (ArrowException, OSError) as error:
                    self._set_aside(name, error)
            if len(tables) < 2:
                return 0
            joined = concat_tables(tables.values()).sort_by("created")
            # Folders that were copied into each other, or a writer killed before it removed what it had joined.
            first = {key: row for row, key in reversed(list(enumerate(joined["key"].to_pylist())))}
            self._write(joined.take(sorted(first.values())))
            for name in tables:
                (self.folder / name).unlink(missing_ok=True)
            return len(tables)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Alone among writers; the system releases the lock of a process that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Drafts are written under the lock, so one that is there now was left by a writer that died.
            for draft in self.folder.glob(".draft-*"):
                draft.unlink()
            for hurt in self.folder.glob(".part-*.hurt"):
                self._save(hurt)
            meta = self.folder / "meta.json"
            if not meta.is_file():
                draft = self.folder / ".draft-meta.json"
                draft.write_text(json.dumps(self.meta, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                _settle(draft, meta)
            yield

    def _write(self, table: Any) -> None:
        from pyarrow import parquet

        name = f"part-{uuid.uuid4().hex}.parquet"
        draft = self.folder / f".draft-{name}"
        try:
            parquet.write_table(table, draft, row_group_size=_ROW_GROUP, compression="zstd", write_page_checksum=True)
            _settle(draft, self.folder / name)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _refresh(self) -> None:
        """Bring the index to what is in the folder now; of a key that is there twice the first one stored wins."""
        from pyarrow import ArrowException, parquet

        there = {file.name for file in self.folder.glob("part-*.parquet")}
        if there == self._shards.keys():
            return
        self._shards = {name: index for name, index in self._shards.items() if name in there}
        for name in sorted(there - self._shards.keys()):
            try:
                table = parquet.read_table(self.folder / name, columns=["key", "created"])
            except FileNotFoundError:
                continue
            except (ArrowException, OSError) as error:
                self._set_aside(name, error)
                continue
            keys, created = table["key"].to_pylist(), table["created"].cast("int64").to_pylist()
            self._shards[name] = {
                key: (stored, name, row) for row, (key, stored) in enumerate(zip(keys, created, strict=True))
            }
        self._index = {}
        for index in self._shards.values():
            for key, place in index.items():
                if key not in self._index or place < self._index[key]:
                    self._index[key] = place

    def _read_shard(
        self,
        name: str,
        rows: list[tuple[int, str]],
        wanted: Mapping[str, Request],
        speaker: str,
        found: dict[str, Kept],
    ) -> bool:
        """Read rows of one shard into ``found``; False if the shard cannot be read (any more)."""
        from pyarrow import ArrowException, parquet

        groups = defaultdict(list)
        for row, key in rows:
            groups[row // _ROW_GROUP].append((row % _ROW_GROUP, key))
        try:
            with parquet.ParquetFile(self.folder / name, page_checksum_verification=True) as shard:
                for group, places in groups.items():
                    table = with_plain_times(shard.read_row_group(group, columns=READ_COLUMNS))
                    for place, key in places:
                        row_found = table.slice(place, 1).to_pylist()[0]
                        if row_found["key"] != key or row_found["content_hash"] != response_hash(row_found):
                            raise OSError(f"the response {key[:12]} does not have the hash it was stored with")
                        rollout = rollout_of(row_found, wanted[key], speaker)
                        found[key] = Kept(rollout, row_found["run"], row_found["created"])
        except FileNotFoundError:
            return False
        except (ArrowException, OSError, IndexError) as error:
            self._set_aside(name, error)
            return False
        return True

    def _set_aside(self, name: str, error: Exception) -> None:
        """Rename a damaged shard. A refusal of the operating system (it has a number) is no damage, and is raised."""
        shard = self.folder / name
        with outside_world(shard):
            if isinstance(error, OSError) and error.errno is not None:
                raise error
            try:
                shard.rename(shard.with_name(f".{name}.hurt"))
            except FileNotFoundError:
                # Another process has done so.
                return
        say(f"{shard} is damaged ({' '.join(str(error).split())[:200]})")

    def _save(self, hurt: Path) -> None:
        """Write the rows of a damaged shard that are whole to a new one; for whoever is alone among writers."""
        whole = list(_whole_rows(hurt))
        if whole:
            self._write(table_of(whole))
        aside = hurt.with_suffix(".broken")
        hurt.rename(aside)
        say(f"{len(whole)} whole responses are saved from it; it is kept as {aside} and the others are generated again")


def _whole_rows(shard: Path) -> Iterator[dict[str, Any]]:
    """The rows that can be read and have the hash they were stored with."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(shard, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                try:
                    rows = with_plain_times(file.read_row_group(group, columns=list(COLUMNS))).to_pylist()
                except (ArrowException, OSError, IndexError):
                    continue
                yield from (row for row in rows if row["content_hash"] == response_hash(row))
    except (ArrowException, OSError):
        return  # without its end a file of parquet says nothing


def _settle(draft: Path, final: Path) -> None:
    """Give a finished file its name, once it and then the name are on disk."""
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def outside_world(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise DistillError(
            f"the response store {path} cannot be used ({error.strerror or error}); responses stored before are safe "
            f"and the same command goes on from them; free some space, or name another folder with --store "
            f"or {VARIABLE}"
        ) from error
