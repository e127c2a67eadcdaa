"""The divergence with a head that FSDP2 shards over two real processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_processes
from test_divergence import V, assert_close, gradients, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode

from distill.divergence import linear_divergence
from distill.errors import UserError

NUM_PROCESSES, ROWS = 2, 6


class Head(nn.Module):
    """Inside its forward the weight is whole."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VD.detach().clone())

    def forward(self, hidden: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        return linear_divergence(hidden, self.weight, teacher_hidden, teacher_head, kind="jsd", chunk_rows=1).total


def train_on_a_shard(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", NUM_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    hidden, head, teacher_hidden, teacher_head = make(rows=ROWS)
    rows = slice(rank * ROWS // NUM_PROCESSES, (rank + 1) * ROWS // NUM_PROCESSES)
    own = hidden.detach()[rows].requires_grad_(), teacher_hidden[rows], teacher_head
    module = fully_shard(Head(head), mesh=init_device_mesh("cpu", (NUM_PROCESSES,)))

    with CommDebugMode() as traffic:
        total = module(*own)
    num_gathers = sum(traffic.get_comm_counts().values())
    total.backward()
    grad_head = module.weight.grad.full_tensor()

    try:
        linear_divergence(own[0], module.weight, *own[1:], kind="jsd")
        refused = ""
    except UserError as error:
        refused = str(error)
    module.zero_grad()
    gathered = module.weight.full_tensor(grad_placements=[Partial()])
    linear_divergence(own[0].detach(), gathered, *own[1:], kind="jsd").total.backward()
    assert isinstance(module.weight.grad, DTensor)
    grad_gathered = module.weight.grad.full_tensor()
    results = {"hidden": own[0].grad, "head": grad_head, "gathered": grad_gathered}
    torch.save({**results, "num_gathers": num_gathers, "refused": refused}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_head_is_gathered_once_and_never_by_the_tile(tmp_path: Path) -> None:
    run_processes(train_on_a_shard, (str(tmp_path),), NUM_PROCESSES)
    inputs = make(rows=ROWS)
    grad_hidden, grad_head = gradients(linear_divergence(*inputs, kind="jsd").total, inputs)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(NUM_PROCESSES)]
    assert_close(torch.cat([result["hidden"] for result in results]), grad_hidden, 1e-12)
    for result in results:
        assert_close(result["head"], grad_head / NUM_PROCESSES, 1e-12)  # FSDP2 averages
        assert_close(result["gathered"], grad_head, 1e-12)
        assert result["num_gathers"] == 1
        assert "would be gathered anew for every tile" in result["refused"]
    assert len(grad_head) == V
