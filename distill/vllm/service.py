"""A vLLM server of our own, as a process: started, supervised, and ended with everything it started."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from distill import interrupt
from distill.errors import DistillError, GoneError, UserError
from distill.progress import PLAIN_SECONDS, say
from distill.vllm import watch
from distill.vllm.launch import Launch, Role
from distill.vllm.pulse import PROBE_SECONDS, STALL_SECONDS, Pulse
from distill.vllm.served import is_healthy
from distill.vllm.watch import ENDED

GRACE_SECONDS = 10.0
"""Time between TERM and KILL when a server is ended."""
STEADY_SECONDS = 600.0
"""A server that was healthy for so long begins a new row."""
RECEIVING_SECONDS = 1800.0
"""A server that is sent weights and gives no sign of life for so long has hung: at 1 GB/s those of 14B take 28 s."""
_POLL_SECONDS = 0.2
_USAGE = 2  # exit code of a program that does not understand its arguments
_CANARY_SECONDS = 5.0  # longest wait for an answer to the supervisor's own questions
_CANARY: dict[Role, tuple[str, dict[str, Any]]] = {
    "generate": ("/v1/completions", {"prompt": [0], "max_tokens": 1}),
    "score": ("/pooling", {"input": [[0]], "task": "token_embed"}),
}
"""The least that a server of each role can be asked for."""


class Service:
    """A server process with its supervisor.

    ``start`` returns at once; ``wait`` when the server answers. A server that was healthy and ends is started again
    on the same port, at most ``max_restarts`` times; clients wait for it. So is one that takes no connections any more,
    and one that has hung: between two probes nothing of its engine moved, and it does not answer a request of one token
    either. One that is sent weights (``receiving``) cannot, and is waited for much longer. ``check`` raises once the
    server is gone for good. It ends with ``stop``, and also when this process ends in any way, SIGKILL included.
    A part of a server that has no URL (another node's) counts as ready once it is started.
    """

    def __init__(self, launch: Launch, *, log: Path) -> None:
        self.launch, self.log = launch, log
        self.port = launch.port or free_port(launch.host)
        self._log_begins = 0
        """Where in the log the process that runs now began."""
        self._stopping = threading.Event()
        self._healthy = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: DistillError | None = None
        self._healthy_since: float | None = None
        self._receives = False
        self._received_at = -math.inf
        self._thread = threading.Thread(target=self._supervise, name=f"{launch.whose} {launch.role}", daemon=True)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.launch.host in ("0.0.0.0", "::") else self.launch.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def group(self) -> int:
        """The process group (and session) that holds every process of the server."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        """Raises DistillError where its log cannot be written, and where somebody else listens at its port: his answers
        would be taken for this server's."""
        if self.launch.answers and is_taken(self.launch.host, self.port):
            raise DistillError(
                f"port {self.port} of {self.launch.host} is taken, so the {self.launch.whose}'s vLLM server "
                f"({self.launch.role}) cannot listen there; end what has it, or name another port (a run that chose it "
                f"by itself takes another one when it is given again)"
            )
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.open("ab").close()
        except OSError as error:
            raise DistillError(
                f"the log {self.log} of the {self.launch.whose}'s vLLM server cannot be written ({error.strerror}); "
                f"make room, or name another file (--log of distill teacher serve)"
            ) from None
        self._process = self._spawn()
        self._thread.start()

    def ensure(self) -> None:
        """Have it started and answering; nothing where it is already."""
        if self._process is None:
            self.start()
        if not self._healthy.is_set():
            self.wait()

    def wait(self) -> None:
        """Until the server answers. Raises what ``check`` raises where it ends instead."""
        name, role = f"{self.launch.whose} {self.launch.checkpoint.name}", self.launch.role
        say(f"{name}: starting vLLM to {role}, log in {self.log}")
        started = last = time.monotonic()
        while not self._healthy.wait(_POLL_SECONDS):
            self.check()
            interrupt.check()
            if time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                say(f"{name}: loading, {last - started:.0f} s")
        nodes = self.launch.nodes
        where = f"at {self.url}" if nodes is None or nodes.rank == 0 else f"as node {nodes.rank}"
        say(f"{name}: ready to {role} {where} after {time.monotonic() - started:.0f} s")

    def check(self) -> None:
        """Raise GoneError with the log's last lines if the server is gone for good.

        UserError where vLLM did not take what it was started with.
        """
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Within the block it is sent weights, and its engine may be at that alone, with nothing to show for it."""
        self._receives = True
        try:
            yield
        finally:
            self._received_at, self._receives = time.monotonic(), False

    def stop(self) -> None:
        """End the server's whole group; returns when it is gone."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._process is not None:
            _end(self._process)

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            return subprocess.Popen(
                # -I: neither the current folder nor the user's variables change what the watcher runs.
                [
                    sys.executable,
                    "-I",
                    watch.__file__,
                    str(os.getpid()),
                    str(GRACE_SECONDS),
                    *self.launch.command(self.port),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.launch.environment(),
                start_new_session=True,
            )

    def _supervise(self) -> None:
        """The supervisor's thread: notes health, starts again what had been healthy, gives up on what had not."""
        num_restarts, was_healthy = 0, False
        assert self._process is not None
        while True:
            end = self._follow(self._process)
            if end is None:
                return
            steady = self._healthy_since is not None and time.monotonic() - self._healthy_since > STEADY_SECONDS
            was_healthy = was_healthy or self._healthy.is_set()
            self._healthy.clear()
            num_restarts = 0 if steady else num_restarts
            if not was_healthy or num_restarts == self.launch.max_restarts:
                self._failure = self._farewell("ended again and again" if num_restarts else end, was_healthy)
                return
            num_restarts += 1
            say(
                f"the {self.launch.whose}'s vLLM server ({self.launch.role}) {end}; starting it again "
                f"({num_restarts} of {self.launch.max_restarts}), log in {self.log}"
            )
            self._process = self._spawn()

    def _farewell(self, end: str, was_healthy: bool) -> DistillError:
        """What is said of a server that is gone for good."""
        who = f"the {self.launch.whose}'s vLLM server ({self.launch.role})"
        said = _last_lines(self.log, self._log_begins)
        if was_healthy:
            return GoneError(f"{who} {end}; the last lines of {self.log}:\n{said}")
        if re.search(rf"^  {ENDED} {_USAGE}$", said, re.MULTILINE):
            return UserError(
                f"{who} does not take its arguments and ended before it was ready; correct those that the run gives "
                f"it beside its own (server_args); the last lines of {self.log}:\n{said}"
            )
        return GoneError(f"{who} ended before it was ready; the last lines of {self.log}:\n{said}")

    def _follow(self, process: subprocess.Popen[bytes]) -> str | None:
        """Until the server ends, or is ended because it is of no use: what happened. None where it is to stop."""
        self._healthy_since = None
        pulse, next_probe = Pulse(), 0.0
        while not self._stopping.wait(_POLL_SECONDS):
            trouble = None
            if process.poll() is None and not self._healthy.is_set():
                if not self.launch.answers or is_healthy(self.url):
                    self._healthy_since = time.monotonic()
                    self._healthy.set()
                    pulse.beat()
            elif self.launch.answers and time.monotonic() >= next_probe:
                next_probe = time.monotonic() + PROBE_SECONDS
                trouble = self._trouble(pulse)
            if trouble is not None or process.poll() is not None:
                # A watcher that was killed itself could not end the others, and one whose server hangs need not wait.
                _kill_group(process)
                process.wait()
                assert process.stdin is not None
                process.stdin.close()
                return trouble or "ended unexpectedly"
        return None

    def _trouble(self, pulse: Pulse) -> str | None:
        """What is the matter with a server that was healthy: nobody listens, or no sign of life for too long.

        One that merely rests is asked for a sign. One that is sent weights is not: between the first and the last of
        them it answers nothing.
        """
        receives = self._receives
        try:
            pulse.note(self._ask("GET", "/metrics", None).text)
            if not receives and pulse.silence > STALL_SECONDS / 4 and (self._sleeps() or self._answers()):
                pulse.beat()
        except httpx.ConnectError:
            # Where its engine has died, vLLM stops listening and then waits, for ever, for the requests it has taken.
            if self._refuses():
                return "ended unexpectedly: it takes no connections any more"
        except httpx.TransportError:
            pass
        silence = min(pulse.silence, time.monotonic() - self._received_at)
        if silence <= (RECEIVING_SECONDS if receives else STALL_SECONDS):
            return None
        return f"has hung for {silence:.0f} s{' while it was sent weights' if receives else ''}"

    def _refuses(self) -> bool:
        """Whether nobody listens on its port; a process that is stopped still does."""
        try:
            with socket.create_connection((httpx.URL(self.url).host, self.port), timeout=_CANARY_SECONDS):
                return False
        except ConnectionRefusedError:
            return True
        except OSError:
            return False

    def _sleeps(self) -> bool:
        """Whether its engine says that it sleeps; it then works on no request."""
        if not self.launch.sleeps:
            return False
        answer = self._ask("GET", "/is_sleeping", None)
        return answer.is_success and bool(answer.json()["is_sleeping"])

    def _answers(self) -> bool:
        return self._ask("POST", *_CANARY[self.launch.role]).is_success

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        headers = {} if self.launch.api_key is None else {"Authorization": f"Bearer {self.launch.api_key}"}
        named = None if body is None else {"model": self.launch.checkpoint.name, **body}
        return httpx.request(
            method, self.url + path, json=named, headers=headers, timeout=_CANARY_SECONDS, trust_env=False
        )


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens at that port; connections of a server that has ended do not count."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            # Of anything else, an address that this machine has not for one, vLLM speaks in its log.
            return error.errno == errno.EADDRINUSE
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(GRACE_SECONDS + 5)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """KILL whatever is left of the group. Its number stays taken as long as it has a member."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_lines(log: Path, begin: int, num: int = 12) -> str:
    """The end of a log behind ``begin``; where a Python traceback is in it, vLLM's own last words come after it."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line[:300]}" for line in lines[-num:])
