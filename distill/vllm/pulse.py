"""Whether a server still works on what it was given, and not only accepts connections.

vLLM's ``/health`` says that no engine process has died: a server whose engine is stuck, or stopped, stays well for
ever. What its engine does shows in ``/metrics``, where every pass over the model changes a number. So the signs of life
are: an answer to a request, and numbers of the engine that are no longer what they were.
"""

from __future__ import annotations

import time

PROBE_SECONDS = 10.0
"""Time between two looks at a server."""
STALL_SECONDS = 180.0
"""A server with work and without a sign of life for so long has hung: one pass over the model is shorter."""

UNSEEN_SECONDS = 30.0
"""More time than a look at a server that does not answer takes."""


class Pulse:
    """The signs of life of one server that has work."""

    def __init__(self) -> None:
        self._engine: str | None = None
        self._last_sign = self._last_look = time.monotonic()

    def beat(self) -> None:
        """Something came that only a working server gives; also called where the waiting begins."""
        self._last_sign = self._last_look = time.monotonic()

    def note(self, metrics: str | None) -> None:
        """Take in a reading of ``/metrics``, None where there was none.

        A server that answers without a word about its engine gets the benefit of the doubt. So does every server after
        a time in which nobody looked: this process may have been stopped, and the server with it.
        """
        now = time.monotonic()
        if now - self._last_look > 3 * PROBE_SECONDS + UNSEEN_SECONDS:
            self.beat()
        self._last_look = now
        if metrics is None:
            return
        engine = _engine_lines(metrics)
        if not engine or engine != self._engine:
            self.beat()
        self._engine = engine

    @property
    def silence(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self._last_sign

    @property
    def is_idle(self) -> bool:
        """Whether the engine had nothing to do when it last said so."""
        requests = self._requests()
        return bool(requests) and not any(requests)

    @property
    def is_busy(self) -> bool:
        """Whether the engine had something to do when it last said so."""
        return any(self._requests())

    def _requests(self) -> list[float]:
        """Those that the engine works on and those that wait for it, as it last said."""
        return [
            float(line.rpartition(" ")[2])
            for line in (self._engine or "").splitlines()
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
        ]


def _engine_lines(metrics: str) -> str:
    return "\n".join(line for line in metrics.splitlines() if line.startswith("vllm:") and "_created" not in line)
