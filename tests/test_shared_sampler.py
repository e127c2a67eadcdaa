"""One sampler made of every process's own, in two real processes: who sampled what, and failures that all outlive."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import FORKED, run_processes

from distill.errors import DistillError, GoneError, PeerError, StoppedError, UserError
from distill.sampler import OnFinished, Sampler
from distill.types import Prompt, Request, Rollout, Sampling
from distill.vllm.service import free_port
from eval.runner import speak
from students.ranks import Ranks, joined_ranks
from students.shared_sampler import with_all_samplers

SPOILT, STOP, GONE, UNFIT = 5, 99, 77, 88
PATIENCE_SECONDS = 60.0


def request(seed: int) -> Request:
    return Request(Prompt(()), "think", "hard", (1, 2), Sampling(4), seed)


class Fussy:
    """Answers with its process's number; fails with whatever stands beside the spoilt request."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if any(one.seed == SPOILT for one in requests):
            raise DistillError("this one is spoilt")
        if any(one.seed == STOP for one in requests):
            raise StoppedError("asked to stop", exit_code=75)
        if any(one.seed == GONE for one in requests):
            # The main process sees the end of a server that it started; the others wait in vain.
            raise GoneError("ended") if self.rank == 0 else StoppedError("does not answer", exit_code=75)
        if any(one.seed == UNFIT for one in requests):
            raise UserError("cannot be asked so")
        return [
            Rollout(one, (one.seed + 1, self.rank), (False,) * 2, (0.0,) * 2, "stop", "student") for one in requests
        ]


def work(rank: int, folder: str, seeds: list[int]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)

    def ask(sampler: Sampler) -> list[list[int] | str]:
        requests = [request(seed) for seed in seeds]
        # The response store asks for all at once, and is done with where that fails.
        said = sampler.generate(requests) if UNFIT in seeds else speak(sampler, requests)
        return [one if isinstance(one, str) else list(one.response_ids) for one in said]

    try:
        found: object = with_all_samplers(Ranks(rank, 2), Fussy(rank), ask)
    except DistillError as error:
        found = type(error).__name__
        if rank == 0 and UNFIT in seeds:
            found = f"{found}: {error}"
    # All are at the same place: a message still means the same to each of them.
    together = Ranks(rank, 2).gather(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps([found, together]))
    dist.destroy_process_group()


def run(tmp_path: Path, seeds: list[int]) -> list[object]:
    run_processes(work, (str(tmp_path), seeds), 2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [together for _, together in found] == [[0, 1], [0, 1]]
    return [one for one, _ in found]


def test_each_samples_its_share(tmp_path: Path) -> None:
    assert run(tmp_path, [1, 2, 3]) == [[[2, 0], [3, 1], [4, 0]], None]


@pytest.mark.parametrize("place", [0, 1])
def test_what_one_request_does_costs_the_others_nothing(tmp_path: Path, place: int) -> None:
    """Spoilt for the main process or for the other one: the rest is asked for again, and is had."""
    seeds = [1, 2, 3, 4]
    seeds.insert(place, SPOILT)
    found, other = run(tmp_path, seeds)
    assert isinstance(found, list) and other is None
    assert "spoilt" in found.pop(place)
    assert [one[0] for one in found] == [2, 3, 4, 5]


def test_where_nothing_is_had_the_main_process_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, [SPOILT] * 12) == [DistillError.__name__, PeerError.__name__]


def test_a_server_that_is_gone_for_one_and_silent_for_the_other_ends_both(tmp_path: Path) -> None:
    assert run(tmp_path, [GONE, GONE, GONE]) == [GoneError.__name__, PeerError.__name__]


def test_all_stop_where_one_is_asked_to(tmp_path: Path) -> None:
    assert run(tmp_path, [1, STOP, 3]) == [StoppedError.__name__] * 2


def test_what_another_process_met_alone_is_said_by_the_main_one(tmp_path: Path) -> None:
    assert run(tmp_path, [1, UNFIT, 3]) == ["DistillError: cannot be asked so", PeerError.__name__]


class Full:
    """A process whose memory is."""

    def __init__(self, *, is_full: bool) -> None:
        self.is_full = is_full

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if self.is_full:
            raise torch.OutOfMemoryError
        return []


def meet(rank: int, full: int, port: int, folder: str) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    try:
        with joined_ranks() as ranks:
            with_all_samplers(ranks, Full(is_full=rank == full), lambda sampler: sampler.generate([request(1)]))
    except (torch.OutOfMemoryError, PeerError) as error:
        Path(folder, str(rank)).write_text(type(error).__name__)


@pytest.mark.parametrize("full", [0, 1])
def test_nobody_waits_for_a_process_that_failed_in_a_way_of_its_own(tmp_path: Path, full: int) -> None:
    """The main process, on its way out, must not talk to others who wait for something else."""
    port = free_port("127.0.0.1")
    processes = [FORKED.Process(target=meet, args=(rank, full, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    said = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert said == {full: "OutOfMemoryError", 1 - full: PeerError.__name__}
