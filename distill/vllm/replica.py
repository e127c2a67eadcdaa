"""One server as the client sees it: its connections, what it works on, how fast it is, and whether it lives."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import httpx

from distill.vllm import pulse
from distill.vllm.address import is_loopback
from distill.vllm.pulse import Pulse

LANE_WIDTH = 16
"""Most requests of one connection pool: httpx's pools look at every connection for every request."""
FORGET_SECONDS = 60.0
"""Time in which what was measured of a replica's speed fades to a share of 1/e, so that a slow one is tried again."""
_SMOOTHING = 0.3  # weight of the latest request in the measured speed
_PROBE_TIMEOUT = 5.0


class Replica:
    """A replica, used from the client's event loop alone.

    ``model`` and ``longest`` (the longest sequence it takes) are what it says of itself when it is first asked.
    ``load`` is the number of tokens that it was given and has not answered for.
    """

    def __init__(self, url: str, *, api_key: str | None) -> None:
        self.url = url
        self.model: str | None = None
        self.longest: int | None = None
        self.load = 0
        self.avoid_until = 0.0
        self.told_at = -math.inf
        self.has_hung = False
        self.pulse = Pulse()
        self.requests: set[asyncio.Future[httpx.Response]] = set()
        self.seconds_per_load: float | None = None
        """How long a request takes, for each token of its own load; None before the first answer."""
        self._measured_at = -math.inf
        self._under_way: dict[object, tuple[float, int]] = {}
        self._lanes: list[_Lane] = []
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._watch: asyncio.Task[None] | None = None

    def expected_seconds(self, load: int, *, best: float, now: float) -> float:
        """A figure to compare replicas by: how long a request of ``load`` would take in front of all others.

        The least work under way, weighed by the measured latency (the peak-EWMA rule): work that already waits longer
        than measured counts at once, and old measurements fade towards ``best``, the fastest replica's.
        """
        measured = best
        if self.seconds_per_load is not None:
            fading = math.exp(-(now - self._measured_at) / FORGET_SECONDS)
            measured = best + (self.seconds_per_load - best) * fading
        waiting = max(((now - since) / cost for since, cost in self._under_way.values()), default=0.0)
        return (self.load + load) * max(measured, waiting)

    @contextmanager
    def working(self, load: int) -> Iterator[None]:
        """Within the block the replica works on ``load``, and its life is watched."""
        token, started = object(), time.monotonic()
        if not self._under_way:
            self.pulse.beat()
        self.load += load
        self._under_way[token] = (started, load)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.ensure_future(self._watch_life())
        try:
            yield
        finally:
            self.load -= load
            del self._under_way[token]

    def answered(self, load: int, *, seconds: float) -> None:
        """Note that a request of ``load`` was answered after ``seconds``."""
        self.pulse.beat()
        weight = 1.0 if self.seconds_per_load is None else _SMOOTHING
        self.seconds_per_load = weight * seconds / load + (1 - weight) * (self.seconds_per_load or 0.0)
        self._measured_at = time.monotonic()

    async def _watch_life(self) -> None:
        """As long as there is work: look at the engine now and then, and end the requests of one that has hung."""
        while self._under_way:
            await asyncio.sleep(pulse.PROBE_SECONDS)
            self.pulse.note(await self._metrics())
            if self._under_way and self.pulse.silence > pulse.STALL_SECONDS:
                self.has_hung = True
                for request in list(self.requests):
                    request.cancel()
                return

    async def has_come_back(self) -> bool:
        """Whether a replica that had hung can be asked again: its engine moved, or has nothing to do."""
        silence = self.pulse.silence
        metrics = await self._metrics()
        self.pulse.note(metrics)
        if metrics is not None and (self.pulse.silence < silence or self.pulse.is_idle):
            self.has_hung = False
            self.pulse.beat()
        return not self.has_hung

    async def _metrics(self) -> str | None:
        """What the server says of its engine, None where it does not answer."""
        try:
            async with asyncio.timeout(2 * _PROBE_TIMEOUT):
                answer = await self.get("/metrics")
        except (httpx.TransportError, TimeoutError):
            return None
        return answer.text if answer.is_success else ""

    async def get(self, path: str) -> httpx.Response:
        with self.lane() as http:
            return await http.get(self.url + path, timeout=_PROBE_TIMEOUT)

    @contextmanager
    def lane(self) -> Iterator[httpx.AsyncClient]:
        """A pool of connections in which there is room."""
        lane = next((lane for lane in self._lanes if lane.num_requests < LANE_WIDTH), None)
        if lane is None:
            lane = _Lane(self.url, self._headers)
            self._lanes.append(lane)
        lane.num_requests += 1
        try:
            yield lane.http
        finally:
            lane.num_requests -= 1

    async def close(self) -> None:
        for lane in self._lanes:
            await lane.http.aclose()


class _Lane:
    """A connection pool and the number of requests in it."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.num_requests = 0
        self.http = httpx.AsyncClient(
            headers=headers,
            # How long an answer may take, whoever asks decides; see Client.
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            verify=_trusted(),
            # A proxy that the environment names is for the world outside.
            trust_env=not is_loopback(url),
        )


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates to trust: read once, not for every pool."""
    return httpx.create_ssl_context()
