"""The parts of vLLM's weight transfer that want a GPU, played on a CPU: in the trainer's process and in a server's.

    NCCL              a socket, whose port is the unique id; who waits for a peer that has ended waits until it aborts
    handles of CUDA   files that both processes map; what is in one is spoilt when the trainer lets go of its tensor
    a layer's reload  a CPU's layers keep packed copies, which vLLM's own reload leaves as they are

All else is vLLM's own: both engines, packing, communicator, rendezvous, worker and routes. A server has this module by
``--worker-extension-cls standin_gpu.Witness``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill.vllm.worker import set_weights

_CPU = torch.device("cpu")
_ITEM_BYTES = {1: 1, 7: 4, 9: 2}  # NCCL's numbers of uint8, float32 and bfloat16
_ACK = b"+"


class Nccl:
    """What of NCCL's library vLLM's communicator calls, for two ranks."""

    def __init__(self, so_file: str | None = None) -> None:
        self.rank, self.aborted = 0, threading.Event()

    def ncclGetRawVersion(self) -> int:
        return 22703

    def ncclGetVersion(self) -> str:
        return "2.27.3"

    def ncclGetUniqueId(self) -> Any:
        from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId

        self.listener = socket.create_server(("127.0.0.1", 0))
        unique_id = ncclUniqueId()
        ctypes.memmove(unique_id.internal, self.listener.getsockname()[1].to_bytes(2, "little"), 2)
        return unique_id

    def ncclCommInitRank(self, world_size: int, unique_id: Any, rank: int) -> ctypes.c_void_p:
        assert world_size == 2
        self.rank = rank
        if rank == 0:
            self.peer, _ = self.listener.accept()
            self.listener.close()
        else:
            self.peer = socket.create_connection(("127.0.0.1", int.from_bytes(bytes(unique_id.internal)[:2], "little")))
        return ctypes.c_void_p(1)

    def ncclAllReduce(self, send: Any, receive: Any, count: int, datatype: int, *_: Any) -> None:
        assert (count, datatype) == (1, 7), "the warm-up alone"
        self._put(ctypes.string_at(send.value, 4))
        total = ctypes.c_float.from_buffer_copy(self._take(4)).value + ctypes.c_float.from_address(send.value).value
        ctypes.c_float.from_address(receive.value).value = total

    def ncclBroadcast(self, send: Any, receive: Any, count: int, datatype: int, root: int, *_: Any) -> None:
        size = count * _ITEM_BYTES[datatype]
        if self.rank == root:
            self._put(self.on_the_wire(ctypes.string_at(send.value, size)))
            assert self._take(1) == _ACK
        else:
            ctypes.memmove(receive.value, self._take(size), size)
            self._put(_ACK)

    def ncclCommAbort(self, comm: Any) -> None:
        self.aborted.set()
        with suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)
        self.peer.close()

    @staticmethod
    def on_the_wire(data: bytes) -> bytes:
        """A test's place to spoil what is sent."""
        return data

    def _put(self, data: bytes) -> None:
        try:
            self.peer.sendall(data)
        except OSError:
            self._hang()

    def _take(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = b""
            with suppress(OSError):
                part = self.peer.recv(size - len(parts))
            if not part:
                self._hang()
            parts += part
        return bytes(parts)

    def _hang(self) -> None:
        self.aborted.wait()
        raise RuntimeError("NCCL error: aborted")


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


def reduce_tensor(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """As torch's for a tensor of a GPU: the handle, and where in the arguments the device stands."""
    path = _buffers.get(tensor.data_ptr())
    if path is None:
        data = tensor.view(-1).view(torch.uint8)
        shared, path = _mapped(data.numel())
        shared.copy_(data)
        weakref.finalize(tensor, _let_go, shared, path)
    place = (type(tensor), tuple(tensor.shape), tensor.stride(), 0)
    return rebuild, (*place, torch.UntypedStorage, tensor.dtype, 0, path, tensor.nbytes, 0, False, b"", 0, b"", True)


def _mapped(size: int) -> tuple[Tensor, str]:
    handle, path = tempfile.mkstemp(prefix="standin-")
    os.close(handle)
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8), path


_buffers: dict[int, str] = {}
"""What was made on the GPU to be shared as it is, by address: a file that is mapped."""


class _Torch:
    """torch, on a machine whose GPU is mapped files."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype, device: object) -> Tensor:
        if device != "cuda":
            return torch.empty(size, dtype=dtype)
        assert dtype == torch.uint8
        made, path = _mapped(size)
        _buffers[made.data_ptr()] = path
        weakref.finalize(made, _forget_buffer, made.data_ptr(), path)
        return made


def _forget_buffer(address: int, path: str) -> None:
    del _buffers[address]
    os.unlink(path)


def _let_go(shared: Tensor, path: str) -> None:
    shared.fill_(0xFF)  # NaN, whatever the float
    os.unlink(path)


def rebuild(*arguments: Any) -> Tensor:
    _, shape, stride, offset, _, dtype, device, path, *_ = arguments
    assert device is None, "the worker's own device, by its number"
    whole = torch.from_file(path, shared=True, size=os.stat(path).st_size, dtype=torch.uint8).view(dtype)
    return whole.as_strided(shape, stride, offset)


Put = Callable[[Any, str, Any], None]
"""``setattr``, or one that a test takes back."""


def install_device(put: Put) -> None:
    put(torch.accelerator, "current_device_index", lambda: _CPU)
    put(torch.accelerator, "set_device_index", lambda device: None)
    put(torch.accelerator, "synchronize", lambda: None)


def install(put: Put) -> None:
    """What both processes lack."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    install_device(put)
    put(packed_tensor, "torch", _Torch())
    put(packed_tensor, "reduce_tensor", reduce_tensor)
    put(torch.multiprocessing.reductions, "rebuild_cuda_tensor", rebuild)
    put(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="the GPU"))
    put(pynccl, "NCCLLibrary", Nccl)
    put(pynccl, "current_stream", Stream)
    put(ipc_engine, "reduce_tensor", reduce_tensor)
    put(ipc_engine, "rebuild_cuda_tensor", rebuild)


def install_in_trainer(put: Put) -> None:
    """The server's process has the rest from vLLM's own worker for CPUs."""
    install(put)
    put(torch.cuda, "Stream", Stream)
    put(torch.cuda, "stream", lambda stream: stream)
    put(torch.cuda, "current_stream", Stream)
    put(torch.cuda, "ipc_collect", lambda: None)


def described(weights: Iterable[tuple[str, Tensor]]) -> dict[str, list[Any]]:
    """Each weight's dtype, shape and a digest of its bytes."""
    return {name: [str(value.dtype), list(value.shape), _digest(value)] for name, value in weights}


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Witness:
    """Mixed into vLLM's worker."""

    def arrived(self) -> dict[str, list[Any]]:
        """What the last transfer brought."""
        return _arrived


_arrived: dict[str, list[Any]] = {}


def _begin(model: Any) -> None:
    """From here to the end a layer's own weights are nowhere, as in vLLM's reload."""
    model.taken = {}
    model.load_weights = model.taken.update
    model.forward = _cannot


def _cannot(*_: Any, **__: Any) -> None:
    raise RuntimeError("a pass over layers that are being reloaded")


def _end(model: Any, config: Any) -> None:
    taken = model.__dict__.pop("taken")
    _arrived.clear()
    _arrived.update(described(taken.items()))
    set_weights(model, taken)
    del model.load_weights, model.forward


def _install_in_server() -> None:
    from vllm.model_executor.model_loader import reload
    from vllm.v1.worker.cpu.shm import _StreamPlaceholder

    install(setattr)
    # What vLLM has for a stream on a CPU.
    _StreamPlaceholder.cuda_stream = 0
    vars(reload).update(initialize_layerwise_reload=_begin, finalize_layerwise_reload=_end)


if os.environ.get("STANDIN_GPU") == "server":
    _install_in_server()
