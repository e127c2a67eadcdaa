"""Folders through which a server that runs beside the trainer gets weights: private, in memory, gone when it read them.

``TMPDIR``, where it is set, says where; else they are in /dev/shm, where the machine has that. Memory may be small (a
container has 64 MB of it unless told otherwise), and nothing goes elsewhere by itself: a folder on a disk is slower,
and is for the user to name. What a process that was killed left in it, the next one to send weights removes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from distill.errors import DistillError

_MEMORY = Path("/dev/shm")
_PREFIX = "distill-in-flight-"
_LEFT_SECONDS = 60.0
"""So old a folder is at least that is taken for one that was left: whoever makes one locks it right away."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this process's user alone. Raises DistillError where none can be made."""
    parent = Path(os.environ.get("TMPDIR") or (_MEMORY if _MEMORY.is_dir() else tempfile.gettempdir()))
    with ExitStack() as stack:
        with _writing(parent):
            _remove_left(parent)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)))
            stack.callback(os.close, _lock(folder))
        yield folder


def _lock(folder: Path) -> int:
    """An open file of ``folder`` that is locked as long as its process lives. Raises OSError where another holds it."""
    held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _remove_left(parent: Path) -> None:
    """Remove the folders of processes that were killed, and could not: the weights of a whole model lie in memory."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _LEFT_SECONDS:
                continue
            held = _lock(folder)
        except OSError:
            continue  # gone meanwhile, or whoever made it is alive: in another container perhaps
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


@contextmanager
def filling(folder: Path, tensors: Iterable[Tensor]) -> Iterator[None]:
    """For the block that writes ``tensors`` into a private folder.

    Raises DistillError, before anything is written, where they do not fit, and for what the file system says of it.
    """
    parent = folder.parent
    with _writing(parent):
        needed, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(parent).free
        if needed > free:
            raise DistillError(
                f"the student's weights on their way to its server take {needed / 1e6:,.1f} MB, and {parent} has "
                f"{free / 1e6:,.1f} MB free; {_way_out(parent)}"
            )
        yield


@contextmanager
def _writing(parent: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DistillError(
            f"the student's weights could not be written to {parent} for its server: {reason}; {_way_out(parent)}"
        ) from error


def _way_out(parent: Path) -> str:
    room = "start the container with a larger --shm-size" if parent == _MEMORY else "make room there"
    return f"{room}, or set the environment variable TMPDIR to a folder with room, and give the same command again"
