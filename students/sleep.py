"""vLLM's sleep mode: a vLLM on the trainer's GPU leaves its memory to the trainer between two batches.

    batch, /sleep ... /wake_up?tags=weights, new weights, /wake_up?tags=kv_cache, check, batch

Until both are awake a server takes requests in and works on none. An engine in the trainer's process does the same
without the routes.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from distill.errors import DistillError, UserError
from distill.vllm.client import Client, ask
from students.weight_sync import Way

Level = Literal[1, 2]


class Sleeper(Protocol):
    """What can give its memory away, and take it back part by part."""

    def sleep(self, level: Level) -> None: ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> bool:
        """Whether it is awake as a whole then."""
        ...


class SleepingServer:
    """A server, by vLLM's routes."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def sleep(self, level: Level) -> None:
        ask(self.client, f"/sleep?level={level}", {})

    def wake(self, part: Literal["weights", "kv_cache"]) -> bool:
        return bool(ask(self.client, f"/wake_up?tags={part}", {})["status"] == "awake")


class Sleep:
    """``level`` 1 moves vLLM's weights to the machine's memory, 2 forgets them; both forget keys and values."""

    def __init__(self, sleeper: Sleeper, level: Level) -> None:
        self.sleeper, self.level = sleeper, level
        self.asleep = False

    def begin(self) -> None:
        self.sleeper.sleep(self.level)
        self.asleep = True

    def wake_weights(self) -> None:
        """Give it the memory of its weights back; after level 2 nothing is in it."""
        if self.asleep:
            # What the trainer holds in reserve is vLLM's now.
            torch.cuda.empty_cache()
            self.sleeper.wake("weights")

    def wake_cache(self) -> None:
        """Give it the memory of keys and values back; it works again."""
        if self.asleep:
            if not self.sleeper.wake("kv_cache"):
                raise DistillError("the student's vLLM was woken up and says that it sleeps; its log says why")
            self.asleep = False


def level_for(way: Way) -> Level:
    """The base weights under adapters are never sent; all others are sent anew before the next batch."""
    return 1 if way == "adapter" else 2


def check_sleep(*, on_gpu: bool, own_devices: bool) -> None:
    """Raise UserError where the server shares no GPU with the trainer."""
    if not on_gpu:
        raise UserError(
            "sampler.sleep=true is for vLLM on the trainer's GPU, and this machine has none; set it to false"
        )
    if own_devices:
        raise UserError(
            "sampler.sleep=true is for vLLM on the trainer's GPU, and sampler.devices gives it its own; set it to "
            "false, or leave sampler.devices empty"
        )
