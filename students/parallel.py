"""How one step's forward and backward pass is spread over the run's processes.

    alone        one process
    replicated   every process holds the whole student; DDP averages the gradients
    sharded      every process holds a slice of every tensor; FSDP2 gathers a layer when it is needed

accelerate prepares both, and so it does on a CPU, where the path of the GPUs is tested.

The student's pass and its loss are one module (``Pass``), so the engine sees every use of a weight, the LM head's in
the loss too. For FSDP2 that settles the rule of tied embeddings: layers are groups of their own, and embedding, final
norm and head stay together in the group of the whole. It is gathered once an optimiser step, by the first micro-batch's
forward pass, and stays so until the last one's backward pass (``keep_root``): not once a tile, nor once a micro-batch.

Sharded parameters are the fp32 masters themselves; they are gathered in the student's dtype, and gradients are summed
in fp32. Gradients of bf16 replicas are summed in fp32 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

Engine = Literal["alone", "replicated", "sharded"]


class Pass(nn.Module):
    """A student's forward pass and loss, ``work(*inputs)``, as a module over the whole model; idle if given None."""

    def __init__(self, model: nn.Module, work: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._work = work

    def forward(self, *inputs: Any) -> Any:
        return None if inputs == (None,) else self._work(*inputs)


def replicated(whole: Pass) -> nn.Module:
    """DDP around it."""
    accelerator = _accelerator(on_cpu=not next(whole.parameters()).is_cuda)
    ddp = accelerator.prepare_model(whole)
    # What accelerate takes to be one process, it gives back as it is.
    assert isinstance(ddp, nn.parallel.DistributedDataParallel), "replicas need the launcher's variables"
    if next(whole.parameters()).dtype != torch.float32:
        # DDP takes no annotated function but one whose annotations are classes, which they are not in this file.
        ddp.register_comm_hook(None, lambda state, bucket: _average_in_fp32(bucket))
    return ddp


def _accelerator(*, on_cpu: bool) -> Accelerator:
    """One that neither casts nor compiles: what is not said here, accelerate takes from the environment."""
    return Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")


def _average_in_fp32(bucket: Any) -> Any:
    wide = bucket.buffer().float().div_(dist.get_world_size())
    reduced: Any = dist.all_reduce(wide, async_op=True)
    return reduced.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def sharded(whole: Pass, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, *, offload: bool) -> None:
    """Cuts the parameters in place; a model on the CPU moves to the device layer by layer."""
    accelerator = _accelerator(on_cpu=device.type == "cpu")
    # Accelerator.prepare shards together with the optimiser, which begins anew with each stage here, and on GPUs only.
    # The function behind it does not ask for either, and takes its settings from this place.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_offload=offload,
        # The inputs are ids, and numbers for the loss, which does its arithmetic in fp32.
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=[type(cast(Any, model.get_decoder()).layers[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    fsdp2_prepare_model(accelerator, whole)
    cast(FSDPModule, whole).set_reshard_after_forward(False, recurse=False)
    # Slices are widened, not the whole: no process holds more than what it has loaded.
    whole.float()
    # FSDP2 learns who the root is from the first module that runs, and sampling runs the layers by themselves.
    whole(None)
    # The root stays gathered behind a forward pass, and whoever asks for parameters now is to be given the slices.
    cast(FSDPModule, whole).reshard()


def keep_root(whole: nn.Module, keep: bool) -> None:
    """Whether the group of the whole, if it is sharded, stays gathered behind the next backward pass.

    It may only where no weight changes before the pass after that, which takes what is gathered.
    """
    if isinstance(whole, FSDPModule):
        whole.set_reshard_after_backward(not keep, recurse=False)


def release(whole: nn.Module) -> None:
    """Puts the group of the whole back into slices where an error ended a pass, or came between two."""
    if isinstance(whole, FSDPModule):
        whole.set_reshard_after_backward(True, recurse=False)
        # In the middle of a forward pass a group that is to stay gathered behind it would not go.
        whole.set_reshard_after_forward(True, recurse=False)
        whole.reshard()
        whole.set_reshard_after_forward(False, recurse=False)
        _forget_passes(whole)


def _forget_passes(whole: nn.Module) -> None:
    """Make the next backward pass one that knows of the forward pass before it alone.

    FSDP2 notes the groups of every forward pass since the last backward pass, and that one gathers ahead what stands
    before each group in the list. Behind a block in which the processes made passes at their own pace, some of them
    none, they would gather different things and wait for each other for ever.
    """
    if isinstance(whole, FSDPModule):
        state: Any = whole._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()


@contextmanager
def gathered(whole: nn.Module) -> Iterator[None]:
    """A block in which every process holds the whole student, to sample from it at its own pace."""
    shards = [module for module in whole.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not shards[0], recurse=False)
        _forget_passes(whole)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as they are, or, sharded, the whole of each in the memory of the main process's machine.

    Every process must ask; of sharded tensors the others get none.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            kept[name] = tensor
            continue
        whole = tensor.full_tensor()
        if dist.get_rank() == 0:
            kept[name] = whole.cpu()
    return kept


def slice_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has whole, cut and placed as ``like`` is."""
    if isinstance(like, DTensor) and value.dim():
        local = value.to(like.device)
        return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)
