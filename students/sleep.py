"""vLLM's sleep mode: a server on the trainer's GPU leaves its memory to the trainer between two batches.

    batch, /sleep ... /wake_up?tags=weights, new weights, /wake_up?tags=kv_cache, check, batch

Until both are awake the server takes requests in and works on none.
"""

from __future__ import annotations

from typing import Literal

import torch

from distill.errors import DistillError, UserError
from distill.vllm.client import Client
from students.weight_sync import Way, ask

Level = Literal[1, 2]


class Sleep:
    """``level`` 1 moves the server's weights to the machine's memory, 2 forgets them; both forget keys and values."""

    def __init__(self, client: Client, level: Level) -> None:
        self.client, self.level = client, level
        self.asleep = False

    def begin(self) -> None:
        ask(self.client, f"/sleep?level={self.level}", {})
        self.asleep = True

    def wake_weights(self) -> None:
        """Give the server the memory of its weights back; after level 2 nothing is in it."""
        if self.asleep:
            # What the trainer holds in reserve is the server's now.
            torch.cuda.empty_cache()
            self._wake("weights")

    def wake_cache(self) -> None:
        """Give it the memory of keys and values back; it works again."""
        if self.asleep:
            status = self._wake("kv_cache")
            if status != "awake":
                raise DistillError(f"the student's server was woken up and says that it is {status}; its log says why")
            self.asleep = False

    def _wake(self, tag: str) -> str:
        return str(ask(self.client, f"/wake_up?tags={tag}", {})["status"])


def level_for(way: Way) -> Level:
    """The base weights under adapters are never sent; all others are sent anew before the next batch."""
    return 1 if way == "adapter" else 2


def check_sleep(*, on_gpu: bool, own_devices: bool) -> None:
    """Raise UserError where the server shares no GPU with the trainer."""
    if not on_gpu:
        raise UserError(
            "sampler.sleep=true is for a server on the trainer's GPU, and this machine has none; set it to false"
        )
    if own_devices:
        raise UserError(
            "sampler.sleep=true is for a server on the trainer's GPU, and sampler.devices gives it its own; set it to "
            "false, or leave sampler.devices empty"
        )
