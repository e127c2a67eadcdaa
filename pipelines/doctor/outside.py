"""What is outside this machine: the hub, and the time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from pipelines.doctor.finding import Finding

SECONDS = 5.0
"""How long the hub is waited for."""
OFF_SECONDS = 60.0
"""How far the clock may be from the hub's. Further off, certificates and tokens are refused sooner or later."""
WATCHED_SECONDS = 0.2
JUMP_SECONDS = 0.5
"""How far wall and monotonic clock may part while they are watched; a busy machine takes its time between two looks."""

_SET_CLOCK = "set the clock and keep it set: timedatectl set-ntp true"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hub said, and the wall clock's seconds when it did."""

    status: int
    date: str | None
    at: float


def look_outside() -> Sequence[Finding]:
    if _is_offline():
        text = "not asked: HF_HUB_OFFLINE is set, so only what is in its cache is used"
        return [Finding("hub", "ok", text), steady_clock()]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer = _ask(endpoint)
    return [_hub(endpoint, answer), *_clock(endpoint, answer), steady_clock()]


def _is_offline() -> bool:
    """As huggingface_hub reads it."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _ask(endpoint: str) -> Answer | str:
    """The hub's answer, or why there is none."""
    try:
        response = httpx.head(endpoint, timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return Answer(response.status_code, response.headers.get("date"), time.time())


def _hub(endpoint: str, answer: Answer | str) -> Finding:
    if isinstance(answer, Answer) and answer.status < 500:
        return Finding("hub", "ok", f"{endpoint} answers")
    why = answer if isinstance(answer, str) else f"it answers with {answer.status}"
    cure = (
        "real models and data sets come from there: check the connection and HTTPS_PROXY, name a mirror with "
        "HF_ENDPOINT, or work with folders and HF_HUB_OFFLINE=1; the embedded models need no hub"
    )
    return Finding("hub", "warning", f"{endpoint} cannot be reached: {why}", cure=cure)


def _clock(endpoint: str, answer: Answer | str) -> Sequence[Finding]:
    """This machine's clock against the one in the answer, if there is one."""
    if isinstance(answer, str) or answer.date is None:
        return []
    off = answer.at - parsedate_to_datetime(answer.date).timestamp()
    if abs(off) > OFF_SECONDS:
        text = f"{abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} {endpoint}"
        return [Finding("clock", "failed", text, cure=_SET_CLOCK)]
    return [Finding("clock", "ok", f"within {OFF_SECONDS:.0f} s of {endpoint}")]


def steady_clock() -> Finding:
    """Whether the wall clock runs as the monotonic one does: one that is being set jumps."""
    wall, monotonic = time.time(), time.monotonic()
    time.sleep(WATCHED_SECONDS)
    apart = (time.time() - wall) - (time.monotonic() - monotonic)
    if abs(apart) > JUMP_SECONDS:
        text = f"the wall clock moved by {apart:+.2f} s against the monotonic one within {WATCHED_SECONDS} s"
        return Finding("steady clock", "warning", text, cure=f"what is due at a time may be missed; {_SET_CLOCK}")
    return Finding("steady clock", "ok", "wall and monotonic clock run alike")
