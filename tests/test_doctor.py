"""The doctor finds what is made to be wrong: broken libraries, orphans, a clock that is off; and names the cure."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from shapes import assert_document

from pipelines.doctor import outside, software, strays
from pipelines.doctor.machine import _left_to_cgroup, free_in, shared_memory
from pipelines.doctor.strays import Process, processes, strays_among

ROOT = Path(__file__).resolve().parent.parent


def library(folder: Path, name: str, body: str, version: str = "1.0") -> None:
    """A library that is installed as far as Python can tell, and does what ``body`` says when it is imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def doctor(libraries: Path, **environment: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit code and document of the command in a process of its own that finds ``libraries`` first."""
    path = os.pathsep.join([str(libraries), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        cwd=libraries,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    document = assert_document("doctor", done.stdout)
    return done.returncode, document, {found["check"]: found for found in document["findings"]}


VLLM = """
import sys, types
__version__ = "0.32.0"
sys.modules["vllm.platforms"] = types.ModuleType("vllm.platforms")
sys.modules["vllm.platforms"].current_platform = types.SimpleNamespace(device_type="cpu")
"""


def test_a_broken_torchvision_is_found_with_its_cure(tmp_path: Path) -> None:
    library(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    library(tmp_path, "vllm", VLLM)  # the real one takes seconds to import
    code, document, found = doctor(tmp_path)
    assert code == 1 and document["healthy"] is False
    assert set(document) == {"healthy", "findings"}
    assert all(set(one) == {"check", "state", "text", "cure"} for one in document["findings"])
    assert all((one["cure"] is None) == (one["state"] == "ok") for one in document["findings"])
    vision = found["torchvision"]
    assert vision["state"] == "failed" and "torchvision::nms" in vision["text"]
    assert "pip uninstall -y torchvision" in vision["cure"]
    assert found["torch"]["state"] == "ok" and found["python"]["state"] == "ok"
    assert (found["vllm"]["state"], found["vllm"]["text"]) == ("ok", "0.32.0 for cpu")
    assert {"gpu", "transformers", "vllm", "memory", "stray vLLM", "hub", "steady clock"} <= set(found)
    assert "HF_HUB_OFFLINE" in found["hub"]["text"]


def test_a_broken_torch_does_not_break_the_doctor(tmp_path: Path) -> None:
    library(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')", "2.1.0")
    code, _, found = doctor(tmp_path)
    assert code == 1
    assert found["torch"]["state"] == "failed" and "libcudart" in found["torch"]["text"]
    assert "uninstall -y torch" in found["torch"]["cure"]
    assert "gpu" not in found  # nothing can be asked
    pins = found["pins of strong-to-weak"]
    assert pins["state"] == "failed" and "torch>=2.11 (installed: 2.1.0)" in pins["text"]
    assert "'torch>=2.11'" in pins["cure"]


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, "torch", "import time\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    found = software.imported("torch", seconds=1.0)
    assert found.said is None and "did not end within 1 s" in found.why_not
    assert time.monotonic() - started < 30


def test_a_missing_library_is_told_from_a_broken_one() -> None:
    missing = software._library("torch", software.Imported(None, "No module named 'torch'"), has_companions=False)
    assert missing.cure == "`./do setup` installs it"
    why = software.Imported(None, "Could not import module 'AutoModelForCausalLM'")
    assert "torchvision torchaudio torchcodec" in str(software._library("transformers", why, has_companions=True).cure)
    assert "uninstall -y transformers" in str(software._library("transformers", why, has_companions=False).cure)


@pytest.mark.parametrize(
    ("torch", "driver", "state", "words"),
    [
        ({"version": "2.13.0+cpu", "cuda": None, "gpus": []}, False, "ok", "none"),
        ({"version": "2.13.0+cpu", "cuda": None, "gpus": []}, True, "failed", "without CUDA"),
        ({"version": "2.13.0", "cuda": "13.0", "gpus": []}, True, "failed", "sees no GPU"),
        (
            {"version": "2.13.0", "cuda": "13.0", "gpus": [{"name": "H100", "free": 70, "total": 80}]},
            True,
            "ok",
            "H100",
        ),
        (
            {"version": "2.13.0", "cuda": "13.0", "gpus": [{"name": "H100", "free": 10, "total": 80}]},
            True,
            "warning",
            "H100",
        ),
    ],
)
def test_the_gpu_and_torch_fit_together(torch: dict[str, Any], driver: bool, state: str, words: str) -> None:
    found = software.gpu(torch, driver)
    assert found.state == state and words in found.text


ORPHANED = "import subprocess, sys; print(subprocess.Popen(['bash', '-c', sys.argv[1]], stdout=-3).pid, flush=True)"


def test_an_orphan_is_found_among_real_processes() -> None:
    """Its parent ends at once; a child of ours with the same name is not one."""
    renamed = "exec -a VLLM::EngineCore sleep 60"
    done = subprocess.run(
        [sys.executable, "-c", ORPHANED, renamed], stdout=subprocess.PIPE, text=True, check=True, start_new_session=True
    )
    orphan = int(done.stdout)
    child = subprocess.Popen(["bash", "-c", renamed])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            there = [one for one in processes() if one.pid in (orphan, child.pid) and one.is_part]
            if len(there) == 2:
                break
            time.sleep(0.05)
        found = [finding for finding in strays_among(list(processes()), os.getuid()) if finding.state == "failed"]
        named = [finding for finding in found if f"process {orphan} " in finding.text]
        assert len(named) == 1 and "VLLM::EngineCore" in named[0].text
        assert not any(f"process {child.pid} " in finding.text for finding in found)
        # The cure is a command that works.
        assert named[0].cure is not None
        subprocess.run(named[0].cure, shell=True, check=True)
        deadline = time.monotonic() + 20
        while any(one.pid == orphan for one in processes()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()


SERVER = "python -m vllm.entrypoints.openai.api_server --model m"


@pytest.mark.parametrize(
    ("process", "state", "cure"),
    [
        # pid, parent, group, session, user, command
        (Process(50, 40, 40, 40, 7, "VLLM::EngineCore"), None, ""),  # its server is there
        (Process(50, 1, 50, 50, 7, "VLLM::EngineCore"), "failed", "kill -- -50"),
        (
            Process(50, 30, 40, 40, 7, "VLLM::Worker_TP0"),
            "failed",
            "kill 50",
        ),  # handed to a manager; a shell in its group
        (Process(50, 1, 50, 50, 8, "VLLM::EngineCore"), None, ""),  # somebody else's
        (Process(50, 1, 50, 50, 7, SERVER), "warning", "kill -- -50, unless"),
        (Process(50, 30, 50, 50, 7, SERVER), None, ""),  # a session of its own, under its starter
        (Process(50, 1, 50, 50, 7, "sleep 60"), None, ""),
    ],
)
def test_who_is_an_orphan(process: Process, state: str | None, cure: str) -> None:
    there = [
        Process(1, 0, 1, 1, 0, "init"),
        Process(30, 1, 30, 30, 7, "systemd --user"),
        Process(40, 30, 40, 40, 7, "bash job.sh"),
        process,
    ]
    found = list(strays_among(there, 7))
    assert [finding.state for finding in found] == ([state] if state else [])
    if found:
        assert str(found[0].cure).startswith(cure)


def test_strays_are_found_in_what_the_system_says(tmp_path: Path) -> None:
    def process(pid: int, parent: int, name: str, state: str = "S") -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes(name.encode() + b"\0")
        (folder / "stat").write_text(f"{pid} (a (strange) name) {state} {parent} {pid} {pid} 0 -1")

    process(1, 0, "init")
    process(50, 1, "sleep 60")
    process(60, 1, "VLLM::EngineCore", state="Z")
    (tmp_path / "uptime").write_text("1 2")
    assert [finding.state for finding in strays.find_strays(tmp_path)] == ["ok"]
    process(70, 1, "VLLM::EngineCore")
    (found,) = strays.find_strays(tmp_path)
    assert (found.state, found.cure) == ("failed", "kill -- -70")
    assert any(one.pid == os.getpid() and one.parent == os.getppid() for one in strays.processes())


@contextmanager
def a_hub(status: int, seconds_off: float) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + seconds_off, usegmt=True))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "off", "hub", "clock"),
    [(200, 0, "ok", "ok"), (302, -30, "ok", "ok"), (503, 0, "warning", "ok"), (200, 90, "ok", "failed")],
)
def test_hub_and_clock(monkeypatch: pytest.MonkeyPatch, status: int, off: float, hub: str, clock: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with a_hub(status, off) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        found = {finding.check: finding for finding in outside.look_outside()}
    assert (found["hub"].state, found["clock"].state) == (hub, clock)
    if clock == "failed":
        assert "behind" in found["clock"].text


def test_a_hub_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with a_hub(200, 0) as url:
        pass
    for endpoint in (url, "http://[", "no-scheme"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        found = outside.look_outside()
        assert [(finding.check, finding.state) for finding in found] == [("hub", "warning"), ("steady clock", "ok")]
        assert "HF_ENDPOINT" in str(found[0].cure)


def test_a_clock_that_jumps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1000.0, 1005.0])
    monkeypatch.setattr(outside.time, "time", lambda: next(times))
    found = outside.steady_clock()
    assert found.state == "warning" and "+4." in found.text


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert free_in("disk", tmp_path / "file" / "below", "way out").state == "failed"
    monkeypatch.setattr("pipelines.doctor.machine.LITTLE_DISK", 2**62)
    found = free_in("disk", tmp_path / "to" / "be" / "made", "give another folder with --out")
    assert found.state == "warning" and str(tmp_path) in found.text and "--out" in str(found.cure)
    monkeypatch.setattr("pipelines.doctor.machine.LEAST_DISK", 2**62)
    assert free_in("disk", tmp_path, "").state == "failed"
    monkeypatch.setattr("pipelines.doctor.machine.LITTLE_SHARED", 2**62)
    assert shared_memory(tmp_path)[0].state == "warning" and shared_memory(tmp_path / "none") == []


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _left_to_cgroup(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert _left_to_cgroup(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_to_cgroup(tmp_path) == float("inf")
