"""The safetensors files of a model: found whole, and identified by a hash.

Left out on purpose: pickled weights, which are never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.cache import cache_home
from distill.errors import UserError
from distill.progress import say
from distill.types import content_hash

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_REMEMBER_FROM_BYTES = 64 * 1024**2  # below, hashing a file anew takes less than a tenth of a second
_SETTLED_SECONDS = 2.0  # a file changed more recently than this can change again without a new time stamp

_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_ITEM_BITS |= {"I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}


def validate_safetensors(path: Path) -> dict[str, Path]:
    """The file of every tensor of the model in ``path``, once all its files are known to be whole.

    Reads headers only. Raises UserError that names the file: missing, cut off (with the bytes it has and should
    have), damaged, or without a tensor that the index promises.
    """
    if (path / _INDEX).is_file():
        promised = _weight_map(path / _INDEX)
    elif (path / _SINGLE).is_file():
        promised = dict.fromkeys(_header(path / _SINGLE), _SINGLE)
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        raise UserError(
            f"{path} has neither {_SINGLE} nor {_INDEX}"
            + (f" but {pickled[0]}, and pickled weights are never read; " if pickled else "; ")
            + "save the model with transformers' save_pretrained, which writes safetensors"
        )
    held = {name: _header(path / name) for name in sorted(set(promised.values()))}
    for tensor, name in promised.items():
        if tensor not in held[name]:
            raise UserError(
                f"{path / name} does not hold the tensor {tensor}, which {_INDEX} says it does; "
                f"the files belong to different models or versions: copy or download the folder again"
            )
    return {tensor: path / name for tensor, name in promised.items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, str(index.parent)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensors to files; copy or download it again")
    for name in weight_map.values():
        # A name with a folder in it could point out of the model's own folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r} as a file; it names safetensors files beside itself")
    return weight_map


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file's tensors by name, once header and data are known to be as long as the file."""
    again = "copy or download it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            start = 8 + (header_bytes if size >= 8 else 0)
            if size < start and header_bytes <= _MAX_HEADER_BYTES:
                raise UserError(f"{file} is cut off: it has {size} bytes, and its header alone needs {start}; {again}")
            text = stream.read(min(header_bytes, _MAX_HEADER_BYTES))
    except FileNotFoundError:
        raise UserError(f"{file} is missing, and the model's index names it; {again}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((_checked_end(entry) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is no safetensors file: its header cannot be read; {again}") from None
    if size != start + end:
        what = "is cut off" if size < start + end else "is too long"
        raise UserError(f"{file} {what}: it has {size} bytes and should have {start + end}; {again}")
    return tensors


def _checked_end(entry: Mapping[str, Any]) -> int:
    """Where a tensor's data end. Raises ValueError for data of another length than its shape and type need."""
    begin, end = entry["data_offsets"]
    item_bits = _ITEM_BITS.get(entry["dtype"])
    is_known = item_bits is not None
    if not 0 <= begin <= end or (is_known and (end - begin) * 8 != item_bits * math.prod(entry["shape"])):
        raise ValueError(entry)
    return int(end)


def fingerprint(config: Mapping[str, Any], weight_files: Mapping[str, Path]) -> str:
    """A hash of a model's configuration and weights, the same wherever the folder lies."""
    files = sorted(set(weight_files.values()))
    # What transformers was called when it saved the model says nothing about the model.
    described = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return content_hash([described, [[file.name, _file_hash(file)] for file in files]])


def _file_hash(file: Path) -> str:
    """SHA-256 of a file; that of a large file is remembered under the user's cache until the file changes."""
    status = file.stat()
    identity = [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = cache_home() / "fingerprints" / content_hash(identity)
    is_large = status.st_size >= _REMEMBER_FROM_BYTES
    if is_large and note.is_file():
        return note.read_text(encoding="ascii")
    if status.st_size >= 16 * _REMEMBER_FROM_BYTES:
        say(f"hashing {file} ({status.st_size / 1e9:.1f} GB) to identify the model; done once for each file")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if is_large and time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
        _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        draft.write_text(digest, encoding="ascii")
        draft.replace(note)
    except OSError:
        # Nothing but time is lost: the file is hashed again the next time.
        return


def read_object(file: Path, if_missing: str) -> dict[str, Any]:
    """The JSON object in ``file``; ``if_missing`` begins the sentence for a file that is not there."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{if_missing}: there is no {file.name} in it; name the folder that holds it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({first_line(error)}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object; copy or download it again")
    return value


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says, or its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
