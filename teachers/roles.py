"""What a server that somebody else runs can do: it is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx

from distill import interrupt
from distill.errors import StoppedError, UserError
from distill.progress import say
from distill.vllm.address import checked_url, is_loopback
from distill.vllm.client import PATIENCE_SECONDS
from distill.vllm.launch import Role

_ROUTES: Mapping[Role, str] = {"score": "/pooling", "generate": "/v1/completions"}
_PAUSE_SECONDS = 2.0
_ANSWER_SECONDS = 10.0
_GLANCE_SECONDS = 2.0
"""What a server gets that is asked once."""


def find_role(url: str, *, api_key: str | None = None, patience: float | None = None) -> Role:
    """The role of the server at ``url``: a vLLM server has one route or the other.

    Raises UserError for a server that has neither or that refuses the key, StoppedError (exit code 75) for one that
    does not answer for ``patience`` seconds.
    """
    patience = PATIENCE_SECONDS if patience is None else patience
    started, has_told = time.monotonic(), False
    while True:
        try:
            return _ask(checked_url(url), api_key, _ANSWER_SECONDS)
        except httpx.TransportError as error:
            trouble = _said(error)
        interrupt.check()
        waited = time.monotonic() - started
        if waited > patience:
            raise StoppedError(
                f"the teacher's server {url} has not answered for {waited:.0f} s ({trouble}); start it, then give the "
                f"same command",
                exit_code=75,
            )
        if not has_told:
            has_told = True
            say(f"the teacher's server {url} does not answer ({trouble}); waiting for it")
        time.sleep(min(_PAUSE_SECONDS, patience))


def glance(url: str, *, api_key: str | None = None) -> tuple[Role | None, str]:
    """The role of the server at ``url``, asked once; None, with what is the matter, where it does not answer soon.

    Raises UserError as ``find_role`` does.
    """
    try:
        return _ask(checked_url(url), api_key, _GLANCE_SECONDS), ""
    except httpx.TransportError as error:
        return None, _said(error)


def _said(error: httpx.TransportError) -> str:
    return f"{type(error).__name__} {error}".strip()


def _ask(url: str, api_key: str | None, timeout: float) -> Role:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    found = []
    with httpx.Client(headers=headers, timeout=timeout, trust_env=not is_loopback(url)) as http:
        for role, route in _ROUTES.items():
            # A route that is there for POST answers 405 to GET; one that is not there 404.
            status = http.get(url + route).status_code
            if status in (401, 403):
                raise UserError(f"{url} refuses the API key; set DISTILL_TEACHER_API_KEY to the server's")
            if status in (502, 503, 504):
                raise httpx.ConnectError(f"status {status}")
            if status == 405:
                return role
            found.append(f"{route}: status {status}")
    raise UserError(
        f"{url} neither scores nor generates ({', '.join(found)}); it has to be a vLLM server: `distill teacher serve "
        f"--role score` or `--role generate`"
    )
