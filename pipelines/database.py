"""The database that jobs, attempts and schedules live in: one SQLite file, write-ahead logged.

One writer at a time; every change is one transaction, durable when it is over. It is one machine's: write-ahead logging
wants a local disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import DistillError, UserError
from distill.progress import say
from pipelines.clock import Clock, SystemClock

VARIABLE = "DISTILL_QUEUE"

_FILE = "queue.db"
_VERSION = 1
"""Of the tables. Who changes them counts on and turns older ones into the new; tests/data has a queue of each."""
_BUSY_SECONDS = 60.0

_OF_THE_FILE = sqlite3.DatabaseError
_OUR_OWN = (sqlite3.IntegrityError, sqlite3.ProgrammingError)
"""What may be wrong with the file, a damaged one included, and the kinds of it that are mistakes of this code."""

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_FOR_A_WHILE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
"""A full disk, one that fails, and a file that somebody else holds."""

_SCHEMA = """
CREATE TABLE schedules (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, paused INTEGER NOT NULL, considered INTEGER NOT NULL, next_due INTEGER,
    created REAL NOT NULL
);
CREATE TABLE missed (
    schedule TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, num INTEGER, reason TEXT NOT NULL
);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, schedule TEXT, due INTEGER, state TEXT NOT NULL,
    spec TEXT NOT NULL, data TEXT, not_before REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
    stops INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL,
    finished REAL, exit_code INTEGER, reason TEXT, stop TEXT, UNIQUE (schedule, due)
);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE attempts (
    job INTEGER NOT NULL REFERENCES jobs, number INTEGER NOT NULL, token TEXT NOT NULL, worker TEXT NOT NULL,
    slots TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER, ticks INTEGER, lease REAL NOT NULL, began REAL NOT NULL,
    beat REAL NOT NULL, started REAL NOT NULL, finished REAL, state TEXT, exit_code INTEGER, reason TEXT,
    PRIMARY KEY (job, number)
);
CREATE INDEX attempts_under_way ON attempts (job) WHERE finished IS NULL;
"""


def default_folder() -> Path:
    """The folder that DISTILL_QUEUE names, else ``strong-to-weak/queue`` under the user's state."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG rules say that a relative path is to be ignored.
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "strong-to-weak" / "queue"


def is_unused(named: Path | None) -> bool:
    """Whether the usual queue is meant and nothing has made it yet: no jobs and no schedules, but no mistake either."""
    if named is not None:
        return False
    try:
        (default_folder() / _FILE).stat()
    except FileNotFoundError:
        say(f"there is no queue in {default_folder()} yet; distill queue add and distill schedule add make one")
        return True
    except OSError:
        return False  # opening it says what is wrong
    return False


class Database:
    """The database in a folder, made if need be unless ``create`` is False. Raises UserError where it cannot be had."""

    def __init__(self, folder: Path, clock: Clock | None = None, *, create: bool = True) -> None:
        self.folder = folder
        self.clock: Clock = SystemClock() if clock is None else clock
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            elif not (folder / _FILE).exists():
                raise UserError(
                    f"there is no queue in {folder}; distill queue add and distill schedule add make one, --queue or "
                    f"{VARIABLE} names another"
                )
            lock = (folder / ".lock").open("w")
        except OSError as error:
            kind = DistillError if error.errno in _DISK_REFUSES else UserError
            raise kind(
                f"the queue's folder {folder} cannot be had: {error.strerror}; name another with --queue or {VARIABLE}"
            ) from None
        with lock:
            # Turning the log on wants the file for oneself, and does not wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._connection = self._open(folder / _FILE)

    def _open(self, file: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            # What a transaction has changed outlives the machine's power too.
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            # What another time may be otherwise is no mistake of who names the queue.
            kind = DistillError if error.sqlite_errorcode & 0xFF in _FOR_A_WHILE else UserError
            raise kind(f"{file} cannot be used as a queue: {error}; name another folder with --queue") from None
        if version not in (0, _VERSION):
            connection.close()
            raise UserError(
                f"{file} is a queue of a newer version of distill (its tables are of version {version}, and this one "
                f"knows {_VERSION}); use that one, or name another folder with --queue or {VARIABLE}"
            )
        return connection

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it, with nobody between. Raises DistillError where the disk refuses."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except _OF_THE_FILE as error:
            if isinstance(error, _OUR_OWN):
                raise
            raise DistillError(
                f"{self.folder / _FILE} could not be changed: {error}; nothing was. Make room, or mend the folder"
            ) from error

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """What a query finds."""
        try:
            return self._connection.execute(query, values).fetchall()
        except _OF_THE_FILE as error:
            if isinstance(error, _OUR_OWN):
                raise
            raise DistillError(
                f"{self.folder / _FILE} could not be read: {error}; mend the folder, or name another with --queue"
            ) from error
