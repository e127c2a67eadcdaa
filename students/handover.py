"""Folders through which a server that runs beside the trainer gets weights: private, in memory, gone when it read them.

``TMPDIR``, where it is set, says where; else they are in /dev/shm, where the machine has that. Memory may be small (a
container has 64 MB of it unless told otherwise), and nothing goes elsewhere by itself: a folder on a disk is slower,
and is for the user to name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from distill.errors import DistillError

_MEMORY = Path("/dev/shm")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this process's user alone. Raises DistillError where none can be made."""
    parent = Path(os.environ.get("TMPDIR") or (_MEMORY if _MEMORY.is_dir() else tempfile.gettempdir()))
    with ExitStack() as stack:
        with _writing(parent):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distill-", dir=parent))
        yield Path(folder)


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
