"""A sweep: the runs of one job, one after the other, with one teacher's servers for all of them.

    python -m pipelines.sweep JOB.json

What the teacher says is in one response store, so the first run pays for it and the others find it. A run that is done
is passed over, so the same command resumes a sweep. A run that fails does not keep the others from running; its exit
code is the sweep's, and of several codes the one that a retry may help.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from distill import interrupt
from distill.checkpoint import open_checkpoint
from distill.config import RunConfig
from distill.errors import DistillError, UserError
from distill.family import resolve
from distill.interrupt import EXIT_CODES, deferred_signals
from distill.journal import read_json
from distill.progress import complain, say
from distill.recipe import load_recipe, validate
from distill.vllm.launch import Role
from distill.vllm.service import Service
from pipelines.hiring import devices_here, server_launches
from pipelines.job import is_teacher_ours
from pipelines.preparation import run_command
from pipelines.signals import SIGNALS

_POLL_SECONDS = 0.2

Entry = dict[str, str]
Command = Callable[[Entry], Sequence[str]]


def run_sweep(file: Path, command: Command = run_command) -> int:
    """Run what is still to run of the sweep that ``file`` describes; the exit code. ``command`` is what does a run."""
    job = read_json(file)
    configs = [validate(load_recipe(Path(entry["recipe"])), where=entry["recipe"]) for entry in job["runs"]]
    left = [entry for entry in job["runs"] if not (Path(entry["out"]) / "summary.json").exists()]
    for entry in job["runs"]:
        if entry not in left:
            say(f"{entry['out']} is done")
    if not left:
        return 0
    with ExitStack() as stack:
        services: list[Service] = []
        environment = dict(os.environ)
        if job["share_teacher"] and is_teacher_ours(configs[0]):
            logs = Path(job["runs"][0]["out"]).parent / "servers"
            services, rest = stack.enter_context(shared_teacher(configs, logs))
            if rest:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(rest)
        codes = []
        for entry in left:
            codes.append(_run(entry, command(entry), services, environment))
            if codes[-1] in EXIT_CODES.values():
                return codes[-1]
    # Whatever is neither success nor a fault of the configuration is a failure: 120, say, of an output that was lost.
    if any(code not in (0, 2) for code in codes):
        return 1
    return 2 if 2 in codes else 0


@contextmanager
def shared_teacher(configs: Sequence[RunConfig], logs: Path) -> Iterator[tuple[list[Service], list[str]]]:
    """The servers that all of the runs need, up at once, and the GPUs that they leave; none without GPUs."""
    config = max(configs, key=lambda one: one.max_prompt_tokens + one.longest_response)
    settings = config.teacher
    roles: list[Role] = ["generate"]
    if SIGNALS[settings.signal].role == "score":
        roles.append("score")
    on_gpu, devices = torch.cuda.is_available(), devices_here()
    each = settings.tensor_parallel * settings.pipeline_parallel * settings.replicas
    if on_gpu and len(devices) <= each * len(roles):
        raise UserError(
            f"a sweep's teacher takes {each} GPUs to {' and as many to '.join(roles)}, its students at least one more, "
            f"and the job has {len(devices)}; raise schedule.gpu_slots, or set sweep.share_teacher to false"
        )
    checkpoint = open_checkpoint(resolve(settings.model, role="teacher", revision=settings.revision))
    with ExitStack() as stack:
        services = []
        for number, role in enumerate(roles):
            own = devices[number * each : (number + 1) * each] if on_gpu else devices
            launches = server_launches(config, checkpoint, role, on_gpu=on_gpu, devices=own)
            for place, launch in enumerate(launches):
                service = Service(launch, log=logs / f"{role}{'' if place == 0 else f'-{place}'}.log")
                services.append(stack.enter_context(service))
        for service in services:
            service.wait()
        yield services, devices[each * len(roles) :] if on_gpu else []


def _run(entry: Entry, command: Sequence[str], services: Sequence[Service], environment: Mapping[str, str]) -> int:
    """One run; its exit code."""
    interrupt.check()
    urls = [word for service in services for word in ("--teacher-url", service.url)]
    say(f"{entry['out']}: begins")
    run = subprocess.Popen([*command, *urls], env=environment)
    try:
        is_asked = False
        while run.poll() is None:
            for service in services:
                service.check()
            if (by := interrupt.received()) is not None and not is_asked:
                is_asked = True
                run.send_signal(by)
            time.sleep(_POLL_SECONDS)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    if run.returncode < 0:
        say(f"{entry['out']}: ended by signal {-run.returncode}")
    return run.returncode if run.returncode >= 0 else 1


def main() -> int:
    try:
        with deferred_signals():
            return run_sweep(Path(sys.argv[1]))
    except DistillError as error:
        complain(f"distill: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
