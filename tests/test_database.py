"""A queue's file from another version of the toolkit: an older one opens, a newer one is a sentence."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.database import Database

DATA = Path(__file__).parent / "data"


@pytest.fixture
def typed(typed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command on the queue in ``old``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_QUEUE", str(tmp_path / "old"))
    return typed


def queue_of(version: int, folder: Path) -> Path:
    """The queue that a version of the toolkit left: a schedule that was paused, and jobs that failed, wait, were
    cancelled."""
    folder.mkdir()
    file = folder / "queue.db"
    with sqlite3.connect(file) as connection:
        connection.executescript((DATA / f"queue_{version}.sql").read_text(encoding="utf-8"))
    connection.close()
    return file


def test_a_queue_of_an_older_version_opens_and_works(typed: Any, tmp_path: Path) -> None:
    queue_of(1, tmp_path / "old")

    def document(*arguments: str) -> Any:
        code, out, err = typed(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    jobs = document("queue", "list")["jobs"]
    assert [(job["name"], job["state"]) for job in jobs] == [
        ("lost", "failed"),
        ("nightly", "queued"),
        ("other", "cancelled"),
    ]
    shown = document("schedule", "show", "nightly")
    # More than a schedule may say by now; a job is what it was when it was added.
    assert shown["schedule"]["starting_deadline_seconds"] == 99999999
    assert shown["paused"] and shown["missed"][0]["reason"] == "paused" and shown["jobs"] == [jobs[1]]
    assert len(document("schedule", "resume", "nightly")["next_due"]) == len("2026-11-27T01:00:00Z")
    assert document("queue", "cancel", "2")["state"] == "cancelled"
    assert document("schedule", "run-now", "nightly")["id"] == 4
    assert document("queue", "retry", "1")["state"] == "queued"
    (tmp_path / "more.yaml").write_text("extends: embedded\n")
    assert document("queue", "add", "more.yaml")["id"] == 5


def test_tables_that_change_have_another_version(tmp_path: Path) -> None:
    """What is made new is what an older file becomes: a column more without a version more would be a crash there."""

    def tables(folder: Path) -> dict[str, str]:
        rows = Database(folder).rows("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {row["name"]: " ".join(row["sql"].split()) for row in rows}

    queue_of(1, tmp_path / "old")
    assert tables(tmp_path / "old") == tables(tmp_path / "new")


@pytest.mark.parametrize(
    "arguments", [("queue", "list"), ("schedule", "list"), ("queue", "add", "job.yaml"), ("worker", "--once")]
)
def test_a_queue_of_a_newer_version_is_a_sentence(typed: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = queue_of(1, tmp_path / "old")
    (tmp_path / "job.yaml").write_text("extends: embedded\n")
    with sqlite3.connect(file) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA user_version = 2")
    connection.close()
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    code, out, err = typed(*arguments)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert "is a queue of a newer version of distill (its tables are of version 2, and this one knows 1)" in err
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("queue", "list"),
        ("schedule", "list"),
        ("queue", "add", "job.yaml"),
        ("queue", "retry", "1"),
        ("worker", "--once"),
    ],
)
def test_a_damaged_queue_is_a_sentence(typed: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = queue_of(1, tmp_path / "old")
    (tmp_path / "job.yaml").write_text("extends: embedded\n")
    # The first page, which says what the file is, stays as it was.
    file.write_bytes(file.read_bytes()[:4096] + b"\xa5" * (file.stat().st_size - 4096))
    code, out, err = typed(*arguments)
    assert (code, out) == (1, "") and "Traceback" not in err
    assert "queue.db could not be" in err and "malformed" in err


def test_a_disk_that_is_full_is_no_mistake_of_the_command(tmp_path: Path) -> None:
    """Exit code 1, which who starts workers tries again, and not 2: the queue cannot even be opened."""
    queue_of(1, tmp_path / "old")
    limited = f"resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); Database(pathlib.Path({str(tmp_path / 'old')!r}))"
    program = f"""
import pathlib, resource, sys
from distill.errors import DistillError
from pipelines.database import Database
try:
    {limited}
except DistillError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "") and "cannot be used as a queue: disk I/O error" in done.stdout
