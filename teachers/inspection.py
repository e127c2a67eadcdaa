"""Looking into the response store: what is there, single responses, statistics; as documents that JSON can hold.

Nothing is changed by looking: a shard that cannot be read is named here, and set aside by the next run that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from distill.checkpoint import tokenizer_in
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.progress import say
from distill.repetition import repetition
from distill.types import MODES, Rollout
from teachers.collection import VARIABLE, Collection, Kept, outside_world
from teachers.store import LOADED_AS, ResponseStore, default_root

Document = dict[str, Any]

PERCENTILES = (10, 50, 90, 99)


def root_to_look_into(named: Path | None) -> Path:
    """The store's folder; nobody may have written to the usual one yet.

    Raises UserError for one that is named and is no folder, and where the usual place is taken by something else.
    """
    root = default_root() if named is None else named
    with outside_world(root):
        if root.is_dir():
            return root
        if named is None and not root.exists():
            say(f"there is no store of responses in {root} yet; distill run makes one")
            return root
        missing = "is no folder" if root.exists() else "is not there"
    raise UserError(f"the store {root} {missing}; name another with --store or {VARIABLE}")


def list_collections(root: Path, name: str = "") -> list[Document]:
    """Each collection whose folder's name contains ``name``: whose responses, how many, how large."""
    return [_listed(collection) for collection in _collections(root, name)]


def _listed(collection: Collection) -> Document:
    broken: list[str] = []
    lengths = [len(kept.rollout.response_ids) for _, kept in collection.walk(broken)]
    return {
        **_described(collection),
        "num_responses": len(lengths),
        "num_tokens": sum(lengths),
        "num_bytes": sum(shard.stat().st_size for shard in collection.shards()),
        "num_shards": len(collection.shards()),
        "broken_shards": [*broken, *collection.set_aside()],
    }


def show_responses(root: Path, *, key: str | None = None, num: int = 3, name: str = "") -> list[Document]:
    """The responses whose key begins with ``key``, all of them; without it the first ``num`` by key.

    ``pieces`` are the response's text in order, each marked as forced or not. They are null, with the reason in
    ``no_text``, where the teacher's tokenizer is not at hand. Raises UserError for a ``key`` that is not there.
    """
    found: dict[str, tuple[Kept, Collection]] = {}
    for collection in _collections(root, name):
        for one, kept in collection.walk([]):
            if one.startswith(key or ""):
                found[one] = (kept, collection)
            if key is None and len(found) > num:
                del found[max(found)]
    if key is not None and not found:
        raise UserError(f"no key in {root} begins with {key!r}; `distill responses show` without one shows some")
    encoders = {collection.folder: _encoder(collection) for _, collection in found.values()}
    return [
        _shown(one, kept, collection, encoders[collection.folder]) for one, (kept, collection) in sorted(found.items())
    ]


def _shown(key: str, kept: Kept, collection: Collection, encoder: Encoder | str) -> Document:
    rollout = kept.rollout
    request = rollout.request
    return {
        "key": key,
        "collection": collection.folder.name,
        "teacher": rollout.speaker,
        "messages": [dict(message) for message in request.prompt.messages],
        "mode": request.mode,
        "switch": request.switch,
        "seed": request.seed,
        "run": kept.run,
        "created": datetime.fromtimestamp(kept.created / 1e6, UTC).isoformat(timespec="seconds"),
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.response_ids),
        "num_forced": sum(rollout.forced),
        "repetition": repetition(rollout.response_ids),
        "mean_logprob": float(np.mean(rollout.logprobs)),
        "response_ids": list(rollout.response_ids),
        "forced": list(rollout.forced),
        "pieces": None if isinstance(encoder, str) else _pieces(rollout, encoder),
        "no_text": encoder if isinstance(encoder, str) else None,
    }


def _pieces(rollout: Rollout, encoder: Encoder) -> list[Document]:
    marked = zip(rollout.response_ids, rollout.forced, strict=True)
    return [
        {"text": encoder.decode([token for token, _ in group]), "forced": forced}
        for forced, group in groupby(marked, key=lambda pair: pair[1])
    ]


def statistics(root: Path, name: str = "") -> list[Document]:
    """Each collection with a document a mode; see ``_Statistics``."""
    found = []
    for collection in _collections(root, name):
        encoder = _encoder(collection)
        broken: list[str] = []
        modes = {mode: _Statistics() for mode in MODES}
        for _, kept in collection.walk(broken):
            modes[kept.rollout.mode].add(kept.rollout, encoder)
        found.append(
            {
                **_described(collection),
                "modes": {mode: figures.document() for mode, figures in modes.items() if figures.lengths},
                "no_closure": encoder if isinstance(encoder, str) else None,
                "broken_shards": [*broken, *collection.set_aside()],
            }
        )
    return found


@dataclass
class _Statistics:
    """Figures of the responses in one mode. ``closed`` stays empty where the ids of the thinking tags are not known."""

    prompts: set[str] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    repetitions: list[float] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    def add(self, rollout: Rollout, encoder: Encoder | str) -> None:
        self.prompts.add(rollout.request.prompt.id)
        self.lengths.append(len(rollout.response_ids))
        self.repetitions.append(repetition(rollout.response_ids))
        self.truncated.append(rollout.finish_reason == "length")
        self.forced.append(any(rollout.forced))
        if not isinstance(encoder, str):
            self.closed.append(encoder.closed_thinking(rollout))

    def document(self) -> Document:
        """Lengths in tokens; shares of responses; repetition as the share of repeated 4-grams in a response."""
        return {
            "num_responses": len(self.lengths),
            "num_prompts": len(self.prompts),
            "length": _spread(self.lengths),
            "truncation": float(np.mean(self.truncated)),
            "closure": float(np.mean(self.closed)) if self.closed else None,
            "forced": float(np.mean(self.forced)),
            "repetition": _spread(self.repetitions),
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    percentiles = np.percentile(values, PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"p{rank}": float(value) for rank, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": float(max(values)),
    }


def _described(collection: Collection) -> Document:
    names = ("teacher", "revision", "template_hash", "tokenizer_hash", "sampling")
    return {"collection": collection.folder.name, **{name: collection.meta[name] for name in names}}


def _collections(root: Path, name: str) -> list[Collection]:
    """Raises UserError where ``name`` is given and no collection's folder has it in its name."""
    there = ResponseStore(root).collections()
    chosen = [collection for collection in there if name in collection.folder.name]
    if name and not chosen:
        known = ", ".join(collection.folder.name for collection in there) or "none"
        raise UserError(f"no collection in {root} has {name!r} in its name; there: {known}")
    return chosen


def _encoder(collection: Collection) -> Encoder | str:
    """The teacher's tokenizer if it is on this machine and is the one that the responses were made with, else why not.

    Nothing is downloaded: whoever wants to look at a response has not asked for a model.
    """
    teacher = collection.meta["teacher"]
    try:
        revision = collection.meta["revision"].partition(LOADED_AS)[0]
        source = resolve(teacher, role="teacher", revision=revision)
        path = _in_cache(source.location, source.revision) if source.kind == "hub" else Path(source.location)
        encoder = Encoder(tokenizer_in(path))
    except UserError as error:
        return f"the tokenizer of {teacher} is not at hand: {error}"
    if encoder.vocabulary_hash != collection.meta["tokenizer_hash"]:
        return f"the tokenizer of {teacher} is no longer the one that these responses were made with"
    return encoder


def _in_cache(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise UserError(f"{hub_id} at revision {revision} is not in the hub's cache") from None
