"""The catalogue of engines: how a fleet is written down for each, and what hands it over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.clusters import kubernetes, skypilot, slurm
from pipelines.clusters.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Engine:
    """``command`` submits a file, with the tool that is its first word; ``gpus`` is how many the file asks for."""

    title: str
    suffix: str
    render: Callable[[Fleet], str]
    command: Callable[[Fleet, Path], Sequence[str]]
    gpus: Callable[[Fleet], int] = lambda fleet: fleet.gpus
    has_cron: bool = False


ENGINES: dict[str, Engine] = {
    "slurm": Engine("Slurm", ".sbatch", slurm.render, lambda fleet, file: ["sbatch", str(file)], slurm.gpus),
    "kubernetes": Engine(
        "Kubernetes",
        ".kubernetes.yaml",
        kubernetes.render,
        lambda fleet, file: ["kubectl", "apply", "--filename", str(file)],
        has_cron=True,
    ),
    "skypilot": Engine("SkyPilot", ".sky.yaml", skypilot.render, skypilot.command),
}
