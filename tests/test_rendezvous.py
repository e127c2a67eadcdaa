"""Processes that wait for others that do not come: for a while, and to be stopped at any time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from distill.vllm.service import free_port

HOST = "127.0.0.1"

MEET = """
import sys, time
from datetime import timedelta
from distill.cli import app, main
from distill.interrupt import deferred_signals
from students import ranks

@app.command()
def meet(patience: float = 60.0, late: float = 0.0) -> None:
    ranks.RENDEZVOUS_PATIENCE = timedelta(seconds=patience)
    with deferred_signals(), ranks.joined_ranks() as joined:
        time.sleep(late)
        print(joined.gather(joined.number))

main()
"""
"""A command that does no more than meet the others, as ``distill run`` does, and begins sooner."""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts Python as process ``rank`` of two; who still waits at the end of a test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(words: Sequence[str], *, rank: int, port: int | str) -> subprocess.Popen[str]:
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
        environment = {**os.environ, **place, "DISTILL_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *words], env=environment, text=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def listens(port: int) -> bool:
    """Whether somebody does, without a connection that would count as one of those who are waited for."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return any(row[3] == "0A" and int(row[1].rsplit(":", 1)[1], 16) == port for row in rows)


def ended_by(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, float]:
    """Its exit code, what it said, and how many seconds it took to end."""
    asked = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr, time.monotonic() - asked


def failed(process: subprocess.Popen[str], code: int = 1) -> str:
    """What it said that failed."""
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    return stderr


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("meet", signal.SIGTERM, 75),
        ("meet", signal.SIGINT, 130),
        pytest.param("run", signal.SIGTERM, 75, marks=pytest.mark.slow),
    ],
)
def test_the_first_process_is_stopped_while_it_waits(
    start: Start, tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    port = free_port(HOST)
    words = ["-c", MEET, "meet"] if command == "meet" else ["-m", "distill.cli", "run", "--out", str(tmp_path / "run")]
    process = start(words, rank=0, port=port)
    while not listens(port) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)

    returned, said, seconds = ended_by(process, number)
    assert returned == code, said
    assert f"stopped by {number.name}" in said and "Traceback" not in said
    assert seconds < 5
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_stopped_while_the_first_says_nothing(start: Start) -> None:
    with socket.create_server((HOST, 0)) as silent:
        silent.settimeout(60)
        process = start(["-c", MEET, "meet"], rank=1, port=silent.getsockname()[1])
        connection, _ = silent.accept()
        with connection:
            time.sleep(0.2)
            returned, said, seconds = ended_by(process, signal.SIGTERM)
    assert returned == 75, said
    assert "stopped by SIGTERM" in said and "Traceback" not in said
    assert seconds < 5


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_says_for_whom_and_where(start: Start, rank: int) -> None:
    port = free_port(HOST)
    said = failed(start(["-c", MEET, "meet", "--patience", "1.5"], rank=rank, port=port))
    assert f"process {rank} has waited 0.025 minutes at {HOST}:{port} for all 2 processes" in said
    assert "MASTER_ADDR" in said and "Traceback" not in said


def test_a_port_that_another_program_has_is_said(start: Start) -> None:
    with socket.create_server((HOST, 0)) as other:
        said = failed(start(["-c", MEET, "meet"], rank=0, port=other.getsockname()[1]))
    assert "address already in use" in said and "Traceback" not in said


@pytest.mark.slow
def test_who_has_met_waits_longer_than_for_the_meeting(start: Start) -> None:
    port = free_port(HOST)
    words = ["-c", MEET, "meet", "--patience", "10", "--late"]
    for process in [start([*words, late], rank=rank, port=port) for rank, late in enumerate(("0", "12"))]:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert stdout == "[0, 1]\n"


@pytest.mark.parametrize(("rank", "port", "variable"), [(2, 29500, "RANK is 2"), (0, "abc", "MASTER_PORT is 'abc'")])
def test_nobody_waits_at_a_place_that_cannot_be(start: Start, rank: int, port: int | str, variable: str) -> None:
    said = failed(start(["-c", MEET, "meet"], rank=rank, port=port), code=2)
    assert variable in said and "Traceback" not in said
