"""The run directory: what a run writes, and how it finds its place again.

    config.yaml     the resolved configuration, itself a recipe
    manifest.json   versions, seeds, revisions and hashes of what went in, the command, keys of the responses used
    metrics.jsonl   one object an optimiser step
    curve.jsonl     scores between the steps, if evaluation.curve asks for them
    samples.jsonl   a few responses of the student, token by token, with the teacher's judgement
    warnings.jsonl  what the guards warned of, if they did
    costs.json      tokens, FLOPs and seconds by role
    checkpoints/    step_N/: a plain transformers checkpoint, and beside it what a resumed run needs
    student/        the result
    eval/           scores and samples
    summary.json    written last: its presence means that the run is finished
    report.html

Every file is written under another name and renamed, so a file that is there is whole; the .jsonl files alone grow in
place, and lines after the last checkpoint are dropped when a run resumes. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import RunConfig
from distill.errors import DistillError, UserError
from distill.recipe import dump_yaml
from distill.run_folder import claim, refuse_other

if TYPE_CHECKING:
    from torch import Tensor

_OLDER = ".older"
KEPT_CHECKPOINTS = 2
"""Newest checkpoints that stay beside those at the stages' ends."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the file system says while ``path`` is written into a sentence (exit code 1)."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise DistillError(
            f"{path} could not be written: {reason}. The run so far is safe up to its last checkpoint; "
            "make room (or mend the folder) and give the same command again"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step: readers see the old file or the new one, never a half."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, document: object) -> None:
    """``write_atomically`` for JSON; NaN is refused, readers of strict JSON could not open it."""
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder that appears as ``target``, in the place of an older one, when it is whole."""
    if target.is_symlink():
        target = target.resolve()  # what it points to is replaced, and not the link
    temporary = target.with_name(f".{target.name}.tmp")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_or_oserror(write, temporary)
        _sync(temporary)
        older = _aside(target)
        temporary.rename(target)
        if older is not None:
            shutil.rmtree(older)


def _aside(target: Path) -> Path | None:
    """The folder ``target`` under another name, if there is one: removing it takes time, in which it is not whole."""
    older = target.with_name(f".{target.name}{_OLDER}")
    _settle(older)
    return target.rename(older) if target.exists() else None


def _settle(older: Path) -> None:
    """Put a folder that a killed process had put aside back, or remove it where another stands in its place."""
    if not older.exists():
        return
    target = older.with_name(older.name.removeprefix(".").removesuffix(_OLDER))
    if target.exists():
        shutil.rmtree(older)
    else:
        older.rename(target)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Journal:
    """A run directory that this process may write to; where ``writes`` is False, only read.

    Of several processes of a run one writes; on the others every writing method does nothing.

    Raises UserError where the directory cannot be used: it holds something that is no run, a run of another
    configuration (the differences are named), a run that another process is working on, or cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, writes: bool = True) -> None:
        self.path = path
        self.config = config
        self.writes = writes
        self._lock = claim(path, marker="config.yaml") if writes else None
        if (path / "config.yaml").exists():
            try:
                refuse_other(path / "config.yaml", config)
            except BaseException:
                self.close()
                raise
        if writes:
            self._tidy()

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            self._lock.close()

    def manifest(self, entries: Mapping[str, Any]) -> None:
        """Record what went in. On a resumed run, raises UserError where an input is no longer the same."""
        if not self.writes:
            return
        path = self.path / "manifest.json"
        if not (self.path / "config.yaml").exists():
            # Only now is the directory this run's: inputs that were refused have claimed nothing.
            write_atomically(self.path / "config.yaml", dump_yaml(self.config))
        if path.exists():
            old = read_json(path)
            for key in ("teacher", "specialists", "student", "prompts"):
                if key in entries and old.get(key) != entries[key]:
                    raise UserError(
                        f"{self.path} was begun with another {key}: {old.get(key)}, now {entries[key]}; "
                        "restore it, or give another --out"
                    )
            resumed = [entries["command"]] if "command" in entries else []
            entries = {**old, **entries, "command": old["command"], "resumed": [*old["resumed"], *resumed]}
        else:
            entries = {**entries, "id": uuid.uuid4().hex, "resumed": []}
        write_json(path, entries)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics."""
        self._append("metrics.jsonl", metrics)

    def record_curve(self, point: Mapping[str, Any]) -> None:
        """Append one point of the learning curve; ``global_step`` is its place."""
        self._append("curve.jsonl", point)

    def record_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one of the student's responses; ``global_step`` is its place, as for the learning curve."""
        self._append("samples.jsonl", sample)

    def record_warning(self, warning: Mapping[str, Any]) -> None:
        """Append what a guard found."""
        self._append("warnings.jsonl", warning)

    def curve(self) -> list[dict[str, Any]]:
        """The points of the learning curve so far."""
        path = self.path / "curve.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def keep_steps(self, num_steps: int, *, ended: str | None = None) -> None:
        """Drop what was recorded after the first ``num_steps`` steps: they are done again.

        What is found between the steps (the learning curve's point, the samples) is found again at ``num_steps`` too,
        except that of a stage that has ``ended`` there.
        """
        for name in ("metrics.jsonl", "warnings.jsonl"):
            self._keep(name, lambda entry: entry["global_step"] <= num_steps)
        for name in ("curve.jsonl", "samples.jsonl"):
            self._keep(name, lambda entry: entry["global_step"] < num_steps or entry["stage"] == ended)

    @property
    def num_recorded(self) -> int:
        """Steps in metrics.jsonl, those among them that a resumed run will do again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return max((json.loads(line)["global_step"] for line in lines if _is_whole(line)), default=0)

    def metrics_of(self, stage: str) -> list[dict[str, Any]]:
        """What was recorded of a stage's steps so far."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["stage"] == stage]

    def _append(self, name: str, document: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        path = self.path / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(document, allow_nan=False) + "\n")

    def _keep(self, name: str, wanted: Callable[[Any], bool]) -> None:
        if not self.writes:
            return
        path = self.path / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = list(takewhile(lambda line: _is_whole(line) and wanted(json.loads(line)), lines))
        if len(kept) < len(lines):
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def write_checkpoint(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], export: Callable[[Path], None]
    ) -> Path:
        """Write ``checkpoints/step_N`` whole or not at all.

        ``export`` writes a model that transformers can load; ``tensors`` and ``state`` are what a resume needs.
        """
        from safetensors.torch import save_file

        def write(folder: Path) -> None:
            export(folder)
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, folder / "training.safetensors")
            write_json(folder / "state.json", {**state, "global_step": step})

        target = self.path / "checkpoints" / f"step_{step}"
        self.write_folder(target, write)
        if self.writes:
            self._prune()
        return target

    def write_folder(self, target: Path, write: Callable[[Path], None]) -> None:
        """``write_folder``."""
        if self.writes:
            write_folder(target, write)

    def last_checkpoint(self) -> tuple[dict[str, Any], Path] | None:
        """State and folder of the newest checkpoint, if there is one."""
        found = self._checkpoints()
        return (read_json(found[-1] / "state.json"), found[-1]) if found else None

    def stage_end(self, stage: str) -> Path:
        """Folder of the checkpoint at the end of a stage that is finished."""
        states = ((folder, read_json(folder / "state.json")) for folder in self._checkpoints())
        return next(folder for folder, state in states if state["stage_end"] and state["stage_name"] == stage)

    def _checkpoints(self) -> list[Path]:
        folders = (self.path / "checkpoints").glob("step_*/state.json")
        return sorted((state.parent for state in folders), key=lambda folder: int(folder.name.removeprefix("step_")))

    def _tidy(self) -> None:
        """Do what a process that was killed did not come to among the checkpoints."""
        folder = self.path / "checkpoints"
        with writing(folder):
            for left in folder.glob(".step_*"):
                if left.name.endswith(_OLDER):
                    _settle(left)
                else:
                    shutil.rmtree(left)

    def _prune(self) -> None:
        for folder in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            if not read_json(folder / "state.json").get("stage_end"):
                # Under this name a half of it is nobody's checkpoint.
                shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.gone")))


def _is_whole(line: str) -> bool:
    """A process that was killed while it appended leaves a part of a line; nothing stands behind it."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file below a prefix, each read when it is asked for."""

    def __init__(self, file: Path, prefix: str) -> None:
        from safetensors import safe_open

        self._open = safe_open(file, framework="pt", device="cpu")
        self._prefix = prefix
        self._names = [key.removeprefix(prefix) for key in self._open.keys() if key.startswith(prefix)]  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open.get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _write_or_oserror(write: Callable[[Path], None], folder: Path) -> None:
    """safetensors reports a full disk as its own error; it is the file system's."""
    from safetensors import SafetensorError

    try:
        write(folder)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error)) from error


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
