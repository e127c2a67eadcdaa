"""The one door to the network: requests to a model's servers, retried, bounded and spread over replicas.

Asynchronous inside (an event loop in a thread of its own), plain functions outside. A request is idempotent: whatever
it asks for is decided by its content, so one whose answer was lost is simply sent again. What an answer says is checked
by whoever asked; an answer that is wrong is never asked for again.

A request goes to the replica that is expected to answer it first. A replica that shows no sign of life while it has
work (see ``distill.vllm.pulse``) is taken to have hung: what it had is asked for elsewhere, or from it when it is back.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import httpx

from distill import interrupt
from distill.errors import DistillError, StoppedError, UserError
from distill.progress import say
from distill.vllm import pulse
from distill.vllm.address import checked_url
from distill.vllm.refusal import complaint, refusal
from distill.vllm.replica import Replica
from distill.vllm.served import ServedModel

PATIENCE_SECONDS = 600.0
"""How long a server that does not answer is waited for."""
SLOWEST_TOKENS_PER_SECOND = 5.0
"""A request is given up and sent again when it took longer than it would at this speed, and ``STALL_SECONDS``; not
while the server says that it is at work: the speed is that of one request, and many may share a slow server."""
MAX_SERVER_ERRORS = 5
"""Answers with a server error (5xx) after which a request is given up: the server is there and cannot do it."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_AVOID_SECONDS = 5.0  # a server that failed is asked again only when all others are worse off
_BUSY = (429, 502, 503, 504)  # it, or what stands before it, says that it will be there later
_POLL_SECONDS = 0.1
_TELL_AFTER_SECONDS, _TELL_EVERY_SECONDS = 5.0, 60.0  # one line for all requests that wait for the same server

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Job(Generic[J]):
    """Something to ask for, and its share of what may be under way at once."""

    item: J
    cost: int


class Client:
    """Asks one or several replicas of a server.

    ``whose`` is the model's role in the run, for messages. ``width`` bounds the summed cost of the jobs under way, over
    all replicas. ``before`` is called before any work and
    returns when there is a server to ask. ``check`` is called all the time while answers are waited for and may raise:
    a supervisor's way to say that the server will not come back.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        width: int,
        api_key: str | None = None,
        whose: str = "teacher",
        patience: float = PATIENCE_SECONDS,
        before: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if not urls:
            raise UserError("a client of servers needs at least one URL")
        self.replicas = [Replica(checked_url(url), api_key=api_key) for url in urls]
        self.whose, self.patience, self.before, self.check = whose, patience, before, check
        self._width = width
        self._free = width
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm client", daemon=True)
        self._thread.start()
        self._changed = asyncio.Condition()
        self._chosen: str | None = None

    @contextmanager
    def only(self, url: str) -> Iterator[None]:
        """Within the block the replica at ``url`` alone is asked."""
        self._chosen = url
        try:
            yield
        finally:
            self._chosen = None

    def close(self) -> None:
        """End what is under way and let the connections go."""

        async def close() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for replica in self.replicas:
                await replica.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job[J], ask: Callable[[J], Awaitable[R]]) -> Future[R]:
        """Begin on ``job`` in the background, as soon as there is room for it: what ``ask`` makes of its item.

        ``ask`` runs in the client's loop and calls ``post``. A future that is cancelled ends its request.
        """
        self.before()
        return self.follow_up(job, ask)

    def follow_up(self, job: Job[J], ask: Callable[[J], Awaitable[R]]) -> Future[R]:
        """As ``submit``, where a server has just answered: from the client's own thread too, it waits for nothing."""

        async def one() -> R:
            async with self._room(job.cost):
                return await ask(job.item)

        return asyncio.run_coroutine_threadsafe(one(), self._loop)

    def each(self, jobs: Sequence[Job[J]], ask: Callable[[J], Awaitable[R]]) -> Iterator[tuple[J, R]]:
        """Every job's item with what ``ask`` makes of it, in the order in which they are done; see ``collect``."""
        return self.collect([(job.item, self.submit(job, ask)) for job in jobs])

    def collect(self, under_way: Sequence[tuple[J, Future[R]]]) -> Iterator[tuple[J, R]]:
        """What was submitted, in the order in which it is done. Raises what a job raises, and then ends the others."""
        done: queue.SimpleQueue[tuple[J, Future[R]]] = queue.SimpleQueue()
        try:
            for item, future in under_way:
                future.add_done_callback(lambda future, item=item: done.put((item, future)))  # type: ignore[misc]
            for _ in under_way:
                item, future = self._next(done)
                yield item, future.result()
        finally:
            for _, future in under_way:
                future.cancel()

    def _next(self, done: queue.SimpleQueue[tuple[J, Future[R]]]) -> tuple[J, Future[R]]:
        while True:
            interrupt.check()
            self.check()
            try:
                return done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

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
        load: int,
        is_broken_off: Callable[[httpx.Response], bool] = lambda answer: False,
    ) -> tuple[str, httpx.Response]:
        """The answer (status 200) to ``body``, and the URL that gave it.

        ``load`` is the number of tokens that the server may have to read and write for it: replicas share the work by
        it, and it bounds how long an answer may take. ``is_broken_off`` recognises an answer that a server gave because
        it was being ended. Connections that are lost, time-outs, servers that have hung and server errors are tried
        again, with growing pauses and on another replica where there is one.

        Raises StoppedError (exit code 75) where none answered for ``patience`` seconds, DistillError for a request
        that is refused or that the server keeps failing on.
        """
        pause, num_errors = _FIRST_PAUSE, 0
        trouble_since: float | None = None
        while True:
            replica = self._choose(load)
            try:
                # Without a pause after the choice: the next one has to see this one's load.
                with replica.working(load):
                    answer = await self._send(replica, path, body, load=load)
            except httpx.TransportError as error:
                trouble, is_gone = f"{type(error).__name__} {error}".strip(), True
            else:
                if answer.status_code == 200 and not is_broken_off(answer):
                    return replica.url, answer
                if answer.status_code == 200:
                    trouble, is_gone = "it broke off its answer", True
                else:
                    trouble, is_gone = complaint(answer), answer.status_code in _BUSY
                if not is_gone and answer.status_code < 500:
                    raise refusal(replica.url + path, answer.status_code, trouble)
            replica.avoid_until = time.monotonic() + _AVOID_SECONDS
            num_errors += not is_gone
            if num_errors >= MAX_SERVER_ERRORS:
                raise DistillError(
                    f"the {self.whose}'s server {replica.url} failed {num_errors} times on the same request "
                    f"({trouble}); its log says why"
                )
            trouble_since = trouble_since or time.monotonic()
            self._complain(replica, trouble, waited=time.monotonic() - trouble_since)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _choose(self, load: int) -> Replica:
        """The replica that should answer first. A little worse is one that failed lately, much worse one that hung."""
        now = time.monotonic()
        best = min((r.seconds_per_load for r in self.replicas if r.seconds_per_load is not None), default=1.0)
        return min(
            (one for one in self.replicas if self._chosen in (None, one.url)),
            key=lambda one: (one.has_hung, one.avoid_until > now, one.expected_seconds(load, best=best, now=now)),
        )

    def _complain(self, replica: Replica, trouble: str, *, waited: float) -> None:
        """Say that a server does not answer, now and then; raise StoppedError where it took too long."""
        if waited > self.patience:
            raise StoppedError(
                f"the {self.whose}'s server {replica.url} has not answered for {waited:.0f} s ({trouble}); "
                f"start it again, then give the same command",
                exit_code=75,
            )
        now = time.monotonic()
        if waited > _TELL_AFTER_SECONDS and now - replica.told_at > _TELL_EVERY_SECONDS:
            replica.told_at = now
            say(f"the {self.whose}'s server {replica.url} does not answer ({trouble}); waiting for it")

    async def _send(self, replica: Replica, path: str, body: Mapping[str, Any], *, load: int) -> httpx.Response:
        """One try. Raises httpx.TransportError also where the replica has hung or takes far too long."""
        if replica.has_hung and not await replica.has_come_back():
            raise httpx.ReadTimeout("it has hung")
        model = await self._model(replica)
        deadline = pulse.STALL_SECONDS + load / SLOWEST_TOKENS_PER_SECOND
        with replica.lane() as http:
            began = time.monotonic()
            request = asyncio.ensure_future(http.post(replica.url + path, json={"model": model, **body}))
            replica.requests.add(request)
            try:
                wait = deadline
                while not (await asyncio.wait([request], timeout=wait))[0]:
                    if not replica.pulse.is_busy:
                        raise httpx.ReadTimeout(f"no answer within {time.monotonic() - began:.0f} s")
                    wait = pulse.PROBE_SECONDS
                answer = request.result()
            except asyncio.CancelledError:
                # The replica's watch ends the requests of one that has hung; else it is this task that is to end.
                if replica.has_hung and not _is_being_cancelled():
                    raise httpx.ReadTimeout(f"no sign of life for {replica.pulse.silence:.0f} s") from None
                raise
            finally:
                request.cancel()
                replica.requests.discard(request)
            if answer.is_success:
                replica.answered(load, seconds=time.monotonic() - began)
            return answer

    async def _model(self, replica: Replica) -> str:
        """The name under which the replica serves its model."""
        if replica.model is None:
            answer = await replica.get("/v1/models")
            if answer.status_code in _BUSY:
                raise httpx.ConnectError(f"status {answer.status_code}")
            served = ServedModel.of(answer, replica.url)
            replica.model, replica.longest = served.name, served.context
        return replica.model


def ask(client: Client, path: str, body: Mapping[str, Any]) -> Any:
    """The answer to one request, where it is JSON; None where it says nothing but that it was done."""

    async def one(path: str) -> Any:
        _, answer = await client.post(path, body, load=1)
        return answer.json() if "json" in answer.headers.get("content-type", "") else None

    ((_, said),) = client.each([Job(path, 1)], one)
    return said


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
