"""One of vLLM's weight-transfer engines, which are made for GPUs, to a server that is one process.

    /pause, /start_weight_update, /update_weights, /finish_weight_update, /resume

vLLM's engine works in a thread of its own, and this one watches: NCCL waits for ever for a peer that has ended. So the
engine's current stream and device are that thread's too, and the trainer's stay as they are.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import httpx
import torch
from torch import Tensor

from distill import interrupt
from distill.errors import GoneError
from distill.vllm.address import is_loopback
from distill.vllm.client import Client
from distill.vllm.service import free_port
from students.weight_sync import Weights

_POLL_SECONDS = 0.1
_BUFFER_BYTES = 2**30
"""Of merged weights on their way to a server on the trainer's GPU; the largest tensor fits whatever it takes."""
_LAST_WORDS_SECONDS = 5.0
"""How long a server that broke off a transfer gets to end, so that the sentence has the last lines of its log."""


class EngineSync:
    """Sends ``weights`` to the one server of ``client``, whose ``check`` says when it is gone.

    Between start and finish the server's layers hold no weights, and whatever it read would end its engine (the
    supervisor's own question too). So it is paused meanwhile: requests are taken in and wait. One that sleeps is paused
    already, and stays so until its cache is awake. ``receiving`` is a block within which whoever watches the server
    knows that it cannot answer. By ``ipc`` a server reads the trainer's own tensors, all of them together; where
    ``are_made``, ``weights`` makes new ones as it goes, they are copied through a buffer, so that no second model is
    held.
    """

    def __init__(
        self,
        way: Literal["nccl", "ipc"],
        client: Client,
        weights: Weights,
        *,
        are_made: bool = False,
        receiving: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.way, self.client, self.weights, self.are_made, self.receiving = way, client, weights, are_made, receiving
        self._routes = _Routes(client.replicas[0].url)
        self._engine: Any = None

    def send(self) -> None:
        """Raises GoneError where the server ended, or said that it could not."""
        # The engine's streams do not wait for the one on which the weights were changed.
        torch.accelerator.synchronize()
        device = torch.accelerator.current_device_index()
        result: Future[None] = Future()

        def work() -> None:
            try:
                torch.accelerator.set_device_index(device)
                self._transfer()
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(None)

        with self.receiving():
            threading.Thread(target=work, name=f"weights by {self.way}", daemon=True).start()
            try:
                self._watch(result)
            except BaseException:
                self._abandon()
                raise

    def _transfer(self) -> None:
        was_paused = self._routes.is_paused()
        if not was_paused:
            self._routes.pause()
        if self._engine is None:
            self._engine = self._begin()
        self._engine.send_weights()
        if not was_paused:
            self._routes.resume()

    def _watch(self, result: Future[None]) -> None:
        """Until the transfer is done; raises where it failed, or cannot be done any more."""
        # An engine has two threads that meet at the server. Where one has failed, the other may wait for ever.
        while not result.done() and self._routes.failure is None:
            wait([result], _POLL_SECONDS)
            interrupt.check()
            self.client.check()
        failure = self._routes.failure or result.exception()
        if failure is None:
            return
        if not isinstance(failure, GoneError | RuntimeError | OSError):
            raise failure
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            self.client.check()
            time.sleep(_POLL_SECONDS)
        if isinstance(failure, GoneError):
            raise failure
        raise GoneError(f"the transfer of the student's weights by {self.way} failed: {failure}") from failure

    def _abandon(self) -> None:
        """End what still waits for the server; the next transfer would begin with a new handshake."""
        engine, self._engine, self._routes = self._engine, None, _Routes(self._routes.url)
        if engine is not None:
            engine.shutdown()

    def _begin(self) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        source = _source(self.weights)

        class OneSender(IPCTrainerWeightTransferEngine):  # type: ignore[misc]
            """vLLM's own gathers the handles of all processes of a run; here the main one alone sends."""

            def _all_gather_and_merge_handles(self, handles: list[Any]) -> list[Any]:
                return handles

            @staticmethod
            def _post_send_sync() -> None:
                torch.cuda.ipc_collect()

        if self.way == "ipc":
            info = IPCTrainerInitInfo(rank=0)
            if self.are_made:
                largest = max(weight.nbytes for _, weight in self.weights())
                info = IPCTrainerInitInfo(True, max(_BUFFER_BYTES, largest), rank=0)
            return OneSender.trainer_init(info, client=self._routes, source=source)
        host = "127.0.0.1"
        # Packed, 0.32's worker takes buffers in on two streams in turn, and a layer whose parts came in two of them is
        # put together on the second without waiting for the first. One tensor after the other is on one stream.
        info = NCCLTrainerInitInfo(host, free_port(host), 2, packed=False, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self._routes, source=source)


def _source(weights: Weights) -> Any:
    """The weights as they are whenever it is gone through, as vLLM's engines ask for them."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights())

    return Source()


class _Routes:
    """A server's routes for transfers, as vLLM's engines call them. Nothing of a transfer can be asked for again.

    ``failure`` is what the first call that failed raised. vLLM's own client would go through a proxy that the
    environment names, and gives up after five minutes.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.failure: GoneError | None = None

    def is_paused(self) -> bool:
        return bool(self._ask("GET", "/is_paused").json()["is_paused"])

    def pause(self) -> None:
        self._ask("POST", "/pause?mode=keep")

    def resume(self) -> None:
        self._ask("POST", "/resume")

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._ask("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._ask("POST", "/start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        info = dict(update_info)
        handles = info.pop("ipc_handles", None)
        if handles is not None:
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._ask("POST", "/update_weights", {"update_info": info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("POST", "/finish_weight_update", {"weight_version": weight_version})

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            answer = httpx.request(
                method, self.url + path, json=body, timeout=None, trust_env=not is_loopback(self.url)
            )
        except httpx.TransportError as error:
            said = f"{type(error).__name__} {error}".strip()
        else:
            if answer.is_success:
                return answer
            said = f"status {answer.status_code}: {answer.text[:300]}"
        self.failure = GoneError(
            f"the student's server {self.url} failed at {path} while it was sent new weights ({said}); its log says why"
        )
        raise self.failure
