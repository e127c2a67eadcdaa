"""The one door to the network: requests to a teacher's servers, retried, bounded and spread over replicas.

Asynchronous inside (an event loop in a thread of its own), plain functions outside. A request is idempotent: whatever
it asks for is decided by its content, so one whose answer was lost is simply sent again. What an answer says is checked
by whoever asked; an answer that is wrong is never asked for again.
"""

from __future__ import annotations

import asyncio
import math
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import httpx

from distill import interrupt
from distill.errors import DistillError, StoppedError, UserError
from distill.progress import say

PATIENCE_SECONDS = 600.0
"""How long a server that does not answer is waited for."""
REQUEST_SECONDS = 3600.0
"""Longest wait for one answer; a long response of a busy teacher takes many minutes."""
MAX_SERVER_ERRORS = 5
"""Answers with a server error (5xx) after which a request is given up: the server is there and cannot do it."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_AVOID_SECONDS = 5.0  # a server that failed is asked again only when all others are worse off
_BUSY = (429, 502, 503, 504)  # it, or what stands before it, says that it will be there later
_POLL_SECONDS = 0.1
_TELL_AFTER_SECONDS, _TELL_EVERY_SECONDS = 5.0, 60.0  # one line for all requests that wait for the same server

J = TypeVar("J")
R = TypeVar("R")


@dataclass
class Endpoint:
    """One replica; ``load`` is the cost of what it is working on."""

    url: str
    model: str | None = None
    load: float = 0.0
    avoid_until: float = 0.0
    told_at: float = -math.inf


@dataclass(frozen=True, slots=True)
class Job(Generic[J]):
    """Something to ask for, and its share of what may be under way at once."""

    item: J
    cost: int


class Client:
    """Asks one or several replicas of a server.

    ``width`` bounds the summed cost of the jobs under way, over all replicas. ``before`` is called before any work and
    returns when there is a server to ask. ``check`` is called all the time while answers are waited for and may raise:
    a supervisor's way to say that the server will not come back.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        width: int,
        api_key: str | None = None,
        patience: float = PATIENCE_SECONDS,
        before: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if not urls:
            raise UserError("a teacher client needs at least one URL")
        self.endpoints = [Endpoint(_checked_url(url)) for url in urls]
        self.patience, self.before, self.check = patience, before, check
        self._width = width
        self._free = width
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher client", daemon=True)
        self._thread.start()
        self._changed = asyncio.Condition()
        self._http = httpx.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            # A proxy that the environment names is for the world outside.
            trust_env=not all(_is_loopback(endpoint.url) for endpoint in self.endpoints),
        )

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def each(self, jobs: Sequence[Job[J]], ask: Callable[[J], Awaitable[R]]) -> Iterator[tuple[J, R]]:
        """Every job's item with what ``ask`` makes of it, in the order in which they are done.

        ``ask`` runs in the client's loop and calls ``post``. Raises what it raises; the other jobs are then cancelled.
        """
        if not jobs:
            return
        self.before()
        done: queue.SimpleQueue[tuple[J, R] | None] = queue.SimpleQueue()

        async def one(job: Job[J]) -> None:
            async with self._room(job.cost):
                done.put((job.item, await ask(job.item)))

        async def everything() -> None:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(one(job))

        future = asyncio.run_coroutine_threadsafe(everything(), self._loop)
        future.add_done_callback(lambda _: done.put(None))
        try:
            while True:
                interrupt.check()
                self.check()
                try:
                    pair = done.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if pair is None:
                    break
                yield pair
            try:
                future.result()
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
        finally:
            future.cancel()

    @asynccontextmanager
    async def _room(self, cost: int) -> AsyncIterator[None]:
        """Waits until the cost fits; one that never would fit goes alone."""
        cost = min(cost, self._width)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= cost)
            self._free -= cost
        try:
            yield
        finally:
            # No await before the number is right again: this also runs while the task is being cancelled.
            self._free += cost
            async with self._changed:
                self._changed.notify_all()

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        load: float,
        is_broken_off: Callable[[httpx.Response], bool] = lambda answer: False,
    ) -> tuple[str, httpx.Response]:
        """The answer (status 200) to ``body``, and the URL that gave it.

        ``load`` is the work that the request means, for sharing work between replicas. ``is_broken_off`` recognises an
        answer that a server gave because it was being ended. Connections that are lost, time-outs and server errors are
        tried again, with growing pauses and on another replica where there is one.

        Raises StoppedError (exit code 75) where none answered for ``patience`` seconds, DistillError for a request
        that is refused or that the server keeps failing on.
        """
        pause, num_errors = _FIRST_PAUSE, 0
        trouble_since: float | None = None
        while True:
            endpoint = min(self.endpoints, key=lambda one: (one.avoid_until > time.monotonic(), one.load))
            endpoint.load += load
            try:
                model = await self._model(endpoint)
                answer = await self._http.post(endpoint.url + path, json={"model": model, **body})
            except httpx.TransportError as error:
                trouble, is_gone = f"{type(error).__name__} {error}".strip(), True
            else:
                if answer.status_code == 200 and not is_broken_off(answer):
                    return endpoint.url, answer
                if answer.status_code == 200:
                    trouble, is_gone = "it broke off its answer", True
                else:
                    trouble, is_gone = _complaint(answer), answer.status_code in _BUSY
                if not is_gone and answer.status_code < 500:
                    raise _refusal(endpoint.url + path, answer.status_code, trouble)
            finally:
                endpoint.load -= load
            endpoint.avoid_until = time.monotonic() + _AVOID_SECONDS
            num_errors += not is_gone
            if num_errors >= MAX_SERVER_ERRORS:
                raise DistillError(
                    f"the teacher's server {endpoint.url} failed {num_errors} times on the same request ({trouble}); "
                    f"its log says why"
                )
            now = time.monotonic()
            trouble_since = trouble_since or now
            waited = now - trouble_since
            if waited > self.patience:
                raise StoppedError(
                    f"the teacher's server {endpoint.url} has not answered for {waited:.0f} s ({trouble}); "
                    f"start it again, then give the same command",
                    exit_code=75,
                )
            if waited > _TELL_AFTER_SECONDS and now - endpoint.told_at > _TELL_EVERY_SECONDS:
                endpoint.told_at = now
                say(f"the teacher's server {endpoint.url} does not answer ({trouble}); waiting for it")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _model(self, endpoint: Endpoint) -> str:
        """The name under which the replica serves its model."""
        if endpoint.model is None:
            answer = await self._http.get(endpoint.url + "/v1/models")
            if answer.status_code in _BUSY:
                raise httpx.ConnectError(f"status {answer.status_code}")
            if answer.status_code != 200:
                raise _refusal(endpoint.url + "/v1/models", answer.status_code, _complaint(answer))
            try:
                endpoint.model = str(answer.json()["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError):
                raise UserError(
                    f"{endpoint.url}/v1/models does not name a model; is this the URL of a vLLM server?"
                ) from None
        return endpoint.model


def is_healthy(url: str) -> bool:
    """Whether a server answers at ``url`` and says that it is well."""
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url!r} is no URL ({error}); write http://HOST:PORT") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{url!r} is no URL of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def _is_loopback(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")


def _complaint(answer: httpx.Response) -> str:
    """What a server says about a request it did not answer."""
    try:
        document = answer.json()
        message = document.get("error", document)
        text = str(message.get("message", message) if isinstance(message, dict) else message)
    except (ValueError, AttributeError):
        text = answer.text
    return f"status {answer.status_code}: {' '.join(text.split())[:300]}"


def _refusal(url: str, status: int, trouble: str) -> DistillError:
    if status in (401, 403):
        return UserError(f"{url} refuses the API key ({trouble}); set DISTILL_TEACHER_API_KEY to the server's")
    if status in (404, 405):
        return UserError(
            f"{url} does not exist ({trouble}); a server has one role: hidden states come from one that was started to "
            f"score, responses from one that was started to generate"
        )
    return DistillError(f"{url} refuses a request ({trouble}); its log says why")
