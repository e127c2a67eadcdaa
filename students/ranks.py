"""The processes of one run, and the little they say to each other.

Every process runs the same program on its own share of each step. What is data at step n is a function of the seed and
n alone; a process takes its share by its number, so the number of processes changes nothing but who does what. They
meet at few places: numbers that are sums over all (tokens, losses, metrics), and after every part in which they worked
apart (``together``), where one's error or request to stop becomes everyone's. What they say travels over gloo between
the machines' processors; gradients and weights travel as the training engine likes (NCCL between GPUs).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from signal import Signals
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from distill import interrupt
from distill.errors import DistillError, NonFiniteError, PeerError, StoppedError, UserError

Item = TypeVar("Item")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: they may be examining, or waiting for a teacher. Who fails ends them."""

RENDEZVOUS_PATIENCE = timedelta(minutes=15)
"""How long a process waits for all to come: a cluster starts machines minutes apart. Nobody has begun anything yet."""

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's ``number`` among the run's ``count``; number 0 writes what the run writes."""

    number: int = 0
    count: int = 1

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def share(self, items: Sequence[Item], *, block: int = 1) -> list[Item]:
        """This process's part of a step's ``items``: consecutive blocks of ``block``, as even as they go.

        The parts of all processes in order are the whole again. Raises UserError where somebody would get nothing.
        """
        num_blocks = -(-len(items) // block)
        if num_blocks < self.count:
            raise UserError(
                f"a step has {num_blocks} parts to share and the run {self.count} processes; give the stage more "
                f"prompts a step (or a larger batch_size), or start {num_blocks} processes"
            )
        first, last = (num_blocks * number // self.count * block for number in (self.number, self.number + 1))
        return list(items[first:last])

    def gather(self, item: Item) -> list[Item]:
        """Every process's ``item``, in order."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item)
        return cast(list[Item], items)

    def hosts(self) -> list[str]:
        """The name of every process's machine, in order. Every process must call it."""
        return self.gather(socket.gethostname())

    def from_main(self, item: Item) -> Item:
        """The main process's ``item``."""
        if self.count == 1:
            return item
        items: list[Any] = [item]
        dist.broadcast_object_list(items, src=0)
        return cast(Item, items[0])

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over all processes, by name; a name that a process lacks counts as 0 there."""
        total: dict[str, float] = {}
        for part in self.gather(dict(values)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def check(self) -> None:
        """``interrupt.check`` for all: everyone raises StoppedError where anyone was asked to stop.

        Every process must call it at the same place.
        """
        if self.count == 1:
            interrupt.check()
            return
        asked = torch.tensor(int(interrupt.received() or 0))
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            raise interrupt.stopped(Signals(int(asked)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which the processes work apart; behind it all go on, or all raise.

        Where anyone was asked to stop, everyone raises StoppedError, and where anyone met a number that is not finite,
        everyone NonFiniteError: these end in a checkpoint, which takes all. Who failed otherwise raises its own error,
        unless the main process failed so too: what happens to all is said once. The others raise PeerError then, or
        StoppedError if somebody was asked to stop.
        """
        if self.count == 1:
            yield
            return
        own: DistillError | None = None
        try:
            yield
        except DistillError as error:
            own = error
        everyone = self.gather(None if own is None else _Failure.of(own))
        is_own = [failure is not None and failure.kind == "own" for failure in everyone]
        if own is not None and is_own[self.number] and (self.is_main or not is_own[0]):
            raise own
        failures = [failure for failure in everyone if failure is not None]
        for failure in failures:
            if failure.kind == "stopped":
                raise StoppedError(failure.text, exit_code=failure.exit_code)
        not_finite = [failure for failure in failures if failure.kind == "not finite"]
        # Who has an error of its own leaves at once: a checkpoint would wait for it.
        if not_finite and not any(is_own):
            raise own if isinstance(own, NonFiniteError) else NonFiniteError(not_finite[0].text)
        if failures:
            raise PeerError(failures[0].text)


ALONE = Ranks()
"""The one process of a run that is spread over none."""


Kind = Literal["stopped", "not finite", "of a peer", "own"]


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a process tells the others of its error; nobody else can say what is its ``own``."""

    kind: Kind
    text: str
    exit_code: int

    @classmethod
    def of(cls, error: DistillError) -> _Failure:
        kind: Kind = "own"
        if isinstance(error, StoppedError):
            kind = "stopped"
        elif isinstance(error, NonFiniteError):
            kind = "not finite"
        elif isinstance(error, PeerError):
            kind = "of a peer"
        return cls(kind, str(error), error.exit_code)


LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_")
"""How the names of the variables begin in which ``accelerate launch`` says how to train."""

has_joined = False
"""Whether this process has been one of several, or has waited to be."""


@contextmanager
def joined_ranks(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The processes that this one belongs to, by its environment; alone where that names no others.

    Understands what torchrun and Kubernetes' training operators set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT), which is also what ``distill run --processes`` sets, and srun's own variables.

    Raises UserError for a place that cannot be, here (no GPU of its number) or anywhere (``place_in``).
    """
    place = place_in(environment)
    if place is None:
        yield ALONE
        return
    number, count, local = place
    if torch.cuda.is_available():
        _check_gpu(local, environment)
        torch.cuda.set_device(local)
    # What `accelerate launch` was told of training is for scripts that ask for it; a run has its recipe. accelerate
    # would obey it (casts, modules left out of the sharding), and transformers load no weights but in one process.
    for name in [name for name in os.environ if name.startswith(LAUNCHER_SETTINGS)]:
        del os.environ[name]
    # accelerate reads this one to find the process's device.
    os.environ["LOCAL_RANK"] = str(local)
    _meet(number, count, local, where=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}")
    try:
        yield Ranks(number, count)
    except RuntimeError as error:
        # Whoever talks to a process that is gone hears of a connection: that one, or who started it, says why.
        if _is_of_the_group(error):
            raise PeerError("another process of this run has ended") from error
        raise
    finally:
        dist.destroy_process_group()


def _check_gpu(local: int, environment: Mapping[str, str]) -> None:
    num = torch.cuda.device_count()
    if local >= num:
        name = "LOCAL_RANK" if "RANK" in environment else "SLURM_LOCALID"
        raise UserError(
            f"{name} is {local}, so that this process is number {local + 1} of its machine, and it sees {num} "
            f"GPU{'s' if num > 1 else ''}: each takes the one of its number; start at most one a GPU, and let each see "
            "all of them (CUDA_VISIBLE_DEVICES; of srun not --gpus-per-task)"
        )


def _meet(number: int, count: int, local: int, *, where: str) -> None:
    """Wait until all processes have come, at most ``RENDEZVOUS_PATIENCE``.

    Raises DistillError if they have not or cannot meet, StoppedError if this one is asked to stop.
    """
    global has_joined
    ended: list[Exception] = []

    def join() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local)  # every thread has a current device of its own
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                rank=number,
                world_size=count,
                timeout=PATIENCE,
            )
        except Exception as error:
            ended.append(error)

    # torch looks up names, connects and waits in C++, where no signal is heard. So a thread does it, which is left to
    # itself when nobody waits for it any more.
    has_joined = True
    joining = threading.Thread(target=join, name="rendezvous", daemon=True)
    joining.start()
    deadline = time.monotonic() + RENDEZVOUS_PATIENCE.total_seconds()
    while joining.is_alive():
        interrupt.check()
        if time.monotonic() > deadline:
            raise DistillError(
                f"process {number} has waited {RENDEZVOUS_PATIENCE.total_seconds() / 60:g} minutes at {where} for all "
                f"{count} processes of the run to come; see that each of them has been started, with a number of its "
                "own and with this MASTER_ADDR and MASTER_PORT, and that it reaches that address; then start them again"
            )
        joining.join(POLL_SECONDS)
    for error in ended:
        interrupt.check()  # whoever was asked to stop may have left first
        if not _is_of_the_group(error):
            raise error
        reason = str(error).partition("\n")[0]
        raise DistillError(f"process {number} cannot meet the run's other processes at {where}: {reason}") from error


def _is_of_the_group(error: Exception) -> bool:
    """Whether it is about the connections between the processes, and no error of what they do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def place_in(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Number, count and number on this machine; None for a process that is alone.

    Raises UserError for half of it (a number and no count, or a count and nowhere to meet), and for what cannot be. An
    address alone is no half: a batch script exports it for its srun, and has other commands too.
    """
    slurm = "RANK" not in environment and _whole(environment, "SLURM_STEP_NUM_TASKS", 1, least=1) > 1
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID") if slurm else ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if names[0] in environment and names[1] not in environment:
        raise UserError(
            f"{names[0]} is {environment[names[0]]!r} and {names[1]} is not set, so how many processes the run has is "
            f"not known; set {names[1]} as well, or unset {names[0]} if this is the only one"
        )
    count = _whole(environment, names[1], 1, least=1)
    missing = [name for name in (names[0], "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if count > 1 and missing:
        raise UserError(
            f"the environment says that this is one of {count} processes ({names[1]}) and lacks "
            f"{', '.join(missing)}; start it with torchrun, or set them (MASTER_ADDR is the first machine's name, for "
            'srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500)'
        )
    number = _whole(environment, names[0], 0)
    if number >= count:
        raise UserError(
            f"{names[0]} is {number} and {names[1]} is {count}: the processes of a run are numbered from 0 to "
            f"{count - 1}; give each its own of these, or unset both for a run of one process"
        )
    if count == 1:
        return None
    _whole(environment, "MASTER_PORT", least=1, most=65535)
    return number, count, _whole(environment, names[2], 0)


def _whole(
    environment: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0, most: int | None = None
) -> int:
    """The number that a variable holds, ``default`` where it is not set."""
    if default is not None and name not in environment:
        return default
    text = environment[name]
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        room = f"from {least} on" if most is None else f"from {least} to {most}"
        raise UserError(
            f"{name} is {text!r}, no whole number {room}; set it as torchrun or srun would (a run of one process needs "
            "no such variable)"
        )
    return value
