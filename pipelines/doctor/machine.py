"""Memory and disk: how much is free where a run needs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.doctor.finding import Finding
from teachers.store import default_root

LEAST_MEMORY = 1.5 * 2**30
"""The embedded run's peak is about 1 GiB."""
LITTLE_MEMORY = 4 * 2**30
LEAST_DISK = 1 * 2**30
LITTLE_DISK = 20 * 2**30
"""A checkpoint of a 4B student with its optimiser is about 24 GB, the student itself 8 GB."""
LITTLE_SHARED = 1 * 2**30
"""vLLM's workers exchange tensors through /dev/shm; a container has 64 MiB of it unless told otherwise."""


def free_memory() -> float:
    """Bytes of this machine that a new process could have."""
    return min(_available(), _left_to_cgroup())


def memory() -> Sequence[Finding]:
    free = free_memory()
    text = f"{_gib(free)} free"
    if free < LEAST_MEMORY:
        cure = f"end other programs: the embedded run alone needs {_gib(LEAST_MEMORY)}"
        return [Finding("memory", "failed", text, cure=cure)]
    if free < LITTLE_MEMORY:
        return [Finding("memory", "warning", text, cure="enough for the embedded models; end other programs for more")]
    return [Finding("memory", "ok", text)]


def _available() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(kib) * 1024


def _left_to_cgroup(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's limit leaves; infinite where there is none."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (root / limit).is_file() and (root / used).is_file():
            most = (root / limit).read_text(encoding="ascii").strip()
            return float("inf") if most == "max" else float(most) - float((root / used).read_text(encoding="ascii"))
    return float("inf")


def shared_memory(path: Path = Path("/dev/shm")) -> Sequence[Finding]:
    if not path.is_dir():
        return []
    free = shutil.disk_usage(path).free
    if free < LITTLE_SHARED:
        cure = "vLLM over several GPUs needs more: start the container with --shm-size 8g or --ipc host"
        return [Finding("shared memory", "warning", f"{_gib(free)} free in {path}", cure=cure)]
    return [Finding("shared memory", "ok", f"{_gib(free)} free in {path}")]


def disk() -> Sequence[Finding]:
    """The folders that a run writes to."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    places = {
        "disk for runs": (Path("runs"), "give another folder with --out"),
        "disk for responses": (default_root(), "give another folder with --store or DISTILL_STORE"),
        "disk for the hub's cache": (Path(home).expanduser(), "give another folder with HF_HOME"),
        "disk for temporary files": (Path(tempfile.gettempdir()), "give another folder with TMPDIR"),
    }
    return [free_in(check, path.absolute(), way_out) for check, (path, way_out) in places.items()]


def free_in(check: str, path: Path, way_out: str) -> Finding:
    """How much is free where ``path`` is, or will be made."""
    there = next(one for one in (path, *path.parents) if one.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(check, "failed", f"{there} cannot be written to", cure=f"{way_out}, or change its permissions")
    free = shutil.disk_usage(there).free
    text = f"{_gib(free)} free in {there}"
    if free >= LITTLE_DISK:
        return Finding(check, "ok", text)
    return Finding(check, "failed" if free < LEAST_DISK else "warning", text, cure=f"make room, or {way_out}")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
