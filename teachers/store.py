"""The teacher-response store: what a teacher once answered is never generated again.

    ROOT/<collection>/meta.json           what its responses have in common: teacher, template, tokenizer, sampling
    ROOT/<collection>/part-<uuid>.parquet shards; a shard is written whole and never changed

The store may be shared by runs, students and processes, and a response that one run has trained on is never exchanged
for another's; ``teachers.collection`` says how. Left out on purpose: deleting and editing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.cache import cache_home
from distill.errors import DistillError, UserError
from distill.types import Request, Rollout, Sampling, content_hash
from teachers.collection import VARIABLE, Collection, Kept, outside_world

LOADED_AS = "+"
"""Between a revision and what makes its weights another model when they are loaded: number type, quantisation."""


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """What decides a teacher's responses besides the request: its weights, its chat template, its tokenizer.

    ``name`` is for readers and takes no part in keys.
    """

    revision: str
    template_hash: str
    tokenizer_hash: str
    name: str = "teacher"


def default_root() -> Path:
    """The folder that DISTILL_STORE names, else ``responses`` under the user's cache."""
    chosen = os.environ.get(VARIABLE)
    return Path(os.path.expanduser(chosen)) if chosen else cache_home() / "responses"


def root_of(chosen: str | None) -> Path:
    """The folder of the store that a run's setting ``store`` means."""
    return Path(os.path.expanduser(chosen)) if chosen else default_root()


def response_key(teacher: TeacherIdentity, request: Request) -> str:
    """Hash of everything that decides the response; equal on every machine."""
    return content_hash(
        {
            "teacher": teacher.revision,
            "template": teacher.template_hash,
            "tokenizer": teacher.tokenizer_hash,
            "prompt": request.prompt.id,
            # Decided by the four above as long as rendering is what it was; a change of it must not find old responses.
            "prompt_ids": request.prompt_ids,
            "mode": request.mode,
            "switch": request.switch,
            "sampling": asdict(request.sampling),
            "seed": request.seed,
        }
    )


class ResponseStore:
    """Responses by key, in parquet files that other tools can read.

    Raises DistillError that names the file where the disk refuses; what is stored already stays safe then.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._collections: dict[str, Collection] = {}

    def get(self, teacher: TeacherIdentity, requests: Sequence[Request]) -> dict[str, Kept]:
        """What is stored of ``requests``, by key. Every response is checked against its hash."""
        found: dict[str, Kept] = {}
        for collection, wanted in self._by_collection(teacher, requests):
            found |= collection.read(wanted, teacher.name)
        return found

    def put(self, teacher: TeacherIdentity, rollouts: Sequence[Rollout], *, run: str = "") -> int:
        """Store what is new of ``rollouts``, durably; the first response of a key stays. Returns how many were new."""
        by_key = {response_key(teacher, rollout.request): rollout for rollout in reversed(rollouts)}
        num_new = 0
        requests = [rollout.request for rollout in rollouts]
        for collection, wanted in self._by_collection(teacher, requests, makes=True):
            num_new += collection.add({key: by_key[key] for key in wanted}, teacher.name, run)
        return num_new

    def compact(self) -> int:
        """Join the small shards of every collection in use. Returns how many shards were joined."""
        return sum(collection.compact() for collection in self._collections.values())

    def collections(self) -> list[Collection]:
        """Every collection, by folder name."""
        found = []
        for meta in sorted(self.root.glob("*/meta.json")):
            with outside_world(meta):
                try:
                    found.append(Collection(meta.parent, _described(json.loads(meta.read_text(encoding="utf-8")))))
                except ValueError as error:
                    raise DistillError(
                        f"{meta} is damaged ({error}); remove it, and the next run that uses the collection writes it"
                    ) from None
        return found

    def _by_collection(
        self, teacher: TeacherIdentity, requests: Iterable[Request], *, makes: bool = False
    ) -> Iterator[tuple[Collection, dict[str, Request]]]:
        groups: dict[Sampling, dict[str, Request]] = defaultdict(dict)
        for request in requests:
            groups[request.sampling][response_key(teacher, request)] = request
        for sampling, wanted in groups.items():
            yield self._collection(teacher, sampling, makes=makes), wanted

    def _collection(self, teacher: TeacherIdentity, sampling: Sampling, *, makes: bool) -> Collection:
        """``makes`` its folder where there is none yet."""
        shared = {
            "revision": teacher.revision,
            "template_hash": teacher.template_hash,
            "tokenizer_hash": teacher.tokenizer_hash,
            "sampling": asdict(sampling),
        }
        identity = content_hash(shared)[:16]
        known = self._collections.get(identity)
        if known is None or not known.folder.is_dir():
            # Whoever writes first names the folder; another run may call the same teacher by another name.
            folder = self._made(identity, teacher.name) if makes else self._folder(identity, teacher.name)
            if known is None or known.folder != folder:
                known = Collection(folder, {"teacher": teacher.name, **shared})
            self._collections[identity] = known
        return known

    def _folder(self, identity: str, name: str) -> Path:
        """Where the collection is, or will be if nobody makes it under another name before."""
        there = sorted(self.root.glob(f"*{identity}")) if self.root.is_dir() else []
        readable = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)[-40:]
        return there[0] if there else self.root / f"{readable.strip('.-') or 'teacher'}-{identity}"

    def _made(self, identity: str, name: str) -> Path:
        with outside_world(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                folder = self._folder(identity, name)
                folder.mkdir(exist_ok=True)
        return folder


def _described(meta: Any) -> dict[str, Any]:
    """``meta`` if it is what a collection's file says. Raises ValueError where it is not."""
    needed = {"teacher", "revision", "template_hash", "tokenizer_hash", "sampling"}
    missing = sorted(needed - (meta.keys() if isinstance(meta, dict) else set()))
    if missing:
        raise ValueError(f"it does not say {', '.join(missing)}")
    return dict(meta)


def made_store(chosen: str | None) -> ResponseStore:
    """The store that a run's setting ``store`` means; that it can be had is known before a response is paid for."""
    root = root_of(chosen)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the response store {root} cannot be made: {error.strerror}; name a folder with --store or DISTILL_STORE"
        ) from None
    return ResponseStore(root)
