"""The URL of a server."""

from __future__ import annotations

import httpx

from distill.errors import UserError


def checked_url(url: str) -> str:
    """``url`` without the slash or the /v1 that it may end in. Raises UserError where it is none."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url!r} is no URL ({error}); write http://HOST:PORT") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{url!r} is no URL of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
