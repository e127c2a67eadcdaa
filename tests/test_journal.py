"""What a process that was killed leaves of its checkpoints: whole ones, and nothing else once the run goes on."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.journal import Journal, write_folder
from pipelines.resolution import resolve_run

NUM_STEPS = 3


def journal(out: Path) -> Journal:
    return Journal(out, resolve_run(recipe="embedded"))


def write(journal: Journal, step: int, value: float) -> None:
    state = {"stage_end": False, "stage_name": "only"}
    journal.write_checkpoint(step, state, {"x": torch.tensor([value])}, lambda folder: None)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_removing(first: str) -> None:
    """A folder is removed file by file, in any order; this one's first file is ``first``."""

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            (Path(path) / first).unlink()
            kill()

    shutil.rmtree = rmtree  # type: ignore[assignment]


def kill_in_appearing() -> None:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            kill()
        return real(path, target)

    Path.rename = rename  # type: ignore[method-assign,assignment]


def in_process(out: Path, prepare: Callable[[], None], step: int) -> None:
    resumed = journal(out)
    prepare()
    write(resumed, step, 2.0)


@pytest.mark.parametrize(
    ("prepare", "step", "found"),
    [
        # The newest is written again, as where a run is stopped behind it.
        (partial(kill_in_removing, "training.safetensors"), NUM_STEPS, 2.0),
        (kill_in_appearing, NUM_STEPS, 1.0),
        (partial(kill_in_removing, "state.json"), NUM_STEPS + 1, 2.0),  # the oldest is pruned
    ],
)
def test_a_killed_process_leaves_whole_checkpoints(
    tmp_path: Path, prepare: Callable[[], None], step: int, found: float
) -> None:
    begun = journal(tmp_path)
    begun.manifest({"command": "a test"})
    for number in range(1, NUM_STEPS + 1):
        write(begun, number, 1.0)
    begun.close()

    killed = multiprocessing.get_context("fork").Process(target=in_process, args=(tmp_path, prepare, step))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL

    resumed = journal(tmp_path)
    last = resumed.last_checkpoint()
    assert last is not None
    state, folder = last
    assert state["global_step"] == step and float(load_file(folder / "training.safetensors")["x"]) == found
    write(resumed, step + 1, 3.0)
    there = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in there] == [f"step_{step}", f"step_{step + 1}"]
    assert all((path / "training.safetensors").exists() for path in there)
    resumed.close()


def test_a_link_to_a_folder_on_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "student").mkdir(parents=True)
    link = tmp_path / "student"
    link.symlink_to(tmp_path / "disk" / "student")
    for text in ("once", "again"):
        write_folder(link, lambda folder, text=text: (folder / "x").write_text(text) and None)  # type: ignore[misc]
    assert link.is_symlink() and (tmp_path / "disk" / "student" / "x").read_text() == "again"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["student"]
