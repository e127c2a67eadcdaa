"""A stored response as a row of a parquet table: its columns, its hash, and the way there and back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distill.types import Prompt, Request, Rollout, Sampling

COLUMNS = {
    "key": "string",
    "prompt_id": "string",
    "messages": "string",
    "mode": "string",
    "switch": "string",
    "prompt_ids": "list<int32>",
    "response_ids": "list<int32>",
    "forced": "list<bool>",
    "logprobs": "list<float32>",
    "finish_reason": "string",
    "teacher": "string",
    "revision": "string",
    "sampling": "string",
    "seed": "int64",
    "created": "timestamp[us, UTC]",
    "run": "string",
    "content_hash": "string",
}
_RESPONSE_COLUMNS = ("response_ids", "forced", "logprobs", "finish_reason")
READ_COLUMNS = ["key", *_RESPONSE_COLUMNS, "run", "created", "content_hash"]


def table_of(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "list<int32>": pa.list_(pa.int32()),
        "list<bool>": pa.list_(pa.bool_()),
        "list<float32>": pa.list_(pa.float32()),
        "timestamp[us, UTC]": pa.timestamp("us", tz="UTC"),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()]))


def with_plain_times(table: Any) -> Any:
    """The table with ``created`` as a number of microseconds."""
    where = table.schema.get_field_index("created")
    return table.set_column(where, "created", table["created"].cast("int64"))


def row_of(key: str, rollout: Rollout, teacher: str, revision: str, run: str) -> dict[str, Any]:
    request = rollout.request
    row: dict[str, Any] = {
        "key": key,
        "prompt_id": request.prompt.id,
        "messages": json.dumps([dict(message) for message in request.prompt.messages]),
        "mode": request.mode,
        "switch": request.switch,
        "prompt_ids": list(request.prompt_ids),
        "response_ids": list(rollout.response_ids),
        "forced": list(rollout.forced),
        "logprobs": list(rollout.logprobs),
        "finish_reason": rollout.finish_reason,
        "teacher": teacher,
        "revision": revision,
        "sampling": json.dumps(asdict(request.sampling), sort_keys=True),
        "seed": request.seed,
        "created": time.time_ns() // 1000,
        "run": run,
    }
    return {**row, "content_hash": response_hash(row)}


def response_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 over the response's ids (int32), forced flags (a byte each), log-probs (float32) and finish reason."""
    import numpy as np

    digest = hashlib.sha256()
    for name, kind in (("response_ids", "<i4"), ("forced", "u1"), ("logprobs", "<f4")):
        values = np.asarray(row[name], dtype=kind)
        digest.update(f"{len(values)} ".encode())
        digest.update(values.tobytes())
    digest.update(row["finish_reason"].encode())
    return digest.hexdigest()


def request_of(row: Mapping[str, Any]) -> Request:
    """What was asked, as far as it is stored: without the reference answer, which takes no part in a response."""
    return Request(
        prompt=Prompt(tuple(json.loads(row["messages"]))),
        mode=row["mode"],
        switch=row["switch"],
        prompt_ids=tuple(row["prompt_ids"]),
        sampling=Sampling(**json.loads(row["sampling"])),
        seed=row["seed"],
    )


def rollout_of(row: Mapping[str, Any], request: Request, speaker: str) -> Rollout:
    return Rollout(
        request=request,
        response_ids=tuple(row["response_ids"]),
        forced=tuple(row["forced"]),
        logprobs=tuple(row["logprobs"]),
        finish_reason=row["finish_reason"],
        speaker=speaker,
    )
